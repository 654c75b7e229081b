"""Layers are merged key by key, a piece named anew forgets the other's keys, and every value knows its layer."""

from __future__ import annotations

import pytest

from orchestration.config.origins import Layered

OBJECTIVE = ("method", "stages", "train", "objective")


def objective(**values):
    return {"method": {"stages": {"train": {"objective": values}}}}


def test_later_layers_win_key_by_key_and_every_value_knows_its_own():
    layered = Layered()
    layered.lay({"seed": 0, "dataset": {"root": None, "augment": {"rotation": 10}}}, "low")
    layered.lay({"dataset": {"augment": {"rotation": 15, "crop_padding": 4}}}, "high")
    assert layered.tree == {"seed": 0, "dataset": {"root": None, "augment": {"rotation": 15, "crop_padding": 4}}}
    assert layered.origin(("seed",)) == layered.origin(("dataset", "root")) == "low"
    assert layered.origin(("dataset", "augment", "rotation")) == "high"
    assert layered.origin(("dataset", "augment")) is None  # a mapping has the origins of its values


def test_a_piece_named_anew_forgets_the_keys_of_the_one_before():
    layered = Layered()
    layered.lay(objective(name="ldam", scale=30, reweight_epoch=160), "low")
    layered.lay(objective(name="cross_entropy"), "high")
    assert layered.get(OBJECTIVE) == {"name": "cross_entropy"}
    assert [path for path in layered.origins if path[-1] in ("scale", "reweight_epoch")] == []


def test_the_same_piece_named_again_keeps_its_keys_and_so_does_one_without_a_name():
    layered = Layered()
    layered.lay(objective(name="reslt", beta=0.995), "low")
    layered.lay(objective(name="reslt", fused="guarded"), "middle")
    layered.lay(objective(beta=0.99), "high")
    assert layered.get(OBJECTIVE) == {"name": "reslt", "beta": 0.99, "fused": "guarded"}
    assert layered.origin((*OBJECTIVE, "name")) == "middle"


@pytest.mark.parametrize("key", ["method", "dataset", "run"])
def test_the_names_of_method_data_set_and_run_are_no_pieces(key):
    layered = Layered()
    layered.lay({key: {"name": "a", "kept": 1}}, "low")
    layered.lay({key: {"name": "b"}}, "high")
    assert layered.tree[key] == {"name": "b", "kept": 1}


def test_a_backbone_of_another_kind_is_another_piece():
    layered = Layered()
    layered.lay({"backbone": {"name": "resnet_imagenet", "cardinality": 32}}, "low")
    layered.lay({"backbone": {"name": "resnet_cifar", "depth": 8}}, "high")
    assert layered.tree["backbone"] == {"name": "resnet_cifar", "depth": 8}


def test_null_replaces_a_mapping_a_mapping_replaces_null_and_lists_are_values():
    layered = Layered()
    layered.lay({"method": {"router": {"name": "ride", "top_k": 30}, "mixup": None, "groups": [1, 2]}}, "low")
    layered.lay({"method": {"router": None, "mixup": {"alpha": 1}, "groups": [3]}}, "high")
    assert layered.tree["method"] == {"router": None, "mixup": {"alpha": 1}, "groups": [3]}
    assert layered.origin(("method", "router")) == layered.origin(("method", "mixup", "alpha")) == "high"
    assert ("method", "mixup") not in layered.origins


def test_a_layer_is_not_changed_by_those_above_it():
    low = {"method": {"stages": {"train": {"freeze": ["trunk"]}}}}
    layered = Layered()
    layered.lay(low, "low")
    layered.get(("method", "stages", "train", "freeze")).append("heads")
    assert low == {"method": {"stages": {"train": {"freeze": ["trunk"]}}}}


def test_what_is_put_below_a_value_makes_it_a_mapping():
    layered = Layered()
    layered.lay({"method": {"mixup": None}}, "low")
    layered.put(("method", "mixup", "alpha"), 0.2, "high")
    assert layered.tree == {"method": {"mixup": {"alpha": 0.2}}}
    assert layered.origins == {("method", "mixup", "alpha"): "high"}
