"""The text report of runs with several final stages, and of what stages without steps chose."""

from __future__ import annotations

import pytest

from orchestration.results.finals_table import report_table
from orchestration.results.fitted_table import choices, fitted_lines
from orchestration.results.tables import final_table
from tests.unit.orchestration.results.test_tables import data, evaluation, row

ORIGIN = "Kang et al. 2020"


def fitted(value, tried, *, published=0.7, split="val"):
    """Make what a stage records that chose `head.gamma`."""
    choice = {"key": "head.gamma", "value": value, "split": split, "origin": ORIGIN, "published": published}
    return {"values": {"head": {"gamma": value}}, "choices": [choice | {"tried": [list(pair) for pair in tried]}]}


def without_steps(value, stage, **more):
    """Make the evaluations of a stage without steps: last and best are one."""
    one = evaluation(value) | {"selected_on": None, "stage": stage, "epoch": 0, "step": 0} | more
    return {"last": one, "best": one}


def finals():
    crt = {"last": evaluation(0.5, "val") | {"stage": "crt"}, "best": evaluation(0.75, "val", few=None)}
    return {"ncm": without_steps(0.25, "ncm"), "tau": without_steps(0.125, "tau"), "crt": crt}


def test_every_final_stage_has_a_row_of_last_and_best_under_both_rules_and_its_details():
    text = report_table(finals()["crt"], finals(), data(), title="CE", seed=3)
    assert row(text, "ncm ")[1:] == ["25.00"] * 8 + ["3.75"] * 2
    assert row(text, "crt ")[1:] == [*("50.00 75.00".split() * 3), "50.00", "n/a", "3.75", "3.75"]
    assert row(text, "crt ", 1)[1:] == "50.00 75.00".split() * 3  # by index
    assert "ncm, tau: no steps, so last and best are the same model" in text
    assert "crt: best was chosen on val; test was not used" in text
    assert [line for line in text.splitlines() if line.startswith("== ")] == ["== ncm ==", "== tau ==", "== crt =="]
    assert text.count("740 training images") == text.count("seed 3") == 1
    for stage, evaluations in finals().items():
        shown = evaluations if stage == "crt" else {"last": evaluations["last"]}
        assert final_table(shown, data()).partition("\n")[2] in text, stage


def test_a_stage_that_has_one_of_both_models_leaves_the_other_open():
    text = report_table({}, {"ncm": {"last": evaluation(0.25)}, "crt": finals()["crt"]}, data(cuts=None))
    assert row(text, "ncm ")[1:3] == ["25.00", "n/a"]
    only_last = {stage: {"last": evaluations["last"]} for stage, evaluations in finals().items()}
    assert len(row(report_table({}, only_last, data()), "ncm ")) == 6


def test_the_report_of_one_final_stage_is_its_table():
    found = {"last": evaluation(0.5), "best": evaluation(0.75)}
    assert report_table(found, {}, data(), title="x", seed=1) == final_table(found, data(), title="x", seed=1)


def test_one_of_several_final_stages_alone_is_shown_as_one_result():
    ncm = finals()["ncm"]
    crt = finals()["crt"]
    assert report_table({}, {"crt": crt}, data(), seed=1) == final_table(crt, data(), seed=1)
    for text in (report_table({}, {"ncm": ncm}, data()), report_table(ncm, {}, data())):
        assert "\nncm: no steps, so last and best are the same model\nlast: stage ncm, " in text
        assert "\nbest: " not in text and row(text, "ensemble ")[1:] == ["25.00"] * 4


def test_a_number_chosen_on_validation_is_shown_with_everything_that_was_tried():
    tried = [(0.0, 0.5), (0.5, 0.75), (0.7, 0.625)]
    found = without_steps(0.5, "tau", fitted=fitted(0.5, tried))
    text = report_table(found, {}, data())
    assert f"tau: head.gamma = 0.5, chosen on val; published: 0.7 ({ORIGIN})" in text
    assert row(text, "  head.gamma") == ["head.gamma", "0", "0.5", "0.7"]
    assert row(text, "  mean of per-class")[-3:] == ["50.00", "75.00", "62.50"]
    assert "tried; shown" not in text and "the largest number tried" not in text
    assert report_table({}, {"tau": found, "ncm": finals()["ncm"]}, data()).count("head.gamma = 0.5") == 1


def test_of_many_candidates_the_best_the_ends_and_the_published_one_are_shown():
    """Accuracy rises to 1.5: the best five are 1.3 to 1.7."""
    tried = [(k / 10, 1 - abs(k - 15) / 100) for k in range(21)]
    lines = fitted_lines(choices(without_steps(0.5, "tau", fitted=fitted(1.5, tried)), {}))
    shown = next(line for line in lines if line.startswith("  head.gamma"))
    assert shown.split()[1:] == ["0", "0.7", "1.3", "1.4", "1.5", "1.6", "1.7", "2"]
    assert lines[-1].strip().startswith("21 numbers from 0 to 2 were tried; shown: the best 5")


def test_a_best_number_at_the_upper_end_is_remarked():
    tried = [(0.0, 0.1), (0.7, 0.2), (1.0, 0.3)]
    assert (
        "a larger one may be better" in fitted_lines(choices(without_steps(0, "t", fitted=fitted(1.0, tried)), {}))[-1]
    )


@pytest.mark.parametrize("several", [False, True])
def test_a_published_default_is_named_where_nothing_could_be_chosen(several):
    found = without_steps(0.5, "tau", fitted=fitted(0.7, [], split=None))
    text = report_table({} if several else found, {"tau": found, "ncm": finals()["ncm"]} if several else {}, data())
    assert (
        f"tau: head.gamma = 0.7, published default used: 0.7 ({ORIGIN}); there is no validation split to choose on"
        in text
    )
