"""Values varied across tables stand in one table and one picture, each row with the sizes of its own data."""

from __future__ import annotations

import json

import numpy as np
import pytest

from orchestration.reports.blocks import across_block, blocks
from orchestration.reports.report import make_report
from orchestration.reports.sources import read_sources
from orchestration.reports.write import write_report
from tests.finished_runs import COUNTS, finish

ACCURACY = (1.0, 0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.2, 0.1, 0.0)
RATIO = "dataset.imbalance_ratio"


def study_of(folder, points, **content):
    """Write study.json of runs by name, with their labels."""
    records = [{"run": run, "label": label, "status": "finished"} for run, label in points.items()]
    (folder / "study.json").write_text(json.dumps({"name": "x", "points": records, "axes": {}, **content}))
    return make_report(read_sources([str(folder)]), pytest.fail)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two recipes at two ratios: 9 and 1 classes are many- and medium-shot at 20; 3, 4, 3 at 50, with few-shot ones."""
    folder, points = tmp_path_factory.mktemp("swept"), {}
    for ratio, counts in (("20", (150,) * 9 + (25,)), ("50", COUNTS)):
        for method in ("ce", "ride"):
            for seed, by in enumerate((0.0, 0.05, 0.1) if method == "ce" else (0.0,)):
                run = f"{method}-ratio{ratio}-s{seed}"
                accuracy = np.clip(np.array(ACCURACY) + by, 0, 1)
                words = (f"method={method}", f"seed={seed}", f"{RATIO}={ratio}")
                finish(folder / run, *words, accuracy=accuracy, counts=counts, digest=ratio * 32)
                points[run] = {"method": method, RATIO: ratio}
    axes = {"method": ["ce", "ride"], RATIO: ["50", "20"]}
    return folder, study_of(folder, points, axes=axes, seeds=[0, 1, 2])


def test_each_row_of_a_sweep_over_a_ratio_has_the_sizes_of_its_own_groups(swept):
    """Few-shot at 50: 0.3 / 3 and 5 points more by seed, clipped nowhere, so 15.0 ± 5.0; none at 20."""
    _, report = swept
    (one,) = report.across
    block = across_block(report, one)
    assert block.headings == ("recipe", "imbalance_ratio", "n", "all", "many", "medium", "few")
    ce = [[cell.text for cell in row] for row in block.rows if row[0].text == "ce"]
    assert [row[:3] for row in ce] == [["ce", "20", "3"], ["ce", "50", "3"]], "in the order of numbers"
    assert [row[4].partition(" [")[2] for row in ce] == ["9]", "3]"]
    assert ce[0][6] == "n/a [0]" and ce[1][6] == "15.0 ± 5.0 [3]"
    ride = [[cell.text for cell in row] for row in block.rows if row[0].text == "ride"]
    assert ride[1][2] == "1" and ride[1][6] == "10.0 [3]", "one seed has no spread, three have"
    assert len(report.sections) == 2, "rows of different data are still not compared"


@pytest.mark.slow
def test_a_sweep_over_a_ratio_is_drawn_and_in_every_file(swept, tmp_path):
    folder, _ = swept
    said = []
    written = write_report([str(folder)], said.append, out=str(tmp_path)).folder
    assert (written / "across_dataset_imbalance_ratio-0.png").stat().st_size > 10_000
    assert not any("against a number" in line for line in said)
    for name in ("report.md", "index.html", "report.tex"):
        text = (written / name).read_text()
        assert "Accuracy over imbalance" in text and "[9]" in text
    assert "across_dataset_imbalance_ratio-0.png" in (written / "report.md").read_text()
    rows = json.loads((written / "report.json").read_text())["tables"][0]["rows"]
    assert rows[0]["parts"] == {"method": "ce", RATIO: "20"}


def test_a_sweep_over_a_length_of_training_is_one_table_too(tmp_path):
    key, points = "method.stages.train.epochs", {}
    for epochs in ("20", "5"):
        finish(tmp_path / f"ce-epochs{epochs}-s0", "method=ce", f"{key}={epochs}", accuracy=ACCURACY)
        points[f"ce-epochs{epochs}-s0"] = {key: epochs}
    report = study_of(tmp_path, points, axes={key: ["20", "5"]})
    (one,) = report.across
    assert [(name, [member.value for member in members]) for name, members in one.families.items()] == [
        ("ce", ["5", "20"])
    ]


def test_losses_with_several_final_stages_are_a_table_of_losses_by_classifiers(tmp_path):
    """As the survey's Table 7: few-shot is 0.3 / 3 with one classifier, 0.6 / 3 with the other."""
    points, better = {}, (*ACCURACY[:-3], 0.3, 0.2, 0.1)
    for method in ("ce", "ldam"):
        for seed in (0, 1):
            run = f"{method}-s{seed}"
            finals = {"joint": ACCURACY, "ncm": better}
            finish(tmp_path / run, f"method={method}", "then=[joint,ncm]", f"seed={seed}", accuracy=finals)
            points[run] = {"method": method}
    report = study_of(tmp_path, points, axes={"method": ["ce", "ldam"]})
    block = next(block for block in blocks(report, report.sections[0]) if block.name == "classifiers")
    few = [place for place, heading in enumerate(block.headings) if ": few" in heading]
    assert [block.headings[place].partition(":")[0] for place in few] == ["joint", "ncm"]
    cells = {row[0].text: [row[place].text for place in few] for row in block.rows}
    assert cells == {loss: ["10.0 ± 0.0", "20.0 ± 0.0"] for loss in ("ce", "ldam")}
