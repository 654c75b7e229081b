"""A recipe that goes on from a saved run takes its network from it, and its data unless others are named."""

from __future__ import annotations

import json

import pytest

from orchestration.config.compose import compose, load_config, to_yaml


def saved(folder, *words, status="finished", **model):
    """Write the folder of a run as far as composing reads it."""
    config = load_config([*words, f"run.name={folder.name}"])
    (folder / "export" / "last").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "run.json").write_text(json.dumps({"status": status}))
    method = config.method.model_dump(mode="json")
    description = {
        "backbone": config.backbone.model_dump(mode="json"),
        "expert_names": list(config.method.expert_names),
        "class_names": [str(c) for c in range(10)],
        **{key: method[key] for key in ("head", "aggregator", "shared_head", "reduce_dimension", "router")},
        "calibration": None,
    } | model
    (folder / "export" / "last" / "model.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def ride(tmp_path):
    return saved(tmp_path / "mine", "method=ride", "dataset=digits_lt", "dataset.image_size=16", "seed=7")


def refused(*words):
    with pytest.raises(ValueError, match="problem") as error:
        load_config(list(words))
    return str(error.value).split("\n", 1)[1].strip()


def test_network_data_and_seed_are_the_runs(ride):
    config = load_config(["then=[ncm,cosine_crt]", f"method.like={ride}"])
    assert (config.seed, config.dataset.image_size, config.backbone.depth) == (7, 16, 8)
    method = config.method
    assert (method.name, config.run_name) == ("ride+ncm+cosine_crt", "mine+ncm+cosine_crt")
    assert (method.expert_names, method.head.name, method.reduce_dimension) == (
        ("expert0", "expert1", "expert2"), "cosine", True,
    )  # fmt: skip
    assert method.like == str(ride) and method.waves() == [["ncm", "cosine_crt"]]
    assert [method.starts_from(stage).run for stage in method.stages] == [str(ride)] * 2
    assert config.method.stages["cosine_crt"].epochs == 5  # the pace of digits


def test_a_path_is_made_absolute_and_the_run_is_named_as_the_origin(ride, monkeypatch):
    monkeypatch.chdir(ride.parent)
    composed = compose(["then=ncm", "method.like=mine", "seed=1"])
    assert composed.config.method.like == composed.config.method.stages["ncm"].start_from.run == str(ride)
    assert composed.config.seed == 1 and composed.config.run_name == "mine+ncm-s1"
    assert composed.layered.origin(("dataset", "image_size")) == "saved run"
    assert composed.layered.origin(("seed",)) == "command line"


def test_another_seed_data_root_and_the_same_data_set_may_be_named(ride):
    words = ["then=ncm", f"method.like={ride}", "dataset=digits_lt", "dataset.image_size=16"]
    assert load_config(words).dataset == load_config(["dataset=digits_lt", "dataset.image_size=16"]).dataset


def test_of_several_final_stages_one_may_be_named_and_the_last_is_said(ride):
    words = ["then=crt", f"method.like={ride}"]
    assert compose(words).notes == ()
    model = json.loads((ride / "export" / "last" / "model.json").read_text())
    for final in ("lws", "ncm"):
        (ride / "export" / final / "last").mkdir(parents=True)
        calibrated = model | ({"calibration": {"name": "scales"}} if final == "lws" else {})
        (ride / "export" / final / "last" / "model.json").write_text(json.dumps(calibrated))
    [note] = compose(words).notes
    assert note == "method.like: goes on from its last stage, train; method.like_final= takes another of lws, ncm"

    asked = compose([*words, "method.like_final=lws"])
    assert asked.notes == () and asked.config.method.calibration.name == "scales"
    assert asked.config.method.stages["crt"].start_from.export == "export/lws/last"
    said = refused(*words, "method.like_final=crt")
    assert said == f"method.like_final = crt: no final stage of {ride}; it has lws, ncm"
    assert "of which run?" in refused("method=ce", "method.like_final=lws")


def test_a_method_trains_an_ensemble_of_the_same_make(ride):
    composed = compose(["method=ce", f"method.like={ride}", "dataset=digits_lt"])
    method = composed.config.method
    assert composed.notes[0].startswith("method.like: train is trained anew, on a network made like that of mine")
    assert (method.num_experts, method.reduce_dimension, method.head.name) == (3, True, "cosine")
    assert list(method.stages) == ["train"] and method.starts_from("train") is None


def test_a_router_is_left_behind(tmp_path):
    """The stage trains none, so all experts answer, by the rule that the method has without one."""
    router = {"aggregator": {"name": "router"}}
    run = saved(tmp_path / "routed", "method=ride_router", "dataset=digits_lt", **router)
    method = load_config(["then=ncm", f"method.like={run}"]).method
    assert method.router is None and method.aggregator.name == "mean_logits"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "holds no run; needed the folder of a finished run"),
        (
            lambda run: (run / "run.json").write_text('{"status": "running"}'),
            "the run is running; needed a finished one",
        ),
        (lambda run: (run / "run.json").unlink(), "run.json cannot be read (FileNotFoundError); restore the folder"),
        (lambda run: (run / "run.json").write_text("[]"), "the run is not started; needed a finished one"),
        (lambda run: (run / "export" / "last" / "model.json").unlink(), "it has no export/last/model.json"),
        (
            lambda run: (run / "export" / "last" / "model.json").write_text("{}"),
            "do not describe a run of this version",
        ),
        (lambda run: (run / "config.yaml").write_text("a: ["), "do not describe a run of this version"),
    ],
)
def test_a_run_that_cannot_be_gone_on_from_is_named(ride, damage, message):
    damage(ride)
    said = refused("then=ncm", f"method.like={ride}")
    assert said.startswith(f"method.like = {ride}: ") and message in said


def test_a_run_that_is_gone_is_named(tmp_path):
    assert "there is no such folder; needed the folder of a finished run" in refused(
        "then=ncm", f"method.like={tmp_path}/x"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset=cifar100_lt"], "its model knows 10 classes (0, 1, 2, ...), dataset cifar100_lt has 100 classes"),
        (["dataset=fashion_mnist_lt"], "dataset fashion_mnist_lt has other classes; needed the run's own"),
        (["dataset=places_lt"], "dataset places_lt has 365 classes; needed the run's own; leave out dataset="),
        (["backbone=resnet20"], "backbone=resnet20: the backbone is the run's (method.like); leave it out"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(ride, words, message):
    assert message in refused("then=ncm", f"method.like={ride}", *words)


def test_a_run_to_go_on_from_needs_something_to_train(ride):
    assert "nothing to train; needed stages that start from the run, e.g. then=crt" in refused(f"method.like={ride}")


def test_a_mixing_that_would_mix_nothing_is_refused(ride):
    """The stages that go on from the run train heads alone."""
    words = [f"method.like={ride}", "then=crt"]
    assert refused(*words, "mix=cmo") == "mix=cmo: no stage of the recipe learns the trunk; leave it out"
    assert load_config(words).method.stages["crt"].mixing is None
