"""From words to a config: what is accepted, what is refused, and how it is said."""

from __future__ import annotations

import os

import pytest
import yaml

from orchestration.config.compose import from_yaml, load_config, to_yaml
from orchestration.config.identity import config_hash, difference, flatten, identity
from orchestration.config.paths import expand
from orchestration.config.problems import check
from orchestration.config.words import available


def problems(*words):
    """The lines of the message with which these words are refused."""
    with pytest.raises(ValueError, match="problem") as error:
        load_config(list(words))
    title, *lines = str(error.value).splitlines()
    assert title == f"{' '.join(words)}: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return [line.strip() for line in lines]


def test_the_defaults_are_ride_on_digits():
    config = load_config([])
    assert (config.method.name, config.dataset.name, config.backbone.depth) == ("ride", "digits_lt", 8)
    assert config.run_name == "ride-digits_lt-s0"
    assert config.method.expert_names == ("expert0", "expert1", "expert2")


def test_a_choice_on_the_command_line_beats_the_pace_and_a_value_beats_both():
    assert load_config(["backbone=resnet20"]).backbone.depth == 20
    config = load_config(["backbone=resnet20", "backbone.depth=14", "method.stages.train.epochs=2"])
    assert (config.backbone.depth, config.method.stages["train"].epochs) == (14, 2)


def test_every_problem_is_in_one_message():
    lines = problems("method.num_expert=3", "seed=-1", "cluster.workers=two", "run.select_on=train", "nonsense.a=1")
    assert lines == [
        "cluster.workers = two: needed a whole number",
        "method.num_expert: unknown key; did you mean method.num_experts?",
        "nonsense: unknown key; known: seed, method, dataset, backbone, engine, cluster, run, tracking",
        "run.select_on = train: needed 'auto', 'val' or 'test'",
        "seed = -1: needed 0 or more",
    ]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("datset.root=/x", "did you mean dataset?"),
        ("cluster.worker=3", "did you mean cluster.workers?"),
        ("method.stages.train.class_weights={rule: power, to: 2}", "known: rule, beta, power, after_epoch, mean"),
        ("method.stages.train.epoch=3", "did you mean method.stages.train.epochs?"),
        ("method.stages.train.optimizer.learning=3", "method.stages.train.optimizer.learning: unknown key"),
        (
            "method.stages.train.objective.reweight_epochs=3",
            "did you mean method.stages.train.objective.reweight_epoch?",
        ),
        ("dataset.augment.crop_pading=3", "did you mean dataset.augment.crop_padding?"),
        ("dataset.imbalance=100", "did you mean dataset.imbalance_ratio?"),
        ("epochs=5", "epochs: unknown key; did you mean method.stages.train.epochs?"),
    ],
)
def test_a_misspelt_key_is_told_its_neighbour(word, hint):
    assert hint in problems(word)[0]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("method.stages.train.lr_schedule.milestones=[3]", "milestones.0 = 3: needed the keys after_epoch, factor"),
        ("method.num_experts=9", "method.num_experts = 9: needed 8 or less"),
        ("method.num_experts=0", "method.num_experts = 0: needed 1 or more"),
        ("method.stages.train.batch_size=0", "needed 1 or more"),
        ("method.stages.train.optimizer.lr=0", "needed more than 0"),
        ("engine.zero_stage=0", "engine.zero_stage = 0: needed 1 or 2"),
        ("engine.name=horovod", "engine.name = horovod: needed 'auto', 'deepspeed' or 'torch'"),
        ("cluster.gpus_per_worker=2", "needed 1 or less"),
        ("dataset.download=perhaps", "needed true or false"),
        ("backbone.depth=50", "backbone.depth = 50: needed 8, 14, 20 or 32"),
        (
            "method.stages.train.objective=ldam",
            "method.stages.train.objective = ldam: a piece is set by its name; needed "
            "method.stages.train.objective.name=ldam",
        ),
        ("method.aggregator.name=median", "method.aggregator.name = median: unknown; needed one of"),
        ("method.stages.train.objective.scale=20", "objective 'ride' multiplies its margins by it"),
        ("dataset.test_list=a.txt", "only for source=image_list"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_needed(word, line):
    assert any(line in found for found in problems(word))


def test_a_piece_without_a_name_is_refused():
    words = ["method.stages.train.objective=cross_entropy", "method.stages.train.objective.scale=20"]
    assert problems(*words) == ["method.stages.train.objective.name: not set; needed the name of a piece"]


def test_an_unknown_choice_is_told_the_known_ones():
    lines = problems("method=rid", "backbone=vit")
    assert lines[0].startswith("backbone=vit: no such backbone")
    assert lines[0].endswith(f"known: {', '.join(available('backbone'))}")
    assert lines[1].startswith("method=rid: no such method, did you mean method=ride; known: ")


@pytest.mark.parametrize("word", ["+seed=1", "++seed=1", "~seed", "~cluster.workers=1", "seed=1,2", "seed=range(1,3)"])
def test_sweeps_additions_and_removals_are_refused(word):
    assert "needed key=value with one value and no +, ++ or ~" in problems(word)[0]


@pytest.mark.parametrize("word", ["seed", "just words", "--seed"])
def test_what_is_no_override_is_refused(word):
    assert "not of the form key=value" in problems(word)[0]


@pytest.mark.parametrize(
    "path",
    ["/a b/c", "/a=b/c=d", "/it's (here)/x", "/back\\slash", "/with,comma {and} [braces]", "/ümläut/日本"],
)
def test_paths_arrive_as_they_were_typed(path):
    assert load_config([f"dataset.root={path}"]).dataset.root == path


def test_a_folder_is_made_absolute_for_workers_that_stand_elsewhere():
    assert load_config(["dataset.root=~/data"]).dataset.root == os.path.expanduser("~/data")
    assert load_config(["dataset.root=data"]).dataset.root == os.path.abspath("data")
    assert load_config(["method.backbone_weights=a.safetensors"]).method.backbone_weights == os.path.abspath(
        "a.safetensors"
    )


def test_null_lists_and_numbers_are_read():
    words = ["dataset.imbalance_ratio=null", "dataset.index_groups=[2,5]", "method.stages.train.optimizer.lr=1e-3"]
    config = load_config(words)
    assert config.dataset.imbalance_ratio is None
    assert config.dataset.index_groups == (2, 5)
    assert config.method.stages["train"].optimizer.lr == 1e-3


def test_a_config_survives_its_yaml(tmp_path):
    config = load_config(["method=ldam", "dataset=cifar100_lt", "dataset.root=/a: b # c", "seed=7"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert from_yaml(path) == config
    assert config_hash(from_yaml(path)) == config_hash(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a: [", "config.yaml"),
        ("- 1\n", "found list, needed a mapping"),
        ("seed: 0\n", "method: not set; needed a value"),
        ("seed: ${nowhere}\n", "config.yaml"),
    ],
)
def test_a_damaged_config_file_is_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml") as error:
        from_yaml(path)
    assert message in str(error.value)


def test_check_names_what_the_tree_lacks():
    with pytest.raises(ValueError, match="here: 3 problems") as error:
        check({}, "here")
    assert "dataset: not set" in str(error.value)


def test_where_a_run_lives_is_not_what_it_is():
    config = load_config([])
    elsewhere = load_config([
        "cluster.workers=3", "cluster.cpus_per_worker=0.5", "run.dir=/x", "run.max_steps=5", "tracking.uri=http://h:1",
        "dataset.root=/y", "dataset.loader_processes=2", "run.name=z",
    ])  # fmt: skip
    assert identity(config) == identity(elsewhere)
    assert config_hash(config) == config_hash(elsewhere)
    assert len(config_hash(config)) == 12


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("method.stages.train.batch_size=5", "method.stages.train.batch_size: 64 -> 5"),
        ("engine.precision=float64", "engine.precision: float32 -> float64"),
        ("run.select_on=test", "run.select_on: auto -> test"),
        ("run.evaluate_every_epochs=2", "run.evaluate_every_epochs: 1 -> 2"),
        ("dataset.image_size=16", "dataset.image_size: 32 -> 16"),
    ],
)
def test_what_decides_the_numbers_is_told_apart(word, line):
    config, other = load_config([]), load_config([word])
    assert difference(identity(config), identity(other)) == [line]
    assert config_hash(config) != config_hash(other)


def test_tf32_is_for_gpus_and_another_run_than_float32():
    on_gpu = "cluster.gpus_per_worker=1"
    found = difference(identity(load_config([on_gpu])), identity(load_config([on_gpu, "engine.precision=tf32"])))
    assert found == ["engine.precision: float32 -> tf32"]
    with pytest.raises(ValueError, match=r"a CPU has no TF32; set engine\.precision=float32 or cluster\.gpus_per"):
        load_config(["engine.precision=tf32"])


def test_a_difference_names_keys_that_only_one_has():
    assert difference({"a": 1, "b": None}, {"b": 2, "c": 3}) == ["a: 1 -> (unset)", "b: None -> 2", "c: (unset) -> 3"]


def test_flatten_keeps_lists_and_empty_mappings():
    assert flatten({"a": {"b": [1], "c": {}}, "d": None}) == {"a.b": [1], "a.c": {}, "d": None}


def test_expand_reads_home_and_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    assert str(expand("~/runs")) == "/home/me/runs"
    assert str(expand("$DATA/runs")) == "/data/runs"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "price $DATA").mkdir()
    assert str(expand("price $DATA")) == "price $DATA", "as it is named"


@pytest.mark.parametrize(("mixup", "words"), [("null", []), ("{alpha: 0.5}", ["mix=mixup", "AT.mixing.alpha=0.5"])])
def test_a_config_of_a_run_from_before_mixing_was_a_piece_is_read(tmp_path, mixup, words):
    config = load_config(
        ["method=ce", "dataset=digits_lt", *(word.replace("AT", "method.stages.train") for word in words)]
    )
    config = config.model_copy(update={"method": config.method.model_copy(update={"name": "ce"})})
    tree = yaml.safe_load(to_yaml(config))
    for stage in tree["method"]["stages"].values():
        del stage["mixing"]
        stage["mixup"] = yaml.safe_load(mixup)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert from_yaml(path) == config
    assert config_hash(from_yaml(path)) == config_hash(config)
