"""`expertail show` prints a recipe that reads back as its config, with the origin of every value."""

from __future__ import annotations

import pytest
import yaml

from orchestration.cli import main
from orchestration.commands.show import show_text
from orchestration.config.compose import load_config

WORDS = ["method=ride", "mix=mixup", "then=h2t", "dataset=cifar100_lt", "method.stages.train.epochs=20"]


def line(text, key):
    [found] = [row for row in text.splitlines() if row.strip().startswith(f"{key}:")]
    return found


def test_each_value_names_its_layer_and_what_was_scaled():
    text = show_text(WORDS)
    assert line(text, "rotation").endswith("# protocol/cifar_ride")
    assert line(text, "ratio").endswith("# then/h2t")
    assert line(text, "alpha").endswith("# mix/mixup")
    assert line(text, "reweight_epoch").split("#")[1].strip() == "method/ride: 80% of the epochs"
    assert line(text, "milestones").endswith("# protocol/cifar_ride: 80%, 90% of the epochs")
    head = [row for row in text.splitlines() if row.startswith("#")]
    assert head[0] == (
        "# made of, later ones win: dataset/cifar100_lt, backbone/resnet32, method/ride, protocol/cifar_ride, "
        "pace/cifar100_lt, mix/mixup, then/h2t"
    )
    assert head[1].startswith("# stage train: 20 instead of 200 epochs; scaled: ")


def test_a_drop_that_is_left_out_is_said():
    text = show_text(["method=ce", "dataset=digits_lt", "method.stages.train.epochs=3"])
    assert line(text, "milestones").endswith("80%, 90% (left out: the end) of the epochs")


def below(part, whole):
    """Whether all that a nested mapping says is in another one."""
    return all(below(v, whole[k]) if isinstance(v, dict) and v else whole[k] == v for k, v in part.items())


@pytest.mark.parametrize("words", [WORDS, ["method=lfme", "dataset=cifar10_lt"], ["method=crt", "dataset=imagenet_lt"]])
def test_it_reads_back_as_the_config(words):
    config = load_config(words).model_dump(mode="json")
    assert yaml.safe_load(show_text(words, everything=True)) == config
    part = yaml.safe_load(show_text(words))
    assert below(part, config) and part != config


def test_comments_are_aligned():
    rows = [row for row in show_text(WORDS).splitlines() if "  # " in row and len(row.split("  # ")[0]) <= 72]
    assert len({row.index("  # ") for row in rows}) == 1


def test_the_command_prints_it_and_refuses_what_training_refuses(capsys):
    assert main(["show", "--all", "method=ce"]) == 0
    assert "zero_stage: 1" in capsys.readouterr().out
    assert main(["show", "method=cee"]) == 1
    assert "did you mean method=ce" in capsys.readouterr().err
