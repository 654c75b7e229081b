"""Who may import what, and other rules that hold in every file."""

from __future__ import annotations

import ast
import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from orchestration.config.compose import available, load_config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("experts", "aggregation", "orchestration", "configs", "deploy")
LIBRARIES = {"torch", "torchvision", "numpy", "sklearn", "PIL", "pydantic", "safetensors"}
MAX_LINES = 500


def files(*packages):
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def named(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """Top-level packages that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}:{node.lineno}: a relative import"
            found.add(str(node.module).split(".")[0])
    return found


every_file = pytest.mark.parametrize("path", files(*PACKAGES), ids=named)


@pytest.mark.parametrize(("package", "ours"), [("experts", {"experts"}), ("aggregation", {"aggregation", "experts"})])
def test_what_experts_and_aggregation_import(package, ours):
    for path in files(package):
        extra = imported(path) - set(sys.stdlib_module_names) - LIBRARIES - ours
        assert not extra, f"{named(path)} imports {', '.join(sorted(extra))}"


@pytest.mark.parametrize("library", ["deepspeed", "mlflow"])
def test_a_heavy_library_is_imported_in_one_file(library):
    assert len([path for path in files(*PACKAGES) if library in imported(path)]) == 1


def test_ray_is_imported_in_orchestration_alone():
    users = {path.parent.name for path in files(*PACKAGES) if "ray" in imported(path)}
    assert users == {"orchestration"}


@every_file
def test_every_module_imports(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


@pytest.mark.parametrize("path", [*files(*PACKAGES, "tests"), *files("benchmarks")], ids=named)
def test_a_file_stays_small(path):
    assert len(path.read_text().splitlines()) < MAX_LINES


def test_the_packages_on_disk_are_those_that_are_shipped():
    with open(ROOT / "pyproject.toml", "rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    on_disk = {".".join(path.parent.relative_to(ROOT).parts) for path in files(*PACKAGES) if path.name == "__init__.py"}
    with_code = {".".join(path.parent.relative_to(ROOT).parts) for path in files(*PACKAGES)}
    assert sorted(listed) == sorted(on_disk)
    assert on_disk == with_code


@pytest.mark.parametrize("group", ["method", "dataset", "backbone", "cluster"])
@pytest.mark.slow
def test_every_choice_composes_and_is_named_after_its_file(group):
    for choice in available(group):  # a method has a schedule for digits; a dataset takes any
        words = ["method=ce", "schedule=ce_digits_lt"] if group == "dataset" else []
        config = load_config([*words, f"{group}={choice}"])
        if group in ("method", "dataset"):
            assert getattr(config, group).name == choice


def test_every_yaml_file_says_what_it_is():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert path.read_text().startswith("# "), path
