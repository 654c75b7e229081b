"""Recipes resolve to what is stored: every method on every data set that had a schedule when resolved.json was stored.

`resolved.json` holds for each method (`common`) and data set (`dataset`) the values that all its pairs share, and for
each pair the others. A recipe may be written in other files; what it computes may not change.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from orchestration.config.compose import load_config
from orchestration.config.problems import check

STORED = json.loads(Path(__file__).with_name("resolved.json").read_text("utf-8"))


def flat(tree, above=""):
    """Return dotted keys and values; lists, empty mappings, and mappings of dotted keys are values."""
    keys = {}
    for name, value in tree.items():
        key = f"{above}{name}"
        deeper = isinstance(value, dict) and value and "." not in "".join(value)
        keys |= flat(value, f"{key}.") if deeper else {key: value}
    return keys


def nested(keys):
    tree = {}
    for key, value in keys.items():
        *parents, last = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


def stored(pair):
    method, dataset = (word.split("=")[1] for word in pair.split()[:2])
    keys = STORED["common"][method] | STORED["dataset"][dataset] | STORED["pairs"][pair]
    return {key: below_here(value) for key, value in keys.items()}


def below_here(value):
    """Make a relative path absolute, as composing does."""
    if isinstance(value, str) and value.startswith("./"):
        return os.path.abspath(value)
    return value


@pytest.mark.parametrize("pair", STORED["pairs"])
def test_a_recipe_resolves_to_what_it_always_did(pair):
    config = load_config(pair.split())
    now, then = config.model_dump(mode="json"), stored(pair)
    found = flat(now)
    assert {key: found.get(key, "absent") for key in then} == then
    # The stored keys alone make the same config: a key that the schema has gained since has its default.
    assert check(nested(then), pair).model_dump(mode="json") == now


@pytest.mark.parametrize(("size", "images"), [(8, 65536), (32, 4096), (224, 64), (299, 32), (4096, 1)])
def test_auto_scores_as_many_images_as_have_four_million_pixels(size, images):
    """A power of two; on a CPU always 256. Of the config alone: free memory would show in the last bits."""
    config = load_config(["method=ce", "dataset=digits_lt", f"dataset.image_size={size}"])
    assert config.evaluation_batch_size("cuda") == images
    assert config.evaluation_batch_size("cpu") == 256
    fixed = load_config(["method=ce", "dataset=digits_lt", "run.evaluation_batch_size=100"])
    assert fixed.evaluation_batch_size("cuda") == fixed.evaluation_batch_size("cpu") == 100
