import json
import math

import pytest

from orchestration.storage.journal import FILE_NAME, Journal, parse_line, read_journal, series


def fill(run_dir, moments):
    with Journal(run_dir) as journal:
        for stage, step in moments:
            journal.append(stage, 1, step, {"train/loss": step / 10, "train/lr": 0.1}, time=1000.0 + step)


def moments(run_dir):
    return [(r.stage, r.step) for r in read_journal(run_dir) if r.name == "train/loss"]


def test_every_number_is_one_line_of_valid_json(tmp_path):
    fill(tmp_path, [("train", 1)])
    first, second = (tmp_path / FILE_NAME).read_text().splitlines()
    assert json.loads(first) == {
        "time": 1001.0, "stage": "train", "epoch": 1, "step": 1, "name": "train/loss", "value": 0.1,
    }  # fmt: skip
    assert json.loads(second)["name"] == "train/lr"


def test_numbers_come_back_exactly(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": -0.0, "d": 12345678901234567.0}
    with Journal(tmp_path) as journal:
        journal.append("train", 1, 1, values)
    assert {r.name: r.value for r in read_journal(tmp_path)} == values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path, value):
    with Journal(tmp_path) as journal:
        journal.append("train", 1, 1, {"train/loss": value})
    (line,) = (tmp_path / FILE_NAME).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["value"] is None
    assert math.isnan(next(read_journal(tmp_path)).value)


def test_lines_are_buffered_until_flushed(tmp_path):
    journal = Journal(tmp_path, flush_s=1e9)
    journal.append("train", 1, 1, {"train/loss": 1.0})
    assert moments(tmp_path) == []
    journal.flush()
    assert moments(tmp_path) == [("train", 1)]
    journal.close()
    journal.close()


def test_append_flushes_by_itself_after_a_while(tmp_path):
    journal = Journal(tmp_path, flush_s=0.0)
    journal.append("train", 1, 1, {"train/loss": 1.0})
    assert moments(tmp_path) == [("train", 1)]
    journal.close()


def test_a_partial_last_line_is_not_read_and_is_cut_when_writing_goes_on(tmp_path):
    fill(tmp_path, [("train", 1)])
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write('{"time": 1, "sta')
    assert moments(tmp_path) == [("train", 1)]
    fill(tmp_path, [("train", 2)])
    assert moments(tmp_path) == [("train", 1), ("train", 2)]


def test_a_file_that_is_one_partial_line_becomes_empty(tmp_path):
    (tmp_path / FILE_NAME).write_text("x" * 200_000)
    Journal(tmp_path).close()
    assert (tmp_path / FILE_NAME).read_bytes() == b""


@pytest.mark.parametrize("line", ["garbage", "{}", "[]", '{"time": "x"}', "null", '{"time": 1, "stage": "t"}'])
def test_a_corrupt_line_in_the_middle_names_file_and_line(tmp_path, line):
    fill(tmp_path, [("train", 1)])
    with open(tmp_path / FILE_NAME, "a") as file:
        file.write(line + "\n")
    fill(tmp_path, [("train", 2)])
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3: not a line of a journal"):
        list(read_journal(tmp_path))


def test_a_missing_journal_is_empty(tmp_path):
    assert list(read_journal(tmp_path)) == []


def test_rewind_drops_later_steps_of_the_stages_named_only(tmp_path):
    fill(tmp_path, [("teacher", 1), ("teacher", 9), ("train", 1), ("train", 2), ("train", 3), ("last", 1)])
    with Journal(tmp_path) as journal:
        assert journal.rewind({"train": 2, "last": 0}, ["teacher", "train", "last"]) == 4  # two lines a moment
        journal.append("train", 1, 3, {"train/loss": 7.0})
    assert moments(tmp_path) == [("teacher", 1), ("teacher", 9), ("train", 1), ("train", 2), ("train", 3)]
    assert list(read_journal(tmp_path))[-1].value == 7.0
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_rewind_to_the_start_of_a_stage_keeps_the_stages_before(tmp_path):
    fill(tmp_path, [("a", 1), ("b", 1)])
    with Journal(tmp_path) as journal:
        journal.rewind({"b": 0}, ["a", "b"])
    assert moments(tmp_path) == [("a", 1)]


def test_rewind_writes_what_is_still_buffered_first(tmp_path):
    with Journal(tmp_path, flush_s=1e9) as journal:
        for step in (1, 2, 3):
            journal.append("train", 1, step, {"train/loss": 0.0})
        assert journal.rewind({"train": 2}, ["train"]) == 1
    assert moments(tmp_path) == [("train", 1), ("train", 2)]


def test_a_reader_keeps_the_old_file_while_the_journal_is_rewound(tmp_path):
    fill(tmp_path, [("train", 1), ("train", 2)])
    before = (tmp_path / FILE_NAME).read_bytes()
    with open(tmp_path / FILE_NAME, "rb") as reader, Journal(tmp_path) as journal:
        journal.rewind({"train": 1}, ["train"])
        assert reader.read() == before


def test_rewind_refuses_a_stage_that_the_run_does_not_have_and_changes_nothing(tmp_path):
    fill(tmp_path, [("other", 1)])
    before = (tmp_path / FILE_NAME).read_bytes()
    with Journal(tmp_path) as journal:
        with pytest.raises(ValueError, match=r"metrics\.jsonl:1: stage 'other' is not a stage of this run"):
            journal.rewind({"train": 1}, ["train"])
        with pytest.raises(ValueError, match="stage 'nope' is not a stage"):
            journal.rewind({"nope": 1}, ["train"])
    assert (tmp_path / FILE_NAME).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


def test_a_journal_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: the journal of the run cannot be written .*run\.dir"):
        Journal(tmp_path / "file")


def test_series_are_grouped_by_stage_and_name(tmp_path):
    fill(tmp_path, [("a", 1), ("b", 1), ("b", 2)])
    lines = series(tmp_path)
    assert list(lines) == ["a", "b"]
    assert lines["b"]["train/loss"].steps == [1, 2]
    assert lines["b"]["train/loss"].values == [0.1, 0.2]


def test_parse_line_names_the_place():
    with pytest.raises(ValueError, match="here:7"):
        parse_line(b"x", "here:7")
