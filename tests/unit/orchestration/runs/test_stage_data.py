"""The driver checks and keeps the facts that workers find in the data."""

import pytest

from experts.data.config import DatasetConfig
from orchestration.results.tables import head_lines
from orchestration.runs.stage_data import carried_forward, check_not_replaced, describe_data

DATA = DatasetConfig(name="own", source="image_folder", root="/data")
OLD = {"training": {"sizes": "a", "times": "b"}, "test": {"contents": "c"}}


def test_replaced_files_are_refused_and_other_times_are_said():
    assert check_not_replaced(DATA, OLD, OLD) == []
    assert check_not_replaced(DATA, {}, OLD) == [], "a run that is new, or of an older version"
    [doubt] = check_not_replaced(DATA, OLD, OLD | {"training": {"sizes": "a", "times": "x"}})
    assert doubt.startswith("training images have other times")
    with pytest.raises(ValueError, match=r"dataset.root = /data: test images .* hold other data .*; put the old files"):
        check_not_replaced(DATA, OLD, OLD | {"test": {"contents": "x"}})
    with pytest.raises(ValueError, match=r"training images of the same names have other sizes"):
        check_not_replaced(DATA, OLD, OLD | {"training": {"sizes": "x", "times": "b"}})


def test_what_an_earlier_start_read_is_carried_forward_and_compared_by_what_both_have():
    """With dataset.quarantine the first start reads streamed files; a replaced worker only asks for their states."""
    read = {"training": {"sizes": "a", "times": "b", "contents": "c"}, "test": {"contents": "d"}}
    twice = {"kind": "repeated", "count": 2, "text": "2 images are there twice", "doubt": True}
    held = {"kind": "held_out", "count": 6, "text": "6 images are held out", "doubt": False}
    old = {"files": read, "remarks": [held, twice]}
    now = {"digest": "x", "files": {"training": {"sizes": "a", "times": "t"}, "test": {"contents": "d"}}}
    kept = carried_forward(now | {"remarks": [held]}, old)
    assert kept["files"] == {"training": {"sizes": "a", "times": "t", "contents": "c"}, "test": {"contents": "d"}}
    assert kept["remarks"] == [held, twice]
    [doubt] = check_not_replaced(DATA, old["files"], now["files"])
    assert doubt.startswith("training images have other times")
    with pytest.raises(ValueError, match=r"training images of the same names hold other data"):
        check_not_replaced(DATA, kept["files"], read | {"training": {"contents": "e"}})
    whole = carried_forward({"files": read, "remarks": [held]}, old)
    assert whole == {"files": read, "remarks": [held]}, "a start that reads all files knows all remarks"
    assert carried_forward({"files": read, "remarks": [held]}, {}) == whole


def test_remarks_are_kept_and_stand_above_the_table():
    remark = {"kind": "held_out", "count": 6, "text": "6 images are held out for the test", "doubt": False}
    facts = {"counts": [3, 1], "class_names": ["a", "b"], "digest": "d", "image_shape": None}
    data = describe_data(DATA, facts | {"remarks": [remark], "files": OLD}, [])
    assert data["remarks"] == [remark]
    assert data["files"] == OLD
    lines = head_lines(data, title="ce", seed=0)
    assert lines[1:3] == ["own: 4 training images of 2 classes, 3 to 1 per class (ratio 3)", remark["text"]]
