"""`expertail predict`: what a trained ensemble says of image files.

    expertail predict runs/ride-birds-s0 photos/ one.jpg --top 3
    expertail predict models:/expertail-birds@best photos/ --csv > said.csv

Files go through the preprocessing of the run's own evaluation, whatever their format and size. A file that cannot be
read costs a line on standard error; the others are answered.
"""

from __future__ import annotations

import csv
import io
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aggregation.serving import DESCRIPTION, Answers, ServedModel, load_model
from experts.data.decode import UnreadableImage, decode_file
from experts.data.files import EXTENSIONS, images_below
from orchestration.config.messages import say
from orchestration.config.paths import expand
from orchestration.results.text import plural, text_table
from orchestration.storage.location import local_run
from orchestration.tracking.models import SCHEMES, download_model

_BATCH = 64  # images computed at once


@dataclass(frozen=True)
class Options:
    """The form of the answers.

    Attributes:
        which: "best" or "last", of a run's models.
        stage: the final stage whose model answers; "" for the run's own result.
        top: classes named per image, at least 1.
        as_csv: write CSV instead of a table.
    """

    which: str = "best"
    stage: str = ""
    top: int = 3
    as_csv: bool = False


def predict(source: str, given: Sequence[str], options: Options) -> tuple[str, bool]:
    """Return what a model says of files, and whether all of them could be read.

    Args:
        source: a run folder or its URL, the folder of an exported model, or the URI of an MLflow model.
        given: files, and folders whose images are answered, those below them too.
        options: how to answer.

    Raises:
        ValueError: there is no such model, file or folder, a folder has no image, or no file could be read.
    """
    if options.top < 1:
        raise ValueError(f"--top {options.top}: needed at least 1")
    files = [file for one in given for file in _files(one)]
    with _model_folder(source, options) as folder:
        model = load_model(folder)
    rows, unread = [], 0
    for start in range(0, len(files), _BATCH):
        images, names = [], []
        for file in files[start : start + _BATCH]:
            try:
                images.append(decode_file(file))
                names.append(file)
            except UnreadableImage as problem:
                say(f"{problem.path}: {problem.reason}")
                unread += 1
        if images:
            rows += _rows(model, names, model.ask(images), options.top)
    if not rows:
        raise ValueError(f"none of {plural(len(files), 'file')} could be read; needed images")
    text = _csv(model, rows, options.top) if options.as_csv else _table(model, rows, options.top)
    return text, not unread


@contextmanager
def _model_folder(source: str, options: Options) -> Iterator[Path]:
    """Yield the folder of an exported model; a copy of one in MLflow is removed at the end."""
    if source.startswith(SCHEMES):
        with tempfile.TemporaryDirectory() as scratch:
            yield download_model(source, scratch)
        return
    with local_run(source) as run:
        folder = expand(run)
        if (folder / DESCRIPTION).is_file():
            yield folder
            return
        export = folder / "export" / options.stage / options.which
        if not (export / DESCRIPTION).is_file():
            there = sorted(
                path.parent.relative_to(folder).as_posix() for path in folder.glob(f"export/**/{DESCRIPTION}")
            )
            found = f"the run has {', '.join(there)}" if there else "no exported model there"
            raise ValueError(f"{export}: {found}; needed the folder of a trained run, or of a model that it exported")
        yield export


def _files(given: str) -> list[str]:
    """Return a file, or the images below a folder."""
    path = expand(given)
    if path.is_dir():
        found = [str(path / name) for name in images_below(str(path))]
        if not found:
            raise ValueError(f"{given}: no image below this folder; needed files that end in {', '.join(EXTENSIONS)}")
        return found
    if not path.exists():
        raise ValueError(f"{given}: nothing there; needed a file, or a folder of images")
    return [str(path)]


def _rows(model: ServedModel, names: Sequence[str], answers: Answers, top: int) -> list[list[str]]:
    """Return a row per file: its classes and their probabilities, each expert's, and how far experts disagree."""
    rows, classes = [], model.class_names
    for b, name in enumerate(names):
        likely = np.argsort(-answers.probabilities_BC[b], kind="stable")[:top]
        said = [cell for c in likely for cell in (classes[c], f"{answers.probabilities_BC[b, c]:.4f}")]
        own_E = answers.experts_EBC[:, b].argmax(axis=1)
        if len(own_E) > 1:
            said += [cell for e, c in enumerate(own_E) for cell in (classes[c], f"{answers.experts_EBC[e, b, c]:.4f}")]
            said.append(f"{np.mean([one != other for one, other in itertools.combinations(own_E, 2)]):.2f}")
        rows.append([name, *said])
    return rows


def _heads(model: ServedModel, top: int) -> list[str]:
    likely = range(1, min(top, len(model.class_names)) + 1)
    places = [head + (str(place) if place > 1 else "") for place in likely for head in ("class", "probability")]
    experts = [head for name in model.description.expert_names for head in (name, f"probability, {name}")]
    return ["file", *places, *((*experts, "disagreement") if len(experts) > 2 else ())]


def _table(model: ServedModel, rows: list[list[str]], top: int) -> str:
    heads = _heads(model, top)
    left = [0, *(place for place, head in enumerate(heads) if not head.startswith(("probability", "disagreement")))]
    note = "disagreement: share of the pairs of experts that name different classes" if "disagreement" in heads else ""
    lines = text_table([heads, *rows], left=left, rule=True)
    return "\n".join([*lines, *([note] if note else [])])


def _csv(model: ServedModel, rows: list[list[str]], top: int) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_heads(model, top), *rows])
    return file.getvalue().rstrip("\n")
