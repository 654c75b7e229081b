"""The presets are valid and have the totals of their headers; bad combinations of keys are reported together."""

from pathlib import Path

import pytest
import yaml

from experts.data.config import Augment, DatasetConfig
from experts.data.imbalance import long_tailed_counts

PRESETS = {
    path.stem: DatasetConfig(**yaml.safe_load(path.read_text()))
    for path in sorted((Path(__file__).parents[4] / "configs" / "dataset").glob("*.yaml"))
}


def test_all_presets_are_there_and_named_after_their_files():
    assert set(PRESETS) == {
        "digits_lt",
        "fashion_mnist_lt",
        "cifar10_lt",
        "cifar100_lt",
        "image_folder_lt",
        "image_list",
        "imagenet_lt",
        "places_lt",
        "inat18",
    }
    assert all(preset.name == name for name, preset in PRESETS.items())


@pytest.mark.parametrize(
    ("name", "total"), [("cifar10_lt", 12406), ("cifar100_lt", 10847), ("fashion_mnist_lt", 14886), ("digits_lt", 405)]
)
def test_presets_have_the_totals_of_their_headers(name, total):
    preset = PRESETS[name]
    num_classes = 100 if name == "cifar100_lt" else 10
    assert long_tailed_counts(num_classes, preset.max_per_class, preset.imbalance_ratio).sum() == total


def test_digits_and_places_keep_their_rules():
    assert PRESETS["digits_lt"].augment.horizontal_flip == 0
    assert PRESETS["inat18"].augment.color_jitter is None
    assert PRESETS["inat18"].num_classes == 8142
    assert PRESETS["places_lt"].index_groups == (131, 288)
    assert all(PRESETS[n].eval.resize == 256 and PRESETS[n].image_size == 224 for n in ("imagenet_lt", "places_lt"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"imbalance_ratio": 0.5}, "imbalance_ratio"),
        ({"no_such_key": 1}, "no_such_key"),
        ({"train_list": "x"}, "train_list: only for source=image_list, found source=digits"),
        ({"download": True}, "download=true: source=digits cannot be downloaded"),
        ({"index_groups": (7, 3)}, "needs 0 < first cut < second cut"),
        ({"imbalance_type": "step"}, "imbalance_type = step needs imbalance_ratio"),
        ({"eval": {"resize": 16}}, "eval.resize = 16 is smaller than image_size = 32"),
        ({"std": (0, 1, 1)}, "greater than 0"),
        ({"augment": {"random_resized_crop": (0.5, 0.1)}}, "needs 0 < least <= greatest <= 1"),
    ],
)
def test_bad_keys_are_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message):
        DatasetConfig(name="digits", source="digits", **keys)


def test_two_crops_are_refused():
    with pytest.raises(ValueError, match=r"crop_padding = 4 and random_resized_crop are both set"):
        Augment(crop_padding=4, random_resized_crop=(0.1, 1))
