"""A run with several final stages is whole wherever results are shown: folder, table, pictures, commands, MLflow."""

from __future__ import annotations

import json

import pytest

from orchestration.cli import main
from tests import runs

pytestmark = [pytest.mark.ray, pytest.mark.slow]

WORDS = [
    "method=ce", "then=[ncm,tau_norm,crt]", "dataset=digits_lt", "dataset.image_size=8", "dataset.val_per_class=4",
    "engine.name=torch", "engine.threads=1", "tracking.enabled=false", "method.stages.train.batch_size=120",
    "method.stages.train.epochs=2", "method.stages.crt.batch_size=120", "method.stages.crt.epochs=2",
]  # fmt: skip
FINALS = ["ncm", "tau_norm", "crt"]


@pytest.fixture(scope="module")
def run(warm_pool, tmp_path_factory):
    from tests.conftest import lend

    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        lend(warm_pool, patch)
        assert runs.train(folder, common=WORDS) == 0
    return folder


def read(path):
    return json.loads(path.read_text())


def percent(value):
    return f"{100 * value:.2f}"


def row(text, label):
    return next(line.removeprefix(label).split() for line in text.splitlines() if line.startswith(label))


def test_the_report_compares_the_final_stages_and_says_what_was_chosen(run, capsys):
    assert runs.train(run, common=WORDS) == 0  # a finished run is shown again
    printed, table = capsys.readouterr().out, (run / "report" / "table.txt").read_text()
    assert printed == table
    for stage in FINALS:
        top1 = read(run / "evaluation" / stage / "last.json")["members"]["ensemble"]["top1"]
        assert row(table, f"{stage} ")[0] == percent(top1["all"])
        assert f"== {stage} ==" in table
    choice = read(run / "evaluation" / "tau_norm" / "last.json")["fitted"]["choices"][0]
    assert f"tau_norm: head.gamma = {choice['value']:g}, chosen on val; published: 0.7" in table

    pictures = {path.relative_to(run / "report").as_posix() for path in (run / "report").rglob("*.png")}
    own = {f"{stage}/per_class.png" for stage in FINALS}
    assert own | {"curves.png", "class_counts.png", "finals.png", "tried.png"} <= pictures


def test_a_final_stage_measured_again_gives_the_numbers_of_training(run, capsys):
    assert main(["evaluate", str(run)]) == 0
    text = capsys.readouterr().out
    for stage in FINALS:
        for place, which in enumerate(("last", "best")):
            found = read(run / "evaluation" / stage / f"again-{which}-test.json")
            trained = read(run / "evaluation" / stage / f"{which}.json")
            assert found["members"]["ensemble"]["per_class"] == trained["members"]["ensemble"]["per_class"]
            assert row(text, f"{stage} ")[place] == percent(trained["members"]["ensemble"]["top1"]["all"])
    assert "tau_norm: head.gamma = " in text

    assert main(["evaluate", str(run), "--stage", "crt", "--model", "last"]) == 0
    text = capsys.readouterr().out
    assert "last: stage crt" in text and "best: " not in text and "== " not in text
    assert main(["evaluate", str(run), "--stage", "crt", "--distribution", "backward-10"]) == 0
    assert "run run, stage crt, model best" in capsys.readouterr().out
    assert (run / "evaluation" / "crt" / "uniform.json").exists()
    assert (run / "report" / "crt" / "uniform.png").exists()
    assert main(["regions", str(run), "--stage", "crt"]) == 0
    assert "after, stage crt" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "regions"])
@pytest.mark.parametrize(
    ("stage", "words"),
    [("ctr", "no such stage; did you mean crt?"), ("train", "others begin with it"), ("nothing", "no such stage; ne")],
)
def test_a_stage_that_is_not_final_is_refused_with_those_that_are(command, stage, words, run, capsys):
    assert main([command, str(run), "--stage", stage]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"expertail: --stage {stage}: {words}")
    assert "needed a final stage of the run: ncm, tau_norm, crt" in said and len(said.splitlines()) == 1


def test_mlflow_has_every_final_stage_under_names_of_its_own(run):
    import mlflow

    uri = f"sqlite:///{run.parent / 'mlflow.db'}"
    assert main(["sync", str(run), "--uri", uri]) == 0
    client = mlflow.MlflowClient(uri, uri)
    (found,) = client.search_runs([client.get_experiment_by_name("expertail").experiment_id])
    for stage in FINALS:
        top1 = read(run / "evaluation" / stage / "last.json")["members"]["ensemble"]["top1"]
        assert found.data.metrics[f"{stage}/test/ensemble/all/top1"] == top1["all"]
        assert found.data.metrics[f"finals/{stage}/few"] == pytest.approx(100 * top1["few"], abs=1e-3)
    assert found.data.metrics["final/few"] == found.data.metrics[f"finals/{FINALS[-1]}/few"]
    choice = read(run / "evaluation" / "tau_norm" / "last.json")["fitted"]["choices"][0]
    assert found.data.params["fitted.tau_norm.head.gamma"] == f"{choice['value']:g}"
    assert found.data.params["fitted.tau_norm.head.gamma.chosen_on"] == "val"

    (model,) = client.search_registered_models()
    assert model.name == "expertail-digits_lt"
    assert dict(model.aliases) == {}
    labels = [version.tags["model"] for version in client.search_model_versions(f"name = '{model.name}'")]
    named = [label.split(", ") for label in labels]
    wanted = {"last", "best", *(f"{stage}-{which}" for stage in FINALS for which in ("last", "best"))}
    assert {one for names in named for one in names} == wanted
    assert any({"last", "crt-last"} <= set(names) for names in named), "the run's own model is that of its last stage"
    assert any({"ncm-last", "ncm-best"} <= set(names) for names in named), "a stage without steps has one"
    assert sum("-last" in label for label in labels) == 3
    assert main(["promote", str(run), "--stage", "ncm", "--alias", "champion", "--uri", uri]) == 0
    champion = client.get_model_version_by_alias(model.name, "champion")
    assert champion.tags["model"] == "ncm-last, ncm-best"

    files = {file.path for file in client.list_artifacts(found.info.run_id, "report")}
    assert {"report/table.txt", "report/finals.png", "report/tried.png", "report/ncm"} <= files
    table = client.load_table(found.info.experiment_id, "per_class.json", [found.info.run_id])
    assert {f"{stage}/{which}/ensemble" for stage in FINALS for which in ("last", "best")} <= set(table.columns)
