"""The list of choices names everything there is, and every recipe says its family."""

from __future__ import annotations

import pytest

from orchestration.commands.choices import FAMILIES, choices_text, family_of
from orchestration.config.compose import load_config
from orchestration.config.folders import configs_folder
from orchestration.config.words import available

RECIPES = [(group, name) for group in ("method", "mix", "then") for name in available(group)]


@pytest.mark.parametrize(("group", "name"), RECIPES)
def test_every_recipe_and_part_names_one_family_of_the_survey(group, name):
    recipe = (configs_folder() / group / f"{name}.yaml").read_text().splitlines()
    header = recipe[: next(i for i, line in enumerate(recipe) if not line.startswith("#"))]
    named = [line.removeprefix("# family: ") for line in header if line.startswith("# family:")]
    assert len(named) == 1 and named[0] in FAMILIES, f"{name}: {named}; needed one of {', '.join(FAMILIES)}"
    assert family_of(name, group) == named[0]


def test_methods_and_parts_are_listed_once_below_their_families_in_the_surveys_order():
    listed: dict[str, list[str]] = {}
    for block in choices_text().split("\n\n"):
        family, *members = block.splitlines()
        listed[family] = [line.split()[0] for line in members if line.startswith("  ") and line[2] != " "]
    families = [family for family in FAMILIES if family in listed]
    assert [family for family in listed if family in FAMILIES] == families
    assert sorted(name for f in families for name in listed[f]) == sorted(f"{group}={name}" for group, name in RECIPES)
    assert listed["module improvement / ensemble"][0] == "method=ace" and listed["baseline"] == ["method=ce"]


@pytest.mark.parametrize(
    "path", sorted(configs_folder().glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_the_first_line_of_a_file_says_what_it_is_and_fits_the_list(path):
    first = path.read_text().splitlines()[0]
    listed_by_name_alone = path.parent.name in ("backbone", "cluster")
    assert first.startswith("# ") and (listed_by_name_alone or (first.endswith(".") and len(first) <= 94))


@pytest.mark.parametrize("line", ["", "# family: ensembles\n"])
def test_a_recipe_without_a_known_family_is_listed_all_the_same(line, tmp_path, monkeypatch):
    import configs

    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(f"# Mine.\n{line}name: mine\n")
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    assert "no family named" in choices_text() and "mine" in choices_text()


def test_a_family_is_no_key_of_a_config():
    assert "family" not in load_config(["method=ace"]).method.model_dump()
