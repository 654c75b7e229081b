"""Stacks of augmentations by name become pieces; what does not fit is refused with the key."""

from __future__ import annotations

import pytest

from orchestration.config.compose import from_yaml, load_config, to_yaml
from orchestration.config.identity import published
from orchestration.config.stacks import STANDARD
from orchestration.config.words import available

CIFAR = ["dataset=cifar100_lt", "dataset.root=/data"]


def names(augment):
    return [piece.name for piece in augment.stack]


def test_a_name_replaces_the_augmentation_of_the_data_set():
    config = load_config(["method=ride", *CIFAR, "dataset.augment.name=moco"])
    assert names(config.dataset.augment) == ["resized_crop", "flip", "color_jitter", "greyscale", "gaussian_blur"]
    assert config.dataset.augment.name == "moco"
    assert not config.dataset.augment.crop_padding, "the keys of the file are gone"


def test_standard_is_the_data_sets_own_as_the_protocol_has_it():
    plain = load_config(["method=ride", *CIFAR])
    named = load_config(["method=ride", *CIFAR, "dataset.augment.name=standard"])
    assert named == plain
    assert names(plain.dataset.augment) == ["crop", "flip", "rotation"]
    stage = load_config(
        ["method=ride", *CIFAR, "dataset.augment.name=none", "method.stages.train.views=[standard,moco]"]
    ).method.stages["train"]
    assert stage.views[0] == plain.dataset.augment
    assert names(stage.views[1])[0] == "resized_crop"


def test_a_list_of_pieces_is_a_stack():
    words = ["dataset.augment=[{name:crop,padding:2},{name:rotation,degrees:5}]"]
    augment = load_config(words).dataset.augment
    assert names(augment) == ["crop", "rotation"] and augment.stack[0].padding == 2
    stage = load_config(["method.stages.train.views=[[{name:flip}],crop_flip]"]).method.stages["train"]
    assert [names(view) for view in stage.views] == [["flip"], ["crop"]], "digits are not mirrored by crop_flip"


def test_a_stage_has_an_augmentation_of_its_own():
    config = load_config(["method=crt", "method.stages.crt.augment.name=none"])
    assert config.method.stages["crt"].augment.is_off
    assert config.method.stages["train"].augment is None


def test_a_key_of_a_piece_is_set_beside_the_name():
    words = [*CIFAR, "dataset.augment.name=moco", "dataset.augment.color_jitter.hue=0.2"]
    augment = load_config(words).dataset.augment
    assert augment.stack[2].hue == 0.2 and augment.stack[2].probability == 0.8


def test_a_published_result_is_of_the_data_sets_own_augmentation():
    words = ["method=ride", *CIFAR]
    assert published(load_config(words)) is not None
    assert published(load_config([*words, "dataset.augment.name=standard"])) is not None
    assert published(load_config([*words, "dataset.augment.name=randaugment"])) is None


@pytest.mark.parametrize("name", available("augment"))
@pytest.mark.parametrize("dataset", ["digits_lt", "cifar10_lt", "imagenet_lt"])
def test_every_stack_reads_back_equal(tmp_path, name, dataset):
    words = [f"dataset={dataset}", "dataset.root=/data", f"dataset.augment.name={name}"]
    if (name, dataset) == ("autoaugment_cutout", "imagenet_lt"):
        with pytest.raises(ValueError, match="it is for small images, found image_size = 224"):
            load_config(words)
        return
    config = load_config(words)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset.augment.name=mocco"], f"augment.name = mocco: no such stack, did you mean moco; known: {STANDARD}"),
        (["method.stages.train.views=[sinclr]"], "method.stages.train.views.0.name = sinclr: no such stack"),
        (
            ["dataset.augment.name=moco", "dataset.augment.rotation=10"],
            "dataset.augment.rotation = 10: set beside name",
        ),
        (["dataset.augment.name=none", "dataset.augment.flip.probability=1"], "the stack none has no such piece"),
        (
            ["dataset.augment.name=randaugment", "dataset.augment.randaugment.magnitude=31"],
            "dataset.augment.pieces.1.magnitude = 31: needed 30 or less",
        ),
        (["dataset.augment=[{name:croop}]"], "dataset.augment.pieces.0.name = croop: unknown; needed one of"),
        (["dataset.augment=[{name:flip},{name:resized_crop}]"], "needed it as the first piece"),
        (["dataset.augment=[{name:flip,probability:2}]"], "dataset.augment.pieces.0.probability = 2"),
        (["mix=mixup", "method.stages.train.views=[moco]"], "views: mixing.name = mixup is set too"),
        (["method=bbn", "method.stages.train.views=[moco]"], "views: flow 'bilateral' pairs every image with another"),
        (["method=ncm", "method.stages.ncm.views=[moco]"], "ncm.views: the stage has no steps (epochs = 0); remove it"),
        (
            ["dataset.augment.name=none", "method.stages.train.views=[none]"],
            "views: 2 of them change nothing at random, so that they would show the same",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_key(words, message):
    with pytest.raises(ValueError) as refused:
        load_config(words)
    assert message in str(refused.value)
