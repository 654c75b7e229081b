"""A copy of a recipe is found under its own name, and gives the recipe's own config."""

from __future__ import annotations

import pytest

from orchestration.cli import main
from orchestration.config.compose import compose
from orchestration.config.folders import VARIABLE


def test_a_copied_recipe_is_the_same_under_its_own_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "")
    (tmp_path / "dataset").mkdir()
    assert main(["cp", "ride", str(tmp_path / "my_ride.yaml")]) == 0
    assert f"expertail train --config-dir {tmp_path} method=my_ride" in capsys.readouterr().out
    assert main(["cp", "dataset=cifar10_lt", str(tmp_path / "dataset" / "birds.yaml")]) == 0
    assert f"--config-dir {tmp_path} dataset=birds" in capsys.readouterr().out
    ours = compose(["method=ride", "dataset=digits_lt"]).config
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    theirs = compose(["method=my_ride", "dataset=digits_lt"]).config
    assert theirs.method.name == "my_ride"
    assert theirs.method.model_copy(update={"name": "ride"}) == ours.method
    birds, cifar = (compose(["method=ce", f"dataset={name}"]).config.dataset for name in ("birds", "cifar10_lt"))
    assert birds.model_copy(update={"name": "cifar10_lt"}) == cifar
    monkeypatch.setenv(VARIABLE, "")
    assert main(["cp", "my_ride", str(tmp_path / "mine.yaml"), "--config-dir", str(tmp_path)]) == 0
    assert (tmp_path / "mine.yaml").read_text() == (tmp_path / "my_ride.yaml").read_text()


@pytest.mark.parametrize(("words", "message"), [
    (["rid", "{tmp}/my.yaml"], "method=rid: no such method, did you mean ride"),
    (["methd=ride", "{tmp}/my.yaml"], "no group is called methd"),
    (["ride", "{tmp}/my.yml"], "needed a name that ends in .yaml, e.g. my_ride.yaml"),
    (["ride", "{tmp}/my+ride.yaml"], "my+ride cannot be chosen by name; needed a letter, then letters"),
    (["ride", "{tmp}/tade.yaml"], "method=tade is a name of ours"),
    (["ride", "{tmp}/there.yaml"], "there.yaml: exists"),
    (["ride", "{tmp}/none/my.yaml"], "none is no folder"),
])  # fmt: skip
def test_what_cannot_be_copied_is_named(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "")
    (tmp_path / "there.yaml").write_text("mine\n")
    assert main(["cp", *(word.format(tmp=tmp_path) for word in words)]) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.yaml").read_text() == "mine\n"
