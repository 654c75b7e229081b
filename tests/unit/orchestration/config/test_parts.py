"""Recipes from parts: which layers make them, in which order, and what a part does to its host."""

from __future__ import annotations

import pytest

from orchestration.config import folders
from orchestration.config.compose import compose, load_config
from orchestration.config.layers import read_file
from orchestration.config.parts import plan_recipe
from orchestration.config.words import available

TRAIN = ("method", "stages", "train")


def origin(words, *path):
    return compose(words.split()).layered.origin(path)


def test_later_layers_win_in_the_order_of_the_parts():
    words = "method=tade dataset=cifar10_lt mix=mixup then=h2t"
    assert compose(words.split()).files == (
        "dataset/cifar10_lt", "backbone/resnet32", "method/tade", "protocol/cifar_sade", "pace/cifar10_lt", "mix/mixup",
        "then/h2t",
    )  # fmt: skip
    assert origin(words, *TRAIN, "objective", "tau") == "method/tade"
    assert origin(words, *TRAIN, "optimizer", "momentum") == "protocol/cifar_sade"
    assert origin(words, *TRAIN, "optimizer", "lr") == "method/tade on cifar10_lt"
    assert origin(words, *TRAIN, "mixing", "alpha") == "mix/mixup"
    assert origin(words, "method", "stages", "h2t", "flow", "ratio") == "then/h2t"
    assert origin(f"{words} method.num_experts=3", "method", "num_experts") == "command line"
    small = "method=ride dataset=digits_lt then=h2t"
    assert origin(small, *TRAIN, "epochs") == origin(small, "method", "stages", "h2t", "epochs") == "pace/digits_lt"
    big = "method=ce dataset=imagenet_lt then=crt mix=mixup"
    assert origin(big, "method", "stages", "crt", "lr_schedule", "name") == "then/crt on survey"
    assert origin(big, *TRAIN, "mixing", "alpha") == "mix/mixup on imagenet_lt"
    assert origin(f"{big} protocol=imagenet_decoupling", "method", "stages", "crt", "optimizer", "lr") == (
        "then/crt on imagenet_decoupling"
    )


def test_a_recipe_of_others_lies_on_them_and_has_its_own_name():
    composed = compose(["method=dr_h2t", "dataset=cifar100_lt"])
    assert composed.files[2:] == (
        "method/ce", "protocol/cifar_mislas", "pace/cifar100_lt", "mix/mixup", "then/h2t", "method/dr_h2t"
    )  # fmt: skip
    assert composed.config.method.name == "dr_h2t"
    assert load_config(["method=ce", "mix=mixup", "then=h2t"]).method.name == "ce+mixup+h2t"


def test_ride_with_h2t_needs_no_file():
    """The same as method=ride_h2t, whose experts have their full width."""
    parts = load_config(["method=ride", "then=h2t", "dataset=cifar100_lt", "method.reduce_dimension=false"]).method
    whole = load_config(["method=ride_h2t", "dataset=cifar100_lt"]).method
    assert parts.stages == whole.stages and parts.name == "ride+h2t"


def test_one_part_follows_its_host_and_several_start_side_by_side():
    one = load_config(["method=ce", "then=crt"]).method
    assert list(one.stages) == ["train", "crt"] and one.starts_from("crt").stage == "train" and one.finals == ("crt",)
    side = load_config(["method=ce", "then=[joint,ncm,crt,lws]"]).method
    assert side.waves() == [["train"], ["joint", "ncm", "crt", "lws"]]
    assert {side.starts_from(stage).stage for stage in side.finals} == {"train"}
    after_h2t = load_config(["method=ride_h2t", "then=[ncm,cosine_crt]"]).method
    assert {after_h2t.starts_from(stage).stage for stage in after_h2t.finals} == {"h2t"}


def test_mixing_changes_the_stages_that_learn_the_trunk():
    stages = load_config(["method=ride_router", "mix=mixup"]).method.stages
    assert stages["train"].mixing is not None and stages["router"].mixing is None
    several = load_config(["method=lfme", "mix=mixup", "method.stages.student.mixing=null"]).method.stages
    assert {name for name, stage in several.items() if stage.mixing is None} == {"student"}


def test_a_part_that_the_recipe_has_already_is_refused():
    with pytest.raises(
        ValueError, match="then=h2t: the recipe has a stage h2t already: train, h2t; leave out the part"
    ):
        load_config(["method=ride_h2t", "then=h2t"])


def test_a_protocol_and_a_pace_may_be_those_of_other_data():
    config = load_config(["method=ce", "dataset=digits_lt", "protocol=survey", "pace=fashion_mnist_lt", "then=ncm"])
    stage = config.method.stages["train"]
    assert (stage.epochs, stage.batch_size, stage.lr_schedule.name, stage.optimizer.weight_decay) == (
        40,
        128,
        "cosine",
        5e-4,
    )


def test_a_data_set_without_a_pace_has_the_generic_one():
    assert compose(["method=ce", "dataset=image_list"]).files[-1] == "pace/generic"


def test_a_recipe_made_of_itself_is_named(monkeypatch, tmp_path):
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "ce.yaml").write_text("of: {method: ride}\n")
    (tmp_path / "method" / "ride.yaml").write_text("of: {method: ce}\n")
    monkeypatch.setattr(folders, "configs_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"method/ride\.yaml: made `of` itself by way of ride, ce"):
        plan_recipe("ride", None, (), "digits_lt", {}, "resnet32")


def test_blocks_name_data_sets_protocols_and_paces_that_exist():
    known = {*available("dataset"), *available("protocol"), *available("pace")}
    for group in ("method", "mix", "then", "protocol", "pace"):
        for choice in available(group):
            file = read_file(group, choice)
            assert file.on.keys() <= known, f"{file.name}: on {sorted(file.on.keys() - known)}"


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        ([], []),
        (["dataset.image_size=16"], []),
        (
            ["method.stages.train.epochs=20"],
            [
                "stage train: 20 instead of 24 epochs; scaled: objective.reweight_epoch 16; "
                "lr_schedule.warmup_epochs 3; lr_schedule.milestones 16, 18"
            ],
        ),
        (
            ["method=ce", "then=crt", "method.stages.crt.epochs=2", "method.stages.train.epochs=4"],
            [
                "stage train: 4 instead of 24 epochs; scaled: lr_schedule.warmup_epochs 1; lr_schedule.milestones 3, "
                "90% left out (the end)",
                "stage crt: 2 instead of 5 epochs",
            ],
        ),
    ],
)
def test_what_a_shortened_run_scales_is_noted(words, notes):
    assert list(compose(["dataset=digits_lt", *words]).notes) == notes


@pytest.mark.parametrize("mix", available("mix"))
@pytest.mark.parametrize("method", ["ldam_drw", "ride", "ace"])
def test_every_mixing_goes_with_every_recipe_whose_batches_are_not_paired(mix, method):
    method = load_config([f"method={method}", f"mix={mix}", "then=h2t", "dataset=digits_lt"]).method
    first, *_, last = method.stages.values()
    assert first.mixing.name == mix and last.mixing is None


def test_another_mixing_takes_the_place_of_a_recipes_own():
    """DR+H2T has mixup; none of its keys is left."""
    method = load_config(["method=dr_h2t", "mix=cutmix", "dataset=cifar100_lt"]).method
    assert method.stages["train"].mixing.model_dump() == {"name": "cutmix", "alpha": 1.0, "probability": 0.5}


@pytest.mark.parametrize(("method", "later"), [("mislas", None), ("gcl", "mixup"), ("dr_mu", None)])
def test_no_mixing_takes_off_that_of_the_stages_that_learn_the_trunk(method, later):
    """GCL's second stage blends images too, and keeps the trunk as it is."""
    config = load_config([f"method={method}", "dataset=digits_lt", "mix=null"])
    first, second = config.method.stages.values()
    assert first.mixing is None
    assert (second.mixing and second.mixing.name) == later
    assert config.method.name == f"{method}+unmixed"


def test_no_mixing_leaves_a_recipe_without_one_as_it_is():
    words = ["method=ride", "dataset=digits_lt", "then=crt"]
    assert load_config([*words, "mix=null"]) == load_config(words)
