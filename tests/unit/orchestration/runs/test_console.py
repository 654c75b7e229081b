import io

import pytest

from orchestration.runs import console as module
from orchestration.runs.console import Console, evaluation_line

RESULT = {
    "split": "test", "epoch": 2,
    "members": {
        "expert0": {"top1": {"all": 0.5, "many": 0.6, "medium": 0.4, "few": 0.1}},
        "ensemble": {"top1": {"all": 0.625, "many": 0.75, "medium": 0.5, "few": None}},
    },
}  # fmt: skip
VALUES = {"loss": 3.21, "lr": 0.1, "images/s": 1912.4, "ldam/expert0": 2.9, "ldam/expert1": 2.5, "extra": 1.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def isatty(self):
        raise OSError


@pytest.fixture
def now(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    return clock


@pytest.fixture(autouse=True)
def able_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


def test_a_dumb_terminal_gets_plain_lines(now, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Console(interval_s=10, stream=stream) as console:
        console.step(1, 2, 1, 60, VALUES)
    assert stream.getvalue().startswith("epoch 1/2  step 1/60 (2%)")
    assert "\x1b" not in stream.getvalue()


def test_a_log_file_gets_one_plain_line_per_interval(now):
    stream = io.StringIO()
    with Console(interval_s=10, stream=stream) as console:
        for step in range(1, 31):
            now[0] += 1
            console.step(1, 2, step, 60, VALUES)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "\x1b" not in stream.getvalue()
    assert lines[1] == (
        "epoch 1/2  step 11/60 (18%)  eta 0:00:49  loss 3.21  lr 0.1  1,912 images/s  ldam 2.9 2.5  extra 1"
    )


def test_a_line_of_many_terms_stays_short_and_says_what_it_leaves_out(now):
    terms = {f"{term}/expert{n}": -0.12345 for term in ("ldam", "diversity", "kl", "router", "last") for n in range(6)}
    stream = io.StringIO()
    console = Console(stream=stream)
    console.step(111, 200, 11111, 17000, VALUES | terms)
    console.labelled("a stage of a long name").step(
        111, 200, 11111, 17000, VALUES | terms | {"ldam/a": 1.0, "ldam/b": 1.0}
    )
    first, second = stream.getvalue().splitlines()
    assert "  ldam -0.1235 -0.1235 -0.1235 -0.1235 -0.1235 -0.1235  extra 1  (+4 more)" in first
    assert second.endswith("images/s  (+6 more)") and second.startswith("a stage of a long name: epoch 111/200")
    assert max(map(len, (first, second))) <= 160


def test_the_last_step_is_always_a_line(now):
    stream = io.StringIO()
    console = Console(interval_s=10, stream=stream)
    console.step(1, 1, 1, 2, {})
    console.step(1, 1, 2, 2, {})
    assert stream.getvalue().splitlines()[-1] == "epoch 1/1  step 2/2 (100%)  eta 0:00:00"


def test_the_eta_begins_again_when_steps_go_back(now):
    stream = io.StringIO()
    console = Console(interval_s=0, stream=stream)
    for step in (10, 20, 12):
        now[0] += 10
        console.step(1, 1, step, 100, {})
    assert ["eta ?" in line for line in stream.getvalue().splitlines()] == [True, False, True]


def test_an_evaluation_is_one_line_with_the_ensemble_first_and_no_number_for_an_empty_group():
    assert evaluation_line(RESULT) == (
        "test top-1 %, epoch 2:  all 62.5  many 75.0  medium 50.0  few n/a  expert0 50.0"
    )


def test_one_expert_whose_accuracies_are_the_ensembles_is_not_shown_beside_it():
    same = {"split": "test", "epoch": 2, "members": {m: {"top1": {"all": 0.5}} for m in ("expert0", "ensemble")}}
    assert "expert0" not in evaluation_line(same)
    same["members"]["expert1"] = {"top1": {"all": 0.5}}
    assert "expert0 50.0  expert1 50.0" in evaluation_line(same)


@pytest.mark.parametrize("width", ["200", "20", "1"])
def test_a_terminal_of_any_width_gets_a_live_view(monkeypatch, now, width):
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with Console(stream=stream) as console:
        console.message("[bold] is not markup")
        for step in (1, 2):
            now[0] += 1
            console.step(1, 2, step, 2, VALUES)
        console.evaluation(RESULT)
        console.message("above the view")
    text = stream.getvalue()
    assert "[bold] is not markup" in text
    if width == "200":
        for part in ("epoch 1/2", "1,912 images/s", "ldam", "expert1", "ensemble", "62.5", "above the view"):
            assert part in text


@pytest.mark.parametrize("stream", [Broken(), Terminal()])
def test_nothing_raises_into_training(stream, monkeypatch):
    monkeypatch.setenv("COLUMNS", "nonsense")
    with Console(stream=stream) as console:
        console.step(1, 1, 1, 0, {"loss": "not a number"})
        console.evaluation({"members": None})
        console.message("text")
    console.close()
