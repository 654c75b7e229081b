"""A report says what the run folders hold, keeps apart what may not be compared, and names what it cannot show."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest

from orchestration.cli import main
from orchestration.reports.compare import compare_two
from orchestration.reports.records import LeftOut, read_run, unfinished_lines
from orchestration.reports.report import make_report
from orchestration.reports.rows import tables
from orchestration.reports.sources import read_sources
from orchestration.reports.write import FILES, write_report
from tests.finished_runs import COUNTS, finish

CE = (1.0, 0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.2, 0.1, 0.0)
RIDE = (0.9, 0.9, 0.9, 0.8, 0.8, 0.7, 0.7, 0.5, 0.4, 0.3)


def nothing(text):
    raise AssertionError(text)


def shifted(accuracy, by):
    return tuple(np.clip(np.array(accuracy) + by, 0, 1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Cross-entropy over three seeds, RIDE over two of them, and one run on other data."""
    folder = tmp_path_factory.mktemp("night")
    for seed, by in enumerate((0.0, 0.05, -0.05)):
        finish(folder / f"ce-s{seed}", "method=ce", f"seed={seed}", accuracy=shifted(CE, by))
    for seed, by in enumerate((0.0, 0.05)):
        finish(folder / f"ride-s{seed}", "method=ride", f"seed={seed}", accuracy=shifted(RIDE, by))
    other = (90, *COUNTS[1:])
    finish(folder / "other-s0", "method=ce", "seed=0", accuracy=CE, counts=other, digest="d2" * 32)
    return folder


@pytest.fixture(scope="module")
def report(runs):
    return make_report(read_sources([str(runs)]), nothing)


def copied(runs, tmp_path, *names):
    for name in names:
        shutil.copytree(runs / name, tmp_path / name)
    return tmp_path


def test_rows_are_means_over_seeds_and_say_which_seed_is_missing(report):
    """RIDE has seeds 0 and 1: few-shot 0.40 and 0.45, so 42.5 and a standard deviation of 0.05 / sqrt(2)."""
    table = report.sections[0].table
    assert [(row.label, row.seeds) for row in table.rows] == [("ce", (0, 1, 2)), ("ride", (0, 1))]
    mean, sd = table.row("ride").spread("few")
    assert (mean, sd) == pytest.approx((0.425, 0.05 / 2**0.5))
    assert table.row("ce").spread("worst")[0] == pytest.approx(0.05 / 3)


def test_runs_on_other_data_have_a_table_of_their_own_and_it_is_said_why(report):
    assert [len(section.table.rows) for section in report.sections] == [2, 1]
    first, second = (f"{section.table.data.line} {section.table.data.digest[:8]}" for section in report.sections)
    assert f"their runs differ in data ({first}; {second})" in report.remarks[0]
    assert "612 training images" in first and "d2d2d2d2" in second
    assert report.sections[1].comparison is None


def test_differences_are_paired_by_the_seeds_that_both_have(report):
    """RIDE gains 30 points in few-shot with seed 0, and 45 - 15 = 30 with seed 1: that tells no spread."""
    one = report.sections[0].difference("ride", "few")
    assert (one.seeds, one.mean) == (2, pytest.approx(0.3))
    assert one.over_seeds is None
    assert one.over_images.low < 0.3 < one.over_images.high
    assert one.words == "not told apart by 2 seeds"


def test_the_first_is_told_apart_from_the_second_by_the_same_two_intervals_as_from_the_baseline(runs, tmp_path):
    """One test image more of one class, in each seed: the seeds agree to the digit, other images would not."""
    folder = copied(runs, tmp_path, "ce-s0", "ce-s1", "ce-s2")
    for seed, by in enumerate((0.0, 0.05, -0.05)):
        more = shifted((*CE[:8], CE[8] + 0.05, CE[9]), by)
        finish(folder / f"more-s{seed}", "method=ce", f"seed={seed}", "method.stages.train.optimizer.lr=0.9",
               accuracy=more)  # fmt: skip
    (section,) = make_report(read_sources([str(folder)]), nothing).sections
    words = "not told apart by the test images"
    assert section.difference("ce lr=0.9", "few").words == words
    few = section.answers[0]
    assert few.startswith("Best on few-shot classes: ce lr=0.9")
    assert few.count(words) == 1, "what is said of the baseline is not said again of the second"
    apart = compare_two(section.table, *reversed(section.table.rows), "few")
    assert apart == section.difference("ce lr=0.9", "few")


def test_a_second_baseline_turns_the_signs(runs):
    section = make_report(read_sources([str(runs)]), nothing, "ride").sections[0]
    assert section.difference("ce", "few").mean == pytest.approx(-0.3)


def test_costs_are_counted_for_the_data_of_the_run(report):
    """The training of one run on both sets differs by the images: 612 and 552, in whole numbers of draws."""
    of_first, of_second = (section.costs["ce"] for section in report.sections)
    assert of_first.parameters == of_second.parameters > 10_000
    assert of_second.training / of_first.training == pytest.approx((sum(COUNTS) - 60) / sum(COUNTS))
    assert report.sections[0].costs["ride"].inference > of_first.inference


def test_a_run_costs_what_the_run_costs_too_that_it_begins_with_where_the_report_has_it(runs, tmp_path):
    folder = copied(runs, tmp_path, "ce-s0", "ce-s1")
    for seed in (0, 1):
        before = f"method.stages.train.start_from.run=sibling:ce-s{seed}"
        finish(folder / f"longer-s{seed}", "method=ce", before, f"seed={seed}", accuracy=RIDE)
    (section,) = make_report(read_sources([str(folder)]), nothing).sections
    assert [row.seeds for row in section.table.rows] == [(0, 1), (0, 1)]
    first, longer = (section.costs[row.label] for row in section.table.rows)
    assert longer.training == 2 * first.training and longer.inference == first.inference
    assert "points to ce (ce) for 2 times its training:" in section.answers[0]
    alone = [str(folder / "longer-s0"), str(folder / "longer-s1")]
    (lonely,) = make_report(read_sources(alone), nothing).sections
    assert next(iter(lonely.costs.values())).training == first.training


def test_a_row_is_known_by_the_keys_that_differ(runs, tmp_path):
    folder = copied(runs, tmp_path, "ce-s0")
    finish(folder / "long-s0", "method=ce", "seed=0", "method.stages.train.optimizer.lr=0.9", accuracy=CE)
    (section,) = make_report(read_sources([str(folder)]), nothing).sections
    assert [row.label for row in section.table.rows] == ["ce lr=0.1", "ce lr=0.9"]
    assert section.difference("ce lr=0.9", "all").words == "one seed: no interval"
    assert section.difference("ce lr=0.9", "all").over_seeds is None


def test_another_length_of_training_is_not_compared(runs, tmp_path):
    folder = copied(runs, tmp_path, "ce-s0")
    finish(folder / "long-s0", "method=ce", "seed=0", "method.stages.train.epochs=77", accuracy=CE)
    report = make_report(read_sources([str(folder)]), nothing)
    assert len(report.sections) == 2
    assert "epochs (" in report.remarks[0]


def test_final_stages_have_rows_of_their_own(tmp_path):
    """The ends of four seeds of one recipe: the plain network, and the one with another classifier."""
    words = ("method=ce", "then=[joint,ncm]", "seed=0")
    finish(tmp_path / "both-s0", *words, accuracy={"joint": CE, "ncm": RIDE})
    (section,) = make_report(read_sources([str(tmp_path)]), nothing).sections
    assert [row.label for row in section.table.rows] == ["ce+joint", "ce+ncm"]
    assert section.difference("ce+ncm", "few").mean == pytest.approx(0.3)


def test_the_same_run_under_two_names_counts_once(runs, tmp_path):
    folder = copied(runs, tmp_path, "ce-s0")
    shutil.copytree(folder / "ce-s0", folder / "twice")
    report = make_report(read_sources([str(folder)]), nothing)
    assert report.sections[0].table.rows[0].seeds == (0,)
    assert [one.run for one in report.left_out] == ["twice"]
    assert "the same recipe, data and seed as" in report.left_out[0].why


def test_relative_accuracy_is_of_the_better_reference(runs, tmp_path):
    """A_v 0.6, A_b 0.8: A_u = 0.8, and A_r = A_t / 0.8. The balanced set has 61 images of every class, 612 / 10."""
    folder = copied(runs, tmp_path, "ce-s0", "ce-s1", "ride-s0", "ride-s1")
    for seed in (0, 1):
        for name, accuracy in (("ce", 0.6), ("ride", 0.8)):
            words = (f"method={name}", f"seed={seed}", "dataset.balanced=true")
            finish(
                folder / f"{name}-even-s{seed}", *words, accuracy=[accuracy] * 10, counts=[61] * 10, digest="b0" * 32
            )
    (section,) = make_report(read_sources([str(folder)]), nothing).sections
    found = section.relative["ride"]
    assert found.vanilla == pytest.approx((0.6, 0.0))
    assert found.upper == found.own == pytest.approx((0.8, 0.0))
    ours = section.table.row("ride").values("all")
    assert found.relative == pytest.approx((np.mean([v / 0.8 for v in ours.values()]),
                                            np.std([v / 0.8 for v in ours.values()], ddof=1)))  # fmt: skip
    assert section.relative["ce"].upper == pytest.approx((0.6, 0.0))


def test_a_published_number_stands_beside_rows_that_meet_its_conditions_alone(tmp_path):
    """ACE's 49.4 on CIFAR-100-LT is for 200 epochs of batches of 128."""
    data = {"base": ("dataset=cifar100_lt", "tracking.enabled=false"), "accuracy": [0.5] * 100, "counts": [50] * 100}
    finish(tmp_path / "ace-s0", "method=ace", **data, images=2)
    finish(tmp_path / "large-s0", "method=ace", "method.stages.train.batch_size=256", **data, images=2)
    found = write_report([str(tmp_path)], print, pictures=False)
    (section,) = found.report.sections
    assert {label: one.values for label, one in section.published.items()} == {"ace batch_size=128": {"all": 49.4}}
    rows = (found.folder / "report.md").read_text().splitlines()
    assert any(row.startswith("| `ace batch_size=128` |") and "| 49.4 | +0.6 |" in row for row in rows)
    assert not any(row.startswith("| `ace batch_size=256` |") and "49.4" in row for row in rows)


def test_a_diverged_model_has_no_loss_and_costs_nothing_else(runs, tmp_path):
    folder = copied(runs, tmp_path, "ce-s0")
    path = folder / "ce-s0" / "evaluation" / "last.json"
    path.write_text(path.read_text().replace('"nll": 1.5', '"nll": Infinity'))
    found = write_report([str(folder)], print, pictures=False)
    measures = json.loads((found.folder / "report.json").read_text())["tables"][0]["rows"][0]["measures"]
    assert measures["nll"] == {"mean": None, "sd": None, "by_seed": {}}
    assert measures["all"]["mean"] is not None


# What cannot be shown


def test_many_runs_of_one_state_are_one_line_that_counts_them():
    left_out = [LeftOut(f"ce-s{seed}", "waiting") for seed in range(5)] + [LeftOut("bad", "failed", "loss is NaN")]
    assert unfinished_lines(left_out) == ["5 waiting: ce-s0, ce-s1, ce-s2 and 2 more", "bad: failed: loss is NaN"]


def test_an_unfinished_run_is_listed_with_its_state(runs, tmp_path):
    folder = copied(runs, tmp_path, "ce-s0", "ce-s1")
    facts = json.loads((folder / "ce-s1" / "run.json").read_text())
    (folder / "ce-s1" / "run.json").write_text(json.dumps(facts | {"status": "failed", "problem": "loss is NaN"}))
    report = make_report(read_sources([str(folder)]), nothing)
    assert [(one.run, one.state, one.why) for one in report.left_out] == [("ce-s1", "failed", "loss is NaN")]


@pytest.mark.parametrize("content", ["{", '{"members": {}}', '{"members": {"ensemble": {"top1": {"all": 0.5}}}}'])
def test_a_damaged_evaluation_costs_that_run_alone(runs, tmp_path, content):
    folder = copied(runs, tmp_path, "ce-s0", "ce-s1")
    (folder / "ce-s1" / "evaluation" / "last.json").write_text(content)
    report = make_report(read_sources([str(folder)]), nothing)
    assert report.sections[0].table.rows[0].seeds == (0,)
    (one,) = report.left_out
    assert (one.run, one.state) == ("ce-s1", "damaged")
    assert str(folder / "ce-s1" / "evaluation" / "last.json") in one.why


def test_damaged_predictions_cost_the_bootstrap_alone(runs, tmp_path):
    folder = copied(runs, tmp_path, "ce-s0", "ride-s0")
    (folder / "ride-s0" / "evaluation" / "predictions-last-test.npz").write_bytes(b"no zip")
    report = make_report(read_sources([str(folder)]), nothing)
    assert report.sections[0].difference("ride", "few").over_images is None
    assert any("predictions-last-test.npz" in line for line in report.remarks)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nowhere"], "nowhere: nothing there"),
        (["empty"], "a folder without config.yaml, and without runs in it"),
        (["file"], "found a file; needed the folder of a run"),
        (["open"], "no finished run to report on; found 1 running"),
        (["night/ce-s0", "night/ride-s0", "--baseline", "rid"], "--baseline rid: no such row; needed one of: ce; ride"),
    ],
)
def test_what_cannot_be_reported_on_is_said_in_one_line(runs, tmp_path, capsys, monkeypatch, targets, message):
    copied(runs, tmp_path / "night", "ce-s0", "ride-s0")
    copied(runs, tmp_path / "open", "ce-s0")
    (tmp_path / "open" / "ce-s0" / "run.json").write_text('{"status": "running"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *targets]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_a_study_gives_labels_order_baseline_and_missing_rows(runs, tmp_path):
    copied(runs, tmp_path, "ce-s0", "ride-s0")
    point = {"seed": 0, "role": "run", "words": [], "problem": None, "attempts": 1}
    study = {
        "schema": 1, "name": "night", "seeds": [0, 1], "baseline": "method=ce mix=none",
        "missing": [{"label": "ABL", "why": "no public formula"}],
        "points": [
            {"run": "ride-s0", "label": {"method": "ride", "mix": "none"}, "status": "finished", **point},
            {"run": "ce-s0", "label": {"method": "ce", "mix": "none"}, "status": "finished", **point},
            {"run": "ce-s1", "label": {"method": "ce", "mix": "none"}, "status": "waiting", **point},
        ],
    }  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(study))
    found = write_report([str(tmp_path)], nothing, pictures=False)
    (section,) = found.report.sections
    assert [row.label for row in section.table.rows] == ["ride", "ce"]
    assert section.comparison.baseline == "ce"
    assert [(one.run, one.state) for one in found.report.left_out] == [("ce-s1", "waiting")]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "1 (no seed 1)" in text
    assert "missing: ABL: no public formula" in text


def test_a_study_says_which_model_is_shown_and_another_key_is_refused(runs, tmp_path):
    finish(tmp_path / "ce-s0", "method=ce", accuracy=CE, best=RIDE)
    study = {"name": "night", "report": {"model": "best"}, "points": [{"run": "ce-s0", "status": "finished"}]}
    (tmp_path / "study.json").write_text(json.dumps(study))
    found = write_report([str(tmp_path)], print, pictures=False)
    assert found.report.sections[0].table.rows[0].spread("few", found.report.which)[0] == pytest.approx(0.4)
    assert "best on TEST: optimistic" in (found.folder / "report.md").read_text()
    (tmp_path / "study.json").write_text(json.dumps(study | {"report": {"modle": "best"}}))
    with pytest.raises(ValueError, match=r"report\.modle: unknown key; known: model, tables, evaluate"):
        write_report([str(tmp_path)], print, pictures=False)


def test_a_study_whose_baseline_is_not_finished_is_shown_without_differences(runs, tmp_path):
    copied(runs, tmp_path, "ride-s0")
    study = {"baseline": "method=ce", "points": [{"run": "ride-s0", "label": {"method": "ride"}, "status": "finished"}]}
    (tmp_path / "study.json").write_text(json.dumps(study))
    report = write_report([str(tmp_path)], print, pictures=False).report
    assert report.sections[0].comparison is None
    assert report.remarks == ("table 1: the baseline method=ce is not in it, or not finished; no differences",)


# Files


def test_all_files_hold_the_same_numbers_and_the_same_runs_give_the_same_files(runs, tmp_path):
    first, second = (write_report([str(runs)], nothing, out=str(tmp_path / name), pictures=False) for name in "ab")
    for name in FILES:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    rows = json.loads((first.folder / "report.json").read_text())["tables"][0]["rows"]
    few = rows[1]["measures"]["few"]
    assert (rows[1]["label"], few["by_seed"]) == ("ride", pytest.approx({"0": 0.4, "1": 0.45}))
    with open(first.folder / "report.csv") as file:
        line = list(csv.DictReader(file))[1]
    assert float(line["few/mean"]) == 100 * few["mean"]
    assert float(line["few/images/low"]) < 30 < float(line["few/images/high"])
    for name in ("report.md", "report.tex", "index.html"):
        text = (first.folder / name).read_text()
        assert "42.5" in text
        assert "not told apart" in text or "real at 95" in text


def test_names_are_no_commands_in_any_file(runs, tmp_path):
    """A label, a class and a folder are whatever their owners wrote."""
    copied(runs, tmp_path, "ce-s0")
    label = r"a_b & 50% <b>|x| `y` \input{z}"
    study = {"name": label, "points": [{"run": "ce-s0", "label": {"recipe": label}, "status": "finished"}]}
    (tmp_path / "study.json").write_text(json.dumps(study))
    folder = write_report([str(tmp_path)], nothing, pictures=False).folder
    tex = (folder / "report.tex").read_text()
    assert r"a\_b \& 50\% $<$b$>$\textbar{}x\textbar{} `y` \textbackslash{}input\{z\}" in tex
    page = (folder / "index.html").read_text()
    assert "<b>" not in page
    assert "a_b &amp; 50% &lt;b&gt;|x|" in page
    rows = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == rows[0].count("|") for line in rows[:3])


def test_the_page_fetches_nothing(runs, tmp_path):
    folder = write_report([str(runs)], nothing, out=str(tmp_path), pictures=False).folder
    page = (folder / "index.html").read_text()
    assert not [word for word in ("http:", "https:", "<link", "@import", 'src="/', "url(") if word in page]


def test_final_stages_of_one_run_of_a_study_are_named_after_their_recipe(tmp_path):
    run = finish(tmp_path / "a-s0", "method=ce", "then=[crt,lws]", accuracy={"crt": CE, "lws": RIDE})
    records = read_run(run, {"method": "ce", "mix": "none", "then": "[crt,lws]"})
    (table,), _ = tables(records, {"method", "mix", "then"})
    assert [row.label for row in table.rows] == ["ce+crt", "ce+lws"]
