"""A message about a config names the key, the piece that would know it, and the file that wrote it."""

from __future__ import annotations

import pytest

from orchestration.config.compose import load_config


def refused(*words):
    with pytest.raises(ValueError, match="problem") as error:
        load_config(list(words))
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_a_key_that_only_the_replaced_piece_knew_is_told_who_has_it():
    """The recipe's own keys go with the piece; one from the command line is refused."""
    words = ["method=ldam", "dataset=digits_lt", "method.head.name=linear"]
    assert load_config([*words, "method.stages.train.objective.name=cross_entropy"])
    [line] = refused(
        *words, "method.stages.train.objective.reweight_epoch=3", "method.stages.train.objective.name=cross_entropy"
    )
    assert line == (
        "method.stages.train.objective.reweight_epoch: objective 'cross_entropy' has no key reweight_epoch; "
        "'expert_divergence', 'ldam' and 'ride' have"
    )


def test_a_key_of_one_other_piece_names_it():
    [line] = refused("method=ce", "method.stages.train.objective.tau_=1", "method.head.initial_length=1")[:1]
    assert line == "method.head.initial_length: head 'linear' has no key initial_length; 'gist' has"


def test_a_key_that_a_file_wrote_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "pace").mkdir()
    (tmp_path / "pace" / "mine.yaml").write_text("stage: {epochs: 2, objective: {diversity_factor: -0.9}}\n")
    monkeypatch.setenv("EXPERTAIL_CONFIG_DIR", str(tmp_path))
    [line] = refused("method=ce", "dataset=digits_lt", "pace=mine")
    assert line == (
        "method.stages.train.objective.diversity_factor: objective 'cross_entropy' has no key diversity_factor; "
        f"'ride' has (from pace/mine, {tmp_path / 'pace' / 'mine.yaml'})"
    )


def test_a_share_written_as_a_number_is_told_how_it_is_written():
    [line] = refused("method=ldam", "method.stages.train.objective.reweight_epoch=0.8")
    assert line.endswith("a share of the stage is written 80%")


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_a_name_and_its_keys_does_not_matter(order):
    words = ["method.stages.train.lr_schedule.name=cosine", "method.stages.train.lr_schedule.stepped=before"]
    stage = load_config(["method=ce", *words[::order]]).method.stages["train"]
    assert stage.lr_schedule.model_dump() == {
        "name": "cosine", "unit": "epoch", "stepped": "before", "beyond": 0, "warmup": 0, "warmup_start": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("seed=[1]", "seed: needed a whole number, found a list"),
        ("train.mixing.alpha=[1]", "train.mixing.alpha: needed a number, found a list"),
        ("train.objective=5", "train.objective: needed the name of a piece, found 5; set {}.name"),
        ("train.objective=[1]", "train.objective: needed the name of a piece, found a list; set {}.name"),
        ("train.mixing.sampler=null", "train.mixing.sampler: needed the name of a piece, found null; set {}.name"),
        ("train.auxiliaries=[1]", "train.auxiliaries: needed a mapping, found a list"),
    ],
)
def test_a_value_of_another_kind_is_told_in_our_words(word, line):
    stages = "method.stages."
    word, line = (stages + text if text.startswith("train.") else text for text in (word, line))
    assert refused("method=ce", "dataset=digits_lt", "mix=cmo", word) == [line.format(word.partition("=")[0])]


@pytest.mark.parametrize("key", ["mixup.alpha", "method.stages.train.mixup.alpha"])
def test_a_key_of_earlier_versions_is_told_its_new_name(key):
    [line] = refused("method=ce", "dataset=digits_lt", f"{key}=3")
    assert line == f"{key.removesuffix('.alpha')}: unknown key; did you mean method.stages.train.mixing?"
