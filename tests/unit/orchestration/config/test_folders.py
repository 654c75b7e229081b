"""A user's own recipes, parts and data sets are found by name beside ours, and errors name file and key."""

from __future__ import annotations

import hashlib
import os
import re

import pytest
import yaml

from orchestration.cli import main
from orchestration.config.compose import compose, from_yaml, to_yaml
from orchestration.config.folders import VARIABLE, choices, configs_folder, digests

RECIPE = "# Mine.\nof: {method: ce}\nstage: {optimizer: {lr: 0.123}}\non:\n  my_digits: {second: {}}\n"
DATA = "# My digits.\nname: my_digits\nsource: digits\nimage_size: 8\nmean: [0.3, 0.3, 0.3]\nstd: [0.4, 0.4, 0.4]\n"
FILES = {
    "mine.yaml": RECIPE,
    "._mine.yaml": "\0\5 traces of a system",
    "dataset/._my_digits.yaml": "\0\5 traces of a system",
    "compose.yaml": "services: {}\n",
    "dataset/my_digits.yaml": DATA,
    "then/my_crt.yaml": (configs_folder() / "then" / "crt.yaml").read_text(),
    "pace/brisk.yaml": (configs_folder() / "pace" / "digits_lt.yaml").read_text(),
    "augment/plain.yaml": "# Plain.\npieces: [{name: flip}]\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


WORDS = ["method=mine", "then=my_crt", "dataset=my_digits", "pace=brisk", "dataset.augment.name=plain"]


def test_a_recipe_of_ones_own_is_composed_and_needs_its_files_no_more(folder, monkeypatch):
    composed = compose(WORDS)
    config = composed.config
    assert config.method.name == "mine+my_crt"
    ours = compose(["method=ce", "then=crt", "dataset=digits_lt", "method.stages.train.optimizer.lr=0.123"]).config
    for theirs, name in (("train", "train"), ("my_crt", "crt")):
        plain = {"augment": None, "views": (), "lr_schedule": None}  # which follow the data set, too
        mine, other = (c.method.stages[n].model_copy(update=plain) for c, n in ((config, theirs), (ours, name)))
        assert mine == other
    assert config.dataset.name == "my_digits"
    assert config.dataset.augment != ours.dataset.augment
    found = digests(composed.files)
    assert found["method/mine"] == {
        "file": str(folder / "mine.yaml"), "sha256": hashlib.sha256(RECIPE.encode()).hexdigest(),
    }  # fmt: skip
    assert found["method/ce"]["file"] == "configs/method/ce.yaml"
    assert {"then/my_crt", "dataset/my_digits", "pace/brisk"} <= found.keys()
    monkeypatch.delenv(VARIABLE)
    (folder / "config.yaml").write_text(to_yaml(config))
    assert from_yaml(folder / "config.yaml") == config


def test_a_recipe_may_begin_with_a_byte_order_mark(folder):
    expected = compose(WORDS).config
    (folder / "mine.yaml").write_text(RECIPE, "utf-8-sig")
    (folder / "then" / "my_crt.yaml").write_text(FILES["then/my_crt.yaml"], "utf-8-sig")
    assert compose(WORDS).config == expected


def test_what_is_no_file_ends_no_command(folder):
    """A folder, a link to nothing, a link to itself, and a pipe whose reader would wait."""
    (folder / "nested.yaml").mkdir()
    (folder / "gone.yaml").symlink_to("nowhere")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(folder / "then" / "pipe.yaml")
    assert not {"nested", "gone", "loop"} & choices("method").keys()
    assert "pipe" not in choices("then")


@pytest.mark.parametrize(("name", "data", "message"), [
    ("other.yml", RECIPE.encode(), r"; {file} is passed over, needed the ending .yaml"),
    ("other.yaml", RECIPE.encode("utf-16"), r"; {file} is passed over, needed a line that begins with method: or of:"),
    ("other.yaml", b"stages: {}\n", r"; {file} is passed over, needed a line that begins with method: or of:"),
])  # fmt: skip
def test_a_file_of_the_name_that_is_no_recipe_says_why(folder, name, data, message):
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match="no such method.*" + message.replace("{file}", re.escape(str(folder / name)))):
        compose(["method=other"])


def test_they_are_listed_and_shown_with_where_they_come_from(folder, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE)
    for command in (["ls"], ["train", "--list"]):
        assert main([*command, "--config-dir", str(folder)]) == 0
        rows = capsys.readouterr().out.splitlines()
        assert f"  method=mine               Mine. ({folder / 'mine.yaml'})" in rows
        assert any(row.startswith("  then=my_crt ") and row.endswith("then/my_crt.yaml)") for row in rows)
        assert any(row.startswith("  plain ") for row in rows)
        assert not any("method=compose" in row for row in rows)
        monkeypatch.delenv(VARIABLE)
    monkeypatch.chdir(folder)
    assert main(["show", *WORDS, "--config-dir", "."]) == 0
    shown = capsys.readouterr().out
    assert f"method/mine ({folder / 'mine.yaml'})" in shown.splitlines()[0]
    assert yaml.safe_load(shown)["method"]["stages"]["train"]["optimizer"]["lr"] == 0.123
    assert os.environ[VARIABLE] == str(folder), "for processes that the command starts"


@pytest.mark.parametrize(("name", "text", "message"), [
    ("mine.yaml", RECIPE + "methd: {}\n", r"methd: unknown key; did you mean method\? \(from method/mine, {file}\)"),
    ("mine.yaml", "of: {methods: ce}\n", r"{file}: of: found .*needed a mapping with method"),
    ("mine.yaml", "of: {method: cee}\n", r"method=cee: no such method, did you mean ce"),
    ("mine.yaml", "of: {method: mine}\n", r"{file}: made `of` itself by way of mine"),
    ("mine.yaml", RECIPE + "second: 3\n", r"{file}: second: found 3; needed a mapping"),
    ("mine.yaml", "of: {method: ce}\non: 3\n", r"{file}: on: needed mappings"),
    ("mine.yaml", "of: [\n", r"{file}: cannot be read"),
    ("dataset/my_digits.yaml", DATA.replace("my_d", "d"), r"{file}: name = digits; needed my_digits"),
    ("method/mine.yaml", RECIPE, r"mine.yaml: there is .*method/mine.yaml, too"),
    ("method/ride.yaml", RECIPE, r"{file}: method=ride is a name of ours"),
    ("then/ride+crt.yaml", RECIPE, r"{file}: ride\+crt cannot be chosen by name"),
    ("methods/other.yaml", RECIPE, r"methods: no group has this name; did you mean method/\?"),
])  # fmt: skip
def test_a_file_that_is_wrong_is_named_with_its_key(folder, name, text, message):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message.replace("{file}", re.escape(str(folder / name)))):
        compose(WORDS)


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "")
    assert main(["show", "method=ce", "--config-dir", str(tmp_path / "none")]) == 1
    assert f"{VARIABLE} = {tmp_path / 'none'}: no such folder" in capsys.readouterr().err
