"""`expertail predict`: what a trained ensemble says of image files.

    expertail predict runs/ride-birds-s0 photos/ one.jpg --top 5
    expertail predict models:/expertail-birds/3 photos/ --csv said.csv

Files go through the preprocessing of the run's own evaluation, whatever their format and size. A file that cannot be
read costs a line on standard error; the others are answered.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aggregation.answers import in_words
from aggregation.serving import ServedModel, load_model
from experts.data.cpus import usable_cpus
from experts.data.decode import UnreadableImage, decode_file
from experts.data.files import EXTENSIONS, images_below
from orchestration.config.messages import say
from orchestration.config.paths import expand
from orchestration.results.text import plural, text_table
from orchestration.storage.files import write_atomic
from orchestration.tracking.models import model_folder

_BATCH = 64  # images computed at once
_DECODERS = 8  # whole pictures in memory at once, at most
_STDOUT = "-"
_ONLY_RANKS = "probability: a softmax of scores that only rank the classes, since the run's loss trains none"


@dataclass(frozen=True)
class Options:
    """The form of the answers.

    Attributes:
        which: "best" or "last", of a run's models.
        stage: the final stage whose model answers; "" for the run's own result.
        top: classes named per image, at least 1.
        csv: a file for CSV in the place of a table, "-" for standard output; None for the table.
    """

    which: str = "best"
    stage: str = ""
    top: int = 3
    csv: str | None = None


def predict(source: str, given: Sequence[str], options: Options) -> tuple[str, int]:
    """Return what a model says of files, as text to print, and how many of them could not be read.

    Args:
        source: a run folder or its URL, the folder of an exported or of an MLflow model, or the URI of an MLflow model.
        given: files, and folders whose images are answered, those below them too.
        options: how to answer.

    Raises:
        ValueError: there is no such model, file or folder, a folder has no image, or no file could be read.
    """
    if options.top < 1:
        raise ValueError(f"--top {options.top}: needed at least 1")
    _check_csv(options.csv)
    files = [file for one in given for file in _files(one)]
    with model_folder(source, options.which, options.stage) as folder:
        model = load_model(folder)
    answered: list[tuple[str, dict[str, Any]]] = []
    frames = _framed(model, files)
    while batch := list(itertools.islice(frames, _BATCH)):
        answers = model.ask(torch.stack([frame for _, frame in batch]))
        said = in_words(answers, model.class_names, model.description.expert_names, options.top)
        answered += zip((file for file, _ in batch), said, strict=True)
    unread = len(files) - len(answered)
    if not answered:
        raise ValueError(f"none of {plural(len(files), 'file')} could be read; needed images")
    if unread:
        say(f"{unread:,} of {plural(len(files), 'file')} could not be read")
    notes = [] if model.description.gives_probabilities else [_ONLY_RANKS]
    if options.csv is None:
        return "\n".join([_table(answered), *notes]), unread
    for note in notes:
        say(note)
    text = _csv(answered)
    if options.csv == _STDOUT:
        return text, unread
    write_atomic(expand(options.csv), text + "\n")
    return f"{options.csv}: answers for {plural(len(answered), 'file')}", unread


def _check_csv(file: str | None) -> None:
    """Refuse a file that answers cannot be written to before anything is computed, or that may be an image.

    Raises:
        ValueError: names it.
    """
    if file in (None, _STDOUT):
        return
    path = expand(str(file))
    if path.suffix.lower() != ".csv":  # else --csv a.jpg b.jpg would replace an image
        raise ValueError(f"--csv {file}: needed a file whose name ends in .csv, or - for standard output")
    if not path.parent.is_dir():
        raise ValueError(f"--csv {file}: {path.parent} is no folder; needed one that exists")


def _framed(model: ServedModel, files: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield files that can be read with their pictures, as the network sees them, in the files' order.

    Threads decode a few files ahead; decoding releases Python's global lock. Each brings its picture to the frame at
    once, so that never more whole pictures are in memory than there are threads.
    """

    def framed(file: str) -> Tensor:
        return model.frame(decode_file(file))

    workers = min(_DECODERS, usable_cpus())
    waiting: deque[tuple[str, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(workers) as threads:
        for file in itertools.chain(files, [None] * 2 * workers):
            if file is not None:
                waiting.append((file, threads.submit(framed, file)))
            if waiting and (file is None or len(waiting) > 2 * workers):
                first, frame = waiting.popleft()
                try:
                    yield first, frame.result()
                except UnreadableImage as problem:
                    say(f"{problem.path}: {problem.reason}")


def _files(given: str) -> list[str]:
    """Return a file, or the images below a folder."""
    if not given:  # of a shell's variable that is not set; it would be the current folder
        raise ValueError("found an empty word; needed a file, or a folder of images")
    path = expand(given)
    if path.is_dir():
        found = [str(path / name) for name in images_below(str(path))]
        if not found:
            raise ValueError(f"{given}: no image below this folder; needed files that end in {', '.join(EXTENSIONS)}")
        return found
    if not path.exists():
        raise ValueError(f"{given}: nothing there; needed a file, or a folder of images")
    return [str(path)]


def _cells(said: dict[str, Any]) -> list[str]:
    """Return the cells of an answer: classes and their probabilities, each expert's, and how far experts disagree."""
    cells = [cell for one in said["top"] for cell in (one["class"], f"{one['probability']:.4f}")]
    if len(said["experts"]) > 1:  # one expert says what the ensemble says
        cells += [cell for one in said["experts"].values() for cell in (one["class"], f"{one['probability']:.4f}")]
        cells.append(f"{said['disagreement']:.2f}")
    return cells


def _heads(said: dict[str, Any]) -> list[str]:
    """Return the headings of `_cells`, with that of the file before them."""
    likely = range(1, len(said["top"]) + 1)
    places = [head + (str(place) if place > 1 else "") for place in likely for head in ("class", "probability")]
    experts = [head for name in said["experts"] for head in (name, f"probability, {name}")]
    return ["file", *places, *((*experts, "disagreement") if len(said["experts"]) > 1 else ())]


def _table(answered: Sequence[tuple[str, dict[str, Any]]]) -> str:
    heads = _heads(answered[0][1])
    left = [0, *(place for place, head in enumerate(heads) if not head.startswith(("probability", "disagreement")))]
    note = "disagreement: share of the pairs of experts that name different classes" if "disagreement" in heads else ""
    rows = [[file, *_cells(said)] for file, said in answered]
    return "\n".join([*text_table([heads, *rows], left=left, rule=True), *([note] if note else [])])


def _csv(answered: Sequence[tuple[str, dict[str, Any]]]) -> str:
    rows = [[file, *_cells(said)] for file, said in answered]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_heads(answered[0][1]), *rows])
    return text.getvalue().rstrip("\n")
