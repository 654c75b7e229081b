"""Evaluation of a saved run on other test distributions: learning, comparison, files, picture and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from aggregation.metrics import groups_by_count
from aggregation.serving import TrainingData, export_model, load_model
from aggregation.weight_learning import Learner, WeightLearning, class_prior
from experts.augmentation.stack import prepare_eval
from experts.augmentation.views import ViewMaker, Views, default_views
from experts.data.dataset import open_dataset
from experts.data.keyed_random import key, permutation
from experts.data.label_shift import distribution_positions, parse_distribution
from experts.ensemble import build_ensemble
from experts.methods.tade import tade_offsets
from orchestration.cli import main
from orchestration.commands.evaluate import reevaluate
from orchestration.config.compose import load_config
from orchestration.results.label_shift import KnownPrior, evaluate_distributions, trained_priors
from orchestration.results.label_shift_table import distributions_table, draw_distributions
from orchestration.storage.run_folder import RunFolder

WORDS = ["engine.threads=1", "dataset.image_size=8", "run.evaluation_batch_size=100", "dataset.test_per_class=50"]
NAMES = ("expert0", "expert1", "expert2")


def save_run(path, *words):
    """Make a run folder with a model whose experts were never trained: measuring runs the same code."""
    config = load_config([*WORDS, *words])
    dataset = open_dataset(config.dataset)
    ensemble = build_ensemble(config.ensemble(config.method.final, 10), seed=3)
    with torch.no_grad():
        for index, expert in enumerate(ensemble.experts.values()):  # else all give similar scores to 8 x 8 pixels
            for parameter in expert.parameters():
                parameter.mul_(1 + 0.5 * index)
    counts = dataset.counts_C.tolist()
    folder = RunFolder(path)
    folder.write_config(config)
    folder.write_data({
        "dataset": config.dataset.name, "class_names": list(dataset.class_names), "counts": counts,
        "total": sum(counts), "digest": dataset.digest, "image_shape": dataset.raw_image_shape,
        "groups": {"by_count": {name: ids.tolist() for name, ids in groups_by_count(counts).items()}},
    })  # fmt: skip
    data = TrainingData(
        dataset=config.dataset,
        class_names=dataset.class_names,
        counts=counts,
        image_shape=dataset.raw_image_shape,
    )
    for which in ("best", "last"):
        target = path / "export" / which
        export_model(
            target, ensemble.state_dict(), config.ensemble(config.method.final, 10), config.method.aggregator, data
        )
    folder.close()
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    return save_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """Skip drawing, which takes a second; a test that needs the picture asks for `picture`."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr("orchestration.results.label_shift.draw_distributions", lambda *_: "not drawn")


@pytest.fixture
def picture():
    """Draw the picture."""


def evaluate(run, weights="test-time", distributions="backward-10", *words, which="best"):
    text = evaluate_distributions(str(run), weights, distributions, which, "test", list(words))
    name = weights if weights in ("uniform", "test-time", "known-prior") else "given"
    suffix = "" if which == "best" else f"-{which}-test"
    return text, json.loads((run / "evaluation" / f"{name}{suffix}.json").read_text())


def top1(found, member, group="all"):
    return found["members"][member]["top1"][group]


def logits_of(run, name):
    """Compute the logits [E, N, C] and labels of a distribution without the code under test."""
    dataset = open_dataset(load_config(WORDS).dataset)
    positions = distribution_positions(parse_distribution(name), dataset.test.labels, dataset.counts_C)
    model = load_model(run / "export" / "best")
    with torch.no_grad():
        logits = model.ensemble(prepare_eval(dataset.test.take(positions), dataset.config))
    return logits, torch.from_numpy(dataset.test.labels[positions]), positions, dataset


def test_the_weights_are_those_of_the_published_loop(run):
    """The control: two views per image, keyed by its place in the test set, shuffled batches, one learner."""
    _, result = evaluate(run, "test-time", "backward-10", "test_time.epochs=3", "test_time.batch_size=64")
    _, _, positions, dataset = logits_of(run, "backward-10")
    model = load_model(run / "export" / "best")
    maker = ViewMaker(dataset.test, dataset.config, Views(**default_views(dataset.config)), seed=0)
    learner = Learner(3, WeightLearning(epochs=3, batch_size=64))
    for number in (1, 2, 3):
        order = permutation(key(0, "test-time order", "backward-10", number), len(positions))
        for rows in torch.from_numpy(positions[order]).split(64):
            with torch.no_grad():
                views = torch.stack([model.ensemble(maker.make(rows.numpy(), number, view)) for view in range(2)])
            learner.step(views)
        learner.end_pass()
    learning = result["distributions"]["backward-10"]["learning"]
    np.testing.assert_allclose(learning["trajectory"], learner.trajectory, atol=1e-6)
    np.testing.assert_allclose(learning["learnt"], learner.weights_E, atol=1e-6)
    assert np.abs(np.array(learning["learnt"]) - 1 / 3).max() > 1e-3
    assert learning["passes"] == 3


def test_a_distribution_gets_the_same_weights_alone_and_among_others(run):
    _, alone = evaluate(run, "test-time", "backward-10", "test_time.epochs=2")
    _, among = evaluate(run, "test-time", "forward-5,uniform,backward-10", "test_time.epochs=2")
    assert list(among["distributions"]) == ["forward-5", "uniform", "backward-10"]
    found = [result["distributions"]["backward-10"]["learning"]["learnt"] for result in (alone, among)]
    np.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.slow
def test_the_same_command_gives_the_same_file_and_another_seed_other_weights(run):
    _, first = evaluate(run, "test-time", "forward-5", "test_time.epochs=2")
    _, second = evaluate(run, "test-time", "forward-5", "test_time.epochs=2")
    _, other = evaluate(run, "test-time", "forward-5", "test_time.epochs=2", "test_time.seed=1")
    assert first == second
    learnt = [result["distributions"]["forward-5"]["learning"]["learnt"] for result in (first, other)]
    assert learnt[0] != learnt[1]


@pytest.mark.slow
def test_members_weights_and_bounds_of_every_distribution(run, picture):
    text, result = evaluate(run, "test-time", "published", "test_time.epochs=1")
    assert len(result["distributions"]) == 11
    for name, found in result["distributions"].items():
        rules = ["as trained", "uniform", "test-time", "known prior", "oracle"]
        assert list(found["members"]) == [*rules, *(f"{name} alone" for name in NAMES)]
        for rule in ("uniform", "test-time", "oracle"):
            assert sum(found["weights"][rule]) == pytest.approx(1, abs=1e-9)
            assert min(found["weights"][rule]) >= 0
            assert top1(found, "oracle") >= top1(found, rule)
        learning = found["learning"]
        expected = [1 / 3] * 3 if learning["fallback"] else learning["learnt"]
        assert found["weights"]["test-time"] == expected
        assert bool(learning["fallback"]) == (learning["loss_learnt"] > learning["loss_uniform"])
        assert sum(found["test_counts"]) == found["num_images"]
        assert name in text
    assert result["distributions"]["uniform"]["num_images"] == 500
    assert result["distributions"]["forward-10"]["test_counts"] == [50, 38, 29, 23, 17, 13, 10, 8, 6, 5]
    assert result["distributions"]["backward-10"]["test_counts"] == [5, 6, 8, 10, 13, 17, 23, 29, 38, 50]
    assert "warning: 10 classes" in text
    assert (run / "report" / "test_time.png").read_bytes().startswith(b"\x89PNG")
    assert str(run / "evaluation" / "test-time.json") in text


def test_on_the_whole_test_set_the_recipes_rule_gives_what_measuring_again_gives(run):
    _, result = evaluate(run, "uniform", "uniform")
    reevaluate(str(run), "best", "test", [])
    again = json.loads((run / "evaluation" / "again-best-test.json").read_text())
    found = result["distributions"]["uniform"]
    for ours, theirs in (("as trained", "ensemble"), *((f"{name} alone", name) for name in NAMES)):
        assert found["members"][ours]["top1"] == again["members"][theirs]["top1"]
        assert found["members"][ours]["nll"] == pytest.approx(again["members"][theirs]["nll"], abs=1e-6)
    assert "learning" not in found
    assert result["settings"] is None


def test_given_weights_are_used_as_they_are(run):
    _, result = evaluate(run, "0.7,0.1,0.2", "forward-5", which="last")
    logits, labels, _, _ = logits_of(run, "forward-5")
    mixed = 0.7 * logits[0] + 0.1 * logits[1] + 0.2 * logits[2]
    found = result["distributions"]["forward-5"]
    assert top1(found, "given") == pytest.approx((mixed.argmax(1) == labels).float().mean().item())
    assert found["weights"]["given"] == [0.7, 0.1, 0.2]


@pytest.mark.parametrize("trained", ["uniform", "train"])
def test_a_known_prior_shifts_the_mean_of_the_logits(trained, run):
    _, result = evaluate(run, "known-prior", "backward-10", f"known_prior.trained={trained}")
    logits, labels, _, dataset = logits_of(run, "backward-10")
    shift = np.log(class_prior(np.bincount(labels)))
    if trained == "train":
        shift = shift - np.log(class_prior(dataset.counts_C))
    expected = (logits.mean(0).double() + torch.from_numpy(shift)).argmax(1)
    found = result["distributions"]["backward-10"]
    assert top1(found, "known prior") == pytest.approx((expected == labels).double().mean().item())
    assert result["trained_for"] == [trained] * 3


@pytest.mark.slow
def test_ratios_that_leave_a_class_empty_are_refused_by_name_and_left_out_of_the_published(tmp_path):
    path = save_run(tmp_path / "run", "dataset.test_per_class=10")
    with pytest.raises(ValueError, match=r"forward-25: class 7 and 2 more .*at most 10"):
        evaluate(path, "uniform", "forward-25")
    text, result = evaluate(path, "uniform", "published")
    assert next(iter(result["distributions"])) == "forward-10"
    assert list(result["skipped"]) == ["forward-50", "forward-25", "backward-25", "backward-50"]
    assert "backward-50: n/a, class 0 and 3 more would have no test image" in text
    with pytest.raises(ValueError, match="forward-50: class 6 and 3 more"):
        evaluate(path, "uniform", "published,forward-50")


def test_one_expert_is_measured_like_any_other_number(tmp_path):
    path = save_run(tmp_path / "run", "method=ce")
    text, result = evaluate(path, "test-time", "backward-5,uniform", "test_time.epochs=1")
    found = result["distributions"]["backward-5"]
    assert found["weights"] == {"uniform": [1.0], "test-time": [1.0], "oracle": [1.0]}
    assert result["trained_for"] == ["train"]
    assert "warning: 1 expert" in text


def test_scores_that_only_rank_are_corrected_for_no_prior(tmp_path):
    path = save_run(tmp_path / "run", "method=focal", "method.stages.train.objective.form=sigmoid")
    with pytest.raises(
        ValueError, match=r"--weights known-prior: .*its scores only rank; .*known_prior\.trained=train"
    ):
        evaluate(path, "known-prior", "uniform")
    text, result = evaluate(path, "uniform", "uniform")
    assert result["trained_for"] == []
    assert "known prior" not in result["distributions"]["uniform"]["members"]
    assert "known prior: n/a" in text


@pytest.mark.parametrize("precision", ["float64", "autocast"])
@pytest.mark.slow
def test_other_precisions(precision, tmp_path):
    path = save_run(tmp_path / "run", f"engine.precision={precision}")
    _, result = evaluate(path, "test-time", "backward-10", "test_time.epochs=1")
    assert result["distributions"]["backward-10"]["members"].keys() >= {"test-time", "oracle"}


@pytest.mark.parametrize(
    ("weights", "distributions", "words", "message"),
    [
        ("0.5,0.5", "uniform", [], r"--weights 0.5,0.5: 2 numbers; the run has 3 experts, expert0, expert1, expert2"),
        ("0.5,0.5,0.5", "uniform", [], r"found a sum of 1.5; needed numbers of 0 or more that sum to 1"),
        ("-0.5,0.5,1", "uniform", [], "0 or more"),
        ("nan,0.5,0.5", "uniform", [], "0 or more"),
        ("tset-time", "uniform", [], "did you mean test-time"),
        ("uniform", "uniform,", [], "--distribution : needed uniform"),
        ("uniform", "bckward-5", [], "did you mean backward-5"),
        ("test-time", "uniform", ["test_time.lr=-1"], r"test_time\.lr = -1: Input should be greater than 0"),
        (
            "test-time",
            "uniform",
            ["test_time.epoch=1"],
            r"test_time\.epoch: unknown key; did you mean test_time\.epochs",
        ),
        ("test-time", "uniform", ["views.blur=2"], r"views\.blur = 2"),
        ("test-time", "uniform", ["views.random_resized_crop=[0.2,1]"], "set crop_padding=0"),
        ("uniform", "uniform", ["known_prior.trained=[train]"], "1 words; needed one, or one for each of 3"),
        ("uniform", "uniform", ["known_prior.trained=x"], r"known_prior\.trained"),
        ("uniform", "uniform", ["seed=1"], "cannot be changed for a trained run"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(weights, distributions, words, message, run):
    with pytest.raises(ValueError, match=message):
        evaluate_distributions(str(run), weights, distributions, "best", "test", words)


@pytest.mark.slow
def test_results_that_cannot_be_written_are_still_shown(run, monkeypatch, picture):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("orchestration.results.saved_run.write_json", refuse)
    monkeypatch.setattr("orchestration.results.style.os.replace", refuse)
    text = evaluate_distributions(str(run), "known-prior", "uniform", "best", "test", [])
    assert "known prior" in text
    assert "known-prior.json cannot be written (Permission denied)" in text
    assert "report/known_prior.png was not drawn: PermissionError: [Errno 13] Permission denied" in text


def test_priors_that_experts_are_trained_for():
    counts = [100, 30, 10, 3]

    def auto(*words):
        config = load_config(["dataset.image_size=8", *words])
        return trained_priors(config, KnownPrior(), counts, config.method.final)

    log_train = np.log(np.array(counts) / 143)
    rows, words = auto("method=ride")
    assert words == ["uniform"] * 3
    assert (rows == 0).all()
    rows, words = auto("method=ce")
    assert words == ["train"]
    np.testing.assert_allclose(rows, [log_train])
    assert auto("method=ce", "method.stages.train.sampler={name:class_balanced}")[1] == ["uniform"]
    config = load_config(["dataset.image_size=8"])
    rows, words = trained_priors(config, KnownPrior(trained=("train", "uniform", "train")), counts, "train")
    np.testing.assert_allclose(rows, [log_train, 0 * log_train, log_train])


def without_steps(name, *more):
    """Make the words of a stage without steps that begins with stage train."""
    keys = ["epochs=0", "after=[train]", "start_from={stage:train}", *more]
    return [f"method.stages.{name}.{key}" for key in keys]


def test_a_stage_without_steps_keeps_the_prior_until_it_replaces_the_head(tmp_path):
    counts = [100, 30, 10, 3]
    host = ["method=ce", "dataset.image_size=8"]
    tau = without_steps("tau", "head={name:tau_normalised,gamma:null}")
    config = load_config([*host, *without_steps("joint"), *tau])
    assert config.method.finals == ("joint", "tau")
    assert trained_priors(config, KnownPrior(), counts, "joint")[1] == ["train"]
    assert trained_priors(config, KnownPrior(), counts, "tau")[1] == ["uniform"]

    folder = RunFolder(tmp_path / "host")  # the same stages on another run
    folder.write_config(load_config(host))
    folder.close()
    other = config.model_copy(deep=True)
    for name in ("joint", "tau"):
        elsewhere = other.method.stages[name].start_from.model_copy(update={"stage": None, "run": str(folder.path)})
        stage = other.method.stages[name].model_copy(update={"start_from": elsewhere})
        other.method.stages[name] = stage
    assert trained_priors(other, KnownPrior(), counts, "joint")[1] == ["train"]
    assert trained_priors(other, KnownPrior(), counts, "tau")[1] == ["uniform"]
    (folder.path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"host, whose config\.yaml is gone; .*set known_prior\.trained=train"):
        trained_priors(other, KnownPrior(), counts, "joint")


def test_tades_experts_are_trained_for_forward_uniform_and_inverse():
    """Expert k learns z + offset to be log p(y | x) of training: z alone is for the training prior less the offset.
    The third, with tau 1, is for the reversed counts, up to a constant."""

    keys = ["objective.tau=1.0", "objective.log_guard=0.0"]
    config = load_config(["method=tade", "dataset.image_size=8", *(f"method.stages.train.{key}" for key in keys)])
    counts = [100, 30, 10, 3]
    rows, words = trained_priors(config, KnownPrior(), counts, "train")
    prior = np.array(counts) / 143
    np.testing.assert_allclose(rows[0], np.log(prior))
    np.testing.assert_allclose(rows[1], 0, atol=1e-12)
    np.testing.assert_allclose(rows[2], np.log(prior[::-1]))
    assert words == ["train", "uniform", "inverse (tau 1)"]
    assert tade_offsets(torch.tensor(counts), tau=1.0).shape == rows.shape


@pytest.mark.slow
def test_the_command_line(run, capsys):
    line = ["evaluate", str(run), "--weights", "test-time", "--distribution", "backward-5", "test_time.epochs=1"]
    assert main(line) == 0
    output = capsys.readouterr()
    assert "backward-5" in output.out
    assert "pass 1 of 1" in output.err
    assert main(["evaluate", str(run), "--weights", "last", "run.evaluation_batch_size=50"]) == 0
    assert "again-last-test" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--model", "last", "--distribution", "forward-2"]) == 0
    assert "uniform-last-test.json" in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "again-last-test" in printed and "again-best-test" in printed
    assert main(["evaluate", str(run), "--weights", "last", "--model", "best"]) == 1
    assert "two models" in capsys.readouterr().err
    for words in (["evaluate", str(run), "--wieghts", "x"], ["sync", str(run), "a=b"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "unrecognized arguments" in capsys.readouterr().err


def synthetic(**changes):
    members = {
        rule: {"top1": {"all": 0.5, "many": 0.75, "medium": None, "few": 0.25}}
        for rule in ("as trained", "uniform", "test-time", "known prior", "oracle")
    }
    learning = {"warnings": ["careful"], "fallback": "worse", "stopped_early": True, "passes": 2}
    found = {
        "num_images": 1234, "members": members, "test_counts": [3, 0], "learning": learning,
        "weights": {"uniform": [0.5, 0.5], "test-time": [0.25, 0.75], "oracle": [1.0, 0.0]},
    }  # fmt: skip
    return {
        "method": "tade", "dataset": "toy", "run": "r", "weights": "best", "split": "test", "epoch": 3,
        "experts": ["a", "b"], "group_sizes": {"many": 1, "medium": 0, "few": 1}, "aggregator": "mean_logits",
        "settings": None, "views": None, "trained_for": ["train", "uniform"], "skipped": {"forward-50": "too few"},
        "distributions": {"forward-2": found, "backward-2": found},
    } | changes  # fmt: skip


def test_the_table_shows_missing_numbers_as_na_and_has_every_warning():
    text = distributions_table(synthetic())
    assert "medium [0]" in text
    row = next(line for line in text.splitlines() if "test-time" in line)
    assert row.split() == ["test-time", "0.25", "0.75", "50.00", "75.00", "n/a", "25.00"]
    assert "nan" not in text.lower()
    for line in (
        "forward-50: n/a, too few", "forward-2: worse", "backward-2: learning ended after pass 2, a weight",
        "forward-2: 1 class has no test image", "warning: careful",
    ):  # fmt: skip
        assert line in text
    assert text.count("careful") == 1
    assert "trained for: train, uniform" in text


def test_the_table_says_when_best_was_chosen_on_test():
    assert "chosen on TEST" in distributions_table(synthetic(selected_on="test"))
    assert "chosen on TEST" not in distributions_table(synthetic(selected_on="test", weights="last"))
    assert "test was not used" in distributions_table(synthetic(selected_on="val"))


def test_the_picture_leaves_out_missing_numbers(tmp_path):
    told = draw_distributions(tmp_path / "report" / "test_time.png", synthetic())
    assert told == f"drawn as {tmp_path / 'report' / 'test_time.png'}"
    assert (tmp_path / "report" / "test_time.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "report").iterdir()) == [tmp_path / "report" / "test_time.png"]
