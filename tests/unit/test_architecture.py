"""Who may import what, and other rules that hold in every file."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from orchestration.config.compose import load_config
from orchestration.config.words import available

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("experts", "aggregation", "orchestration", "configs", "deploy")
LIBRARIES = {"torch", "torchvision", "numpy", "sklearn", "PIL", "pydantic", "safetensors"}
MAX_LINES = 500
ORDER = [
    {"config"},
    {"storage"},
    {"training"},
    {"cluster", "results"},
    {"tracking", "runs"},
    {"preflight"},
    {"reports"},
    {"studies"},
    {"commands"},
]
"""Packages of orchestration/, lowest level first (docs/architecture.md)."""


def files(*packages):
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def named(path):
    return str(path.relative_to(ROOT))


def modules(path):
    """Whatever modules a file imports anywhere, in functions too; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{named(path)}:{node.lineno}: a relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported(path):
    """Top-level packages that a file imports anywhere."""
    return {module.split(".")[0] for module in modules(path)}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize(("package", "ours"), [("experts", {"experts"}), ("aggregation", {"aggregation", "experts"})])
def test_experts_and_aggregation_import_few_libraries(package, ours):
    for path in files(package):
        extra = imported(path) - set(sys.stdlib_module_names) - LIBRARIES - ours
        assert not extra, f"{named(path)} imports {', '.join(sorted(extra))}"


@pytest.mark.parametrize(
    ("library", "where"),
    [
        ("deepspeed", {"orchestration/training/deepspeed_engine.py"}),
        ("mlflow", {"orchestration/tracking/"}),
        ("ray", {"orchestration/cluster/", "orchestration/preflight/node_"}),
    ],
)
def test_a_heavy_library_is_imported_in_its_own_room(library, where):
    users = [named(path) for path in files(*PACKAGES) if library in imported(path)]
    assert users
    assert not [user for user in users if not user.startswith(tuple(where))]


@pytest.mark.parametrize("library", ["torchvision", "matplotlib", "sklearn", "deepspeed"])
def test_a_library_that_few_runs_need_loads_where_it_is_used(library):
    """Every process of a run would wait for it: torchvision alone doubles the time that our packages need."""

    def at_once(node):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield str(node.module)
        for child in ast.iter_child_nodes(node):
            yield from at_once(child)

    for path in files(*PACKAGES):
        found = {module.split(".")[0] for module in at_once(ast.parse(path.read_text()))}
        assert library not in found, named(path)


def imports_between_packages():
    """(file, package it lies in, package it imports) for every import inside orchestration/, type-only ones too."""
    for path in files("orchestration"):
        parts = path.relative_to(ROOT / "orchestration").parts
        for module in modules(path):
            words = module.split(".")
            if len(parts) > 1 and words[0] == "orchestration" and len(words) > 1 and words[1] != "__version__":
                yield named(path), parts[0], words[1]


def test_packages_of_orchestration_import_downwards_alone():
    """A package imports itself and packages of lower levels; those on one level do not know of each other."""
    level = {package: number for number, packages in enumerate(ORDER) for package in packages}
    upwards = [
        f"{path} imports orchestration/{taken}"
        for path, package, taken in imports_between_packages()
        if taken != package and (taken not in level or level[taken] >= level[package])
    ]
    assert not upwards
    on_disk = {path.name for path in (ROOT / "orchestration").glob("*.py")}
    assert on_disk == {"__init__.py", "__main__.py", "cli.py"}
    assert set(level) == {path.parent.name for path in (ROOT / "orchestration").glob("*/__init__.py")}


def test_no_files_import_each_other_in_a_circle():
    """Imports in functions and for types alone count too."""
    known = {module_name(path): path for path in files(*PACKAGES)}
    graph = {name: {m for m in modules(path) if m in known and m != name} for name, path in known.items()}
    while leaves := [name for name, taken in graph.items() if not taken]:
        for leaf in leaves:
            del graph[leaf]
        for taken in graph.values():
            taken.difference_update(leaves)
    assert not graph, f"in or above a circle: {sorted(graph)}"


def test_no_folders_of_experts_need_each_other():
    """Nor does a folder need a file beside the folders that needs it."""
    graph = {}
    for path in files("experts"):
        unit = module_name(path).split(".")[:2][-1]
        units = {module.split(".")[1] for module in modules(path) if module.startswith("experts.")}
        graph.setdefault(unit, set()).update(units - {unit, "__version__"})
    pairs = [(one, other) for one, others in graph.items() for other in others if one in graph.get(other, ())]
    assert not pairs


def test_nobody_imports_a_private_name():
    taken = [
        f"{named(path)}: {module}"
        for path in files(*PACKAGES)
        for module in modules(path)
        if module.split(".")[0] in PACKAGES and re.match(r"_[a-zA-Z]", module.split(".")[-1])
    ]
    assert not taken


def test_every_module_imports():
    broken = {}
    for path in files(*PACKAGES):
        try:
            importlib.import_module(module_name(path))
        except Exception as error:
            broken[named(path)] = repr(error)
    assert not broken


def test_every_file_stays_small():
    lines = {named(path): len(path.read_text().splitlines()) for path in files(*PACKAGES, "tests", "benchmarks", ".ci")}
    assert not {path: count for path, count in lines.items() if count >= MAX_LINES}


@pytest.mark.parametrize("tier", ["unit", "parity"])
def test_tests_lie_where_the_code_lies(tier):
    """A test file has the name of the module it tests, or of the folder whose modules it tests together.

    Tests of the repository itself lie at the root of unit/.
    """
    strangers = []
    for path in files(f"tests/{tier}"):
        folder, name = path.parent.relative_to(ROOT / "tests" / tier), path.stem.removeprefix("test_")
        if path.name.startswith("test_") and folder != Path():
            tested = (ROOT / folder / f"{name}.py").exists() or name == folder.name
            strangers += [] if tested else [f"{named(path)}: no {folder / name}.py"]
    assert not strangers


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
        words = ["method=ce", "pace=digits_lt"] if group == "dataset" else []
        config = load_config([*words, f"{group}={choice}"])
        if group in ("method", "dataset"):
            assert getattr(config, group).name == choice


def test_every_yaml_file_says_what_it_is():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert path.read_text().startswith("# "), path
