"""The list of choices names everything there is, and every recipe says its family."""

from __future__ import annotations

import pytest

from orchestration.commands.choices import FAMILIES, choices_text, family_of
from orchestration.config.compose import available, configs_folder, load_config


def test_every_recipe_names_one_family_of_the_survey():
    for name in available("method"):
        recipe = (configs_folder() / "method" / f"{name}.yaml").read_text().splitlines()
        header = recipe[: next(i for i, line in enumerate(recipe) if not line.startswith("#"))]
        named = [line.removeprefix("# family: ") for line in header if line.startswith("# family:")]
        assert len(named) == 1 and named[0] in FAMILIES, f"{name}: {named}; needed one of {', '.join(FAMILIES)}"
        assert family_of(name) == named[0]


def test_methods_are_listed_once_below_their_families_in_the_surveys_order():
    families: list[str] = []
    listed: dict[str, list[str]] = {}
    methods = choices_text().partition("method=\n")[2].partition("\ndataset=")[0]
    for line in methods.splitlines():
        family, members = line[2:42].strip(), line[42:]
        families += [family] if family else []
        listed.setdefault(families[-1], []).extend(members.strip(" |").split(" | "))
    assert families == [family for family in FAMILIES if family in families]
    assert sorted(name for names in listed.values() for name in names) == available("method")
    assert listed["module improvement / ensemble"][0] == "ace" and listed["baseline"] == ["ce"]


@pytest.mark.parametrize("line", ["", "# family: ensembles\n"])
def test_a_recipe_without_a_known_family_is_listed_all_the_same(line, tmp_path, monkeypatch):
    import configs

    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(f"# Mine.\n{line}name: mine\n")
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    assert "no family named" in choices_text() and "mine" in choices_text()


def test_a_family_is_no_key_of_a_config():
    assert "family" not in load_config(["method=ace"]).method.model_dump()
