"""Tables of text and numbers in words, by hand."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import pytest

from experts.data.names import visible
from orchestration.config.messages import in_one_line, say, show
from orchestration.results.text import bytes_, decimals, duration, number, plural, text_table
from orchestration.runs.console import Console


def test_columns_stand_below_each_other_without_trailing_spaces():
    rows = [["name", "n", "note"], ["a", "12", ""], ["long name", "3", "x"]]
    assert text_table(rows, left=(0, 2), rule=True) == [
        "name        n  note",
        "-------------------",
        "a          12",
        "long name   3  x",
    ]


def test_a_heading_over_several_columns_widens_the_last_of_them_first():
    assert text_table([["", "a", "b"], ["x", "1", "2"]], spans=[("", 1), ("wide one", 2)]) == [
        "   wide one",
        "     a    b",
        "x    1    2",
    ]


def test_numbers_in_words():
    assert [plural(count, "worker") for count in (0, 1, 1200)] == ["0 workers", "1 worker", "1,200 workers"]
    assert [number(None), number(12345)] == ["n/a", "12,345"]
    assert [decimals(value, 100.0, 1) for value in (None, math.nan, 0.5)] == ["n/a", "n/a", "50.0"]
    assert [bytes_(value) for value in (None, 999, 1500, 2_500_000, 3 * 10**9)] == [
        "n/a",
        "999 B",
        "1.5 KB",
        "2.5 MB",
        "3 GB",
    ]
    assert [duration(seconds) for seconds in (3, 600, 9000)] == ["3.0 s", "10.0 min", "2.5 h"]


def test_an_error_is_one_line_that_any_stream_takes():
    assert in_one_line(ValueError("caf\udce9.jpg\nmore")) == "ValueError: caf\\xe9.jpg"
    assert (
        in_one_line(OSError("no route to http://me:s3cret@h/?token=s3cret"))
        == "OSError: no route to http://h/?token=***"
    )


def test_names_cannot_act_on_a_terminal_or_break_a_line(capsys):
    """An escape sequence, a line's end, a change of direction; letters of any script and joined emoji stay."""
    name = "a\x1b[31m\nb\u202e.jpg\u2028"
    assert visible(name) == "a\\x1b[31m\\nb\\u202e.jpg\\u2028"
    kept = "naïve 猫\u3000\u00a0👩\u200d🔬 نمی\u200cخواهم"
    assert visible(kept) == kept
    assert text_table([["class"], [name]]) == ["class", visible(name)]
    show(f"one\n  {visible(name)}\x07")
    say(f"{name}")
    out, err = capsys.readouterr()
    assert out == f"one\n  {visible(name)}\\x07\n"
    assert err == f"expertail: {visible(name, keep=chr(10))}\n"
    console = Console(stream=(stream := io.StringIO()))
    console.message(name)
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("how", ["| head -c 1 >/dev/null", ">&-", ">/dev/full"])
def test_text_that_nobody_reads_changes_no_exit_code(how):
    """A reader that has gone, a closed stream, a full disk; in an encoding that lacks most characters."""
    show = "from orchestration.config.messages import show; show('\\u732b' * 100_000); show('more' * 100_000)"
    command = f'set -o pipefail; PYTHONIOENCODING=ascii {sys.executable} -c "{show}" {how}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    missing = "expertail: standard output cannot be written (No space left on device); text is missing there\n"
    assert (done.returncode, done.stderr) == (0, missing if how == ">/dev/full" else "")
