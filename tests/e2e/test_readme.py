"""README, CONTRIBUTING, docs/ and deploy/*.md agree with the code, its files and its measurements."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from experts import registry
from orchestration.cli import _parser
from orchestration.config.compose import load_config
from orchestration.config.words import available
from orchestration.studies.study_config import read_study

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(ROOT.glob("deploy/*.md")),
    ]
}
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
MOST_WORDS, MOST_BYTES = 1300, 200_000  # of the README, and of a picture
TOP = ("experts", "aggregation", "orchestration", "tests", "deploy", "configs", "benchmarks", "docs")
PIECES = ("objective", "flow", "head", "sampler", "aggregator", "distillation", "router", "lr_schedule", "model")
TABLE_HEADS = {"method": "method", "method=": "method", "recipe": "recipe", "dataset=": "dataset", "then=": "then"}
GROUPS = {"recipe": ("method", "mix", "then")}  # of a recipe, which may be made of parts


def prose(text):
    """Return a document without its code blocks."""
    return FENCE.sub("", text)


def slug(heading):
    """Return the anchor that GitHub makes of a heading."""
    words = re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower())
    return words.replace(" ", "-")


def anchors(text):
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)}


def commands():
    """Yield the words of every expertail command in a code block, launched by Ray or not."""
    for name, text in DOCUMENTS.items():
        for block in FENCE.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"(?:^|/|\s)(?:expertail|python -m orchestration|launch\.py --) +([^#\s].*)$", line)
                if found:
                    words = re.sub(r"\s+#.*$", "", found[1])
                    yield pytest.param(words, id=f"{name}: {words[:60]}")


def backticked(text):
    return [found for part in prose(text).split("\n\n") for found in re.findall(r"`([^`]+)`", part)]


def rows(text):
    """Yield (kind of choice, first cell) for every row of a table whose first column names choices of a group."""
    kind = None
    for line in prose(text).splitlines():
        if not line.startswith("|"):
            kind = None
            continue
        first = line.split("|")[1].strip()
        if kind is None:
            kind = TABLE_HEADS.get(first.strip("`"), "other")
        elif kind != "other" and first.startswith("`"):
            yield kind, first


every_document = pytest.mark.parametrize("name", DOCUMENTS)


def test_there_are_commands():
    found = [case.values[0].split()[0] for case in commands()]
    assert {"train", "show", "plan", "evaluate", "sweep", "regions", "doctor", "import-weights", "sync"} <= set(found)


@pytest.mark.parametrize("words", list(commands()))
def test_every_command_is_understood(words):
    options, overrides = _parser().parse_known_args(shlex.split(words))
    assert not [word for word in overrides if word.startswith("-")]
    overrides = [*getattr(options, "overrides", []), *overrides]
    if options.command == "sweep":
        read_study(overrides)
    if options.command in ("train", "show", "plan", "doctor") and overrides:
        load_config(overrides)


@every_document
def test_every_make_target_exists(name):
    targets = re.findall(r"^make (\w+)|`make (\w+)`", DOCUMENTS[name], re.MULTILINE)
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {target for pair in targets for target in pair if target} <= set(known)


@every_document
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(DOCUMENTS[name])):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{name}: {target}"


@every_document
def test_every_path_named_exists(name):
    for text in backticked(DOCUMENTS[name]):
        for word in text.split():
            if word.split("/")[0] in TOP and "/" in word and not re.search(r"[<>:=]", word):
                assert list(ROOT.glob(word.rstrip("/,"))), f"{name}: {word}"


@every_document
def test_every_method_and_dataset_in_a_table_exists(name):
    for kind, cell in rows(DOCUMENTS[name]):
        known = {choice for group in GROUPS.get(kind, (kind,)) for choice in available(group)}
        for choice in re.findall(r"`([\w-]+)`", cell):
            assert choice in known, f"{name}: {cell}"


@every_document
def test_every_choice_and_piece_named_exists(name):
    for text in backticked(DOCUMENTS[name]):
        for kind, choice in re.findall(r"(?:^|\s)(\w+)=(\w+)(?=\s|$)", text):
            if kind in PIECES:
                assert choice in registry.registered_names(kind), f"{name}: {text}"
            elif kind in ("method", "dataset", "backbone"):
                assert choice in available(kind), f"{name}: {text}"


def test_every_method_and_dataset_has_a_row():
    for document, kind in (("docs/methods.md", "method"), ("docs/data.md", "dataset")):
        named = " ".join(cell for found, cell in rows(DOCUMENTS[document]) if found == kind)
        assert set(available(kind)) == set(re.findall(r"`([\w-]+)`", named))


def test_the_readme_is_short_and_its_pictures_are_small():
    assert len(DOCUMENTS["README.md"].split()) <= MOST_WORDS
    pictures = list(ROOT.glob("docs/images/*"))
    assert pictures
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < MOST_BYTES


def test_the_output_of_the_demo_is_what_was_measured():
    """For seed 0, the one of `make demo`."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())["seeds"]["0"]
    shown = re.findall(r"^(ensemble|expert\d)((?: +\d+\.\d\d){8})$", DOCUMENTS["README.md"], re.MULTILINE)
    groups = ("all", "many", "medium", "few")
    assert {member: [float(number) for number in numbers.split()] for member, numbers in shown} == {
        member: [measured[which]["top1"][member][group] for group in groups for which in ("last", "best")]
        for member in measured["last"]["top1"]
    }


HOLE = "\x00"
OTHERS = {
    "Authentication token is missing or incorrect", "Command failed", "Failed to download runtime_env file package",
    "Invalid authentication token", "Job ... failed", "Local node IP: 127.0.0.1", "Missing authentication token",
    "No module named 'psycopg'", "No module named orchestration", "No space left on device",
    "Ray is already started on this node", "Timed out waiting for other nodes to start",
    "no authentication token was found", "python: not found",
}  # fmt: skip
"""Messages of Ray, of Slurm and of the system."""


def tokens(text):
    """Return the words and signs of a message, separated by single spaces."""
    return " ".join(re.sub(r"([^\w\s])", r" \1 ", text).split())


def spoken():
    """Yield every text in the code, with a hole for each value that is filled in."""
    for folder in ("experts", "aggregation", "orchestration", "deploy", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".sh", ".sbatch"):
                yield path.read_text()
            if path.suffix == ".py":
                for node in ast.walk(ast.parse(path.read_text())):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        yield node.value
                    if isinstance(node, ast.JoinedStr):
                        yield "".join(
                            getattr(part, "value", HOLE) if isinstance(part, ast.Constant) else HOLE
                            for part in node.values
                        )


def readings(message):
    """Yield a message as it stands, and with one run of its words, at most half of them, replaced by a hole."""
    words = message.split()
    yield message
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            if len(words) - (end - start) >= max(2, len(words) / 2):
                yield " ".join([*words[:start], HOLE, *words[end:]])


def test_every_message_of_the_runbook_is_one_of_the_code():
    texts = "\n".join({tokens(text) for text in spoken()})
    missing = []
    for found in re.findall(r"\*\*(.+?)\*\*", DOCUMENTS["deploy/runbook.md"], re.DOTALL):
        message = " ".join(found.split())
        parts = [tokens(part) for part in re.split(r"'?\.\.\.'?|\b[NM]\b| / ", message)]
        if message not in OTHERS and not all(any(one in texts for one in readings(part)) for part in parts if part):
            missing.append(message)
    assert not missing
