"""Pictures are drawn where their data is there; labels never lie on each other."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from orchestration.reports.curve_plots import shifts_of
from orchestration.reports.pictures import varied_numbers
from orchestration.reports.plots import spread_out
from orchestration.reports.report import make_report
from orchestration.reports.sources import read_sources
from orchestration.reports.write import write_report
from orchestration.results.label_shift import file_name
from orchestration.storage.journal import Journal
from tests.finished_runs import finish

FEW_KNOWN = (1.0, 0.9, 0.9, 0.8, 0.7, 0.6, 0.5, 0.2, 0.1, 0.0)


@pytest.mark.parametrize("step", [0.02, 0.05])
def test_labels_keep_their_order_and_their_distance(step):
    wanted = np.random.default_rng(0).beta(0.3, 0.3, 20)  # most of them at both ends
    places = spread_out(wanted, step)
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(places[order]) >= step - 1e-9).all()
    assert places.min() >= -1e-9
    assert places.max() <= 1 + 1e-9


def test_labels_that_are_far_apart_stay_where_they_are():
    assert spread_out(np.array([0.9, 0.1, 0.5]), 0.05) == pytest.approx([0.9, 0.1, 0.5])


def test_two_labels_at_one_place_lie_around_it():
    assert spread_out(np.array([0.5, 0.5]), 0.1) == pytest.approx([0.45, 0.55])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """RIDE with two and three experts, measured on other test distributions, and a reference."""
    folder = tmp_path_factory.mktemp("drawn")
    for experts in (2, 3):
        run = finish(folder / f"ride{experts}-s0", "method=ride", f"method.num_experts={experts}", accuracy=FEW_KNOWN)
        for number, (model, split) in enumerate(itertools.product(("last", "best"), ("test", "val"))):
            members = {rule: {"top1": {"all": 0.5 + number / 10}} for rule in ("uniform", "test-time", "oracle")}
            shifts = {name: {"members": members} for name in ("forward-50", "uniform", "backward-50")}
            content = {"weights": model, "split": split, "distributions": shifts}
            (run / "evaluation" / file_name("test-time", model, split)).write_text(json.dumps(content))
        journal = Journal(run)
        for epoch in (1, 2, 3):
            journal.append(
                "train", epoch, epoch, {"train/epoch_loss": 1 / epoch, "test/ensemble/all/top1": 0.2 * epoch}
            )
        journal.close()
    even = {"accuracy": [0.8] * 10, "counts": [61] * 10, "digest": "b0" * 32}
    finish(folder / "even-s0", "method=ce", "dataset.balanced=true", **even)
    return folder


def test_numbers_that_vary_in_a_recipe_are_found(runs):
    (section,) = make_report(read_sources([str(runs)]), pytest.fail).sections
    (families,) = varied_numbers(section).values()
    assert [(value, row.label) for value, row in families["ride"]] == [
        (2.0, "ride num_experts=2"),
        (3.0, "ride num_experts=3"),
    ]


@pytest.mark.parametrize(("which", "value"), [("last", 0.5), ("best", 0.7)])
def test_results_on_other_distributions_are_of_the_model_and_split_that_the_report_shows(runs, which, value):
    (section,) = make_report(read_sources([str(runs)]), pytest.fail).sections
    found = shifts_of(section.table.rows[0], which)
    assert found.keys() == {"uniform", "test-time", "oracle"}
    assert all(one == {"forward-50": [value], "uniform": [value], "backward-50": [value]} for one in found.values())


def test_every_picture_is_drawn_where_its_data_is_there(runs, tmp_path):
    folder = write_report([str(runs)], pytest.fail, out=str(tmp_path)).folder
    names = {path.name for path in folder.glob("*.png")}
    kinds = ("groups", "cost", "relative", "shift", "curves_loss", "curves_accuracy", "against_method_num_experts")
    assert names == {f"{kind}-1.png" for kind in kinds}
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert all(f"]({name})" in (folder / "report.md").read_text() for name in names)


def test_a_picture_without_data_costs_one_line_and_an_old_one_goes(runs, tmp_path):
    (tmp_path / "shift-1.png").write_bytes(b"of an earlier report")
    said = []
    run = finish(tmp_path / "runs" / "ce-s0", "method=ce", accuracy=FEW_KNOWN)
    write_report([str(run)], said.append, out=str(tmp_path))
    assert {path.name for path in tmp_path.glob("*.png")} == {"groups-1.png"}
    (line,) = said
    assert "accuracy over test distributions (needs `expertail evaluate RUN --model last --weights test-time" in line
