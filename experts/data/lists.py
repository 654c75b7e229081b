"""Lists of images: text files of `path label` lines. Whoever wrote them, nothing in them is believed.

text       UTF-8 or with a byte-order mark; bytes that are no UTF-8 are looked for as they are, then as Windows' letters
form       blank, tab, comma or semicolon before the label, quotes, backslashes: whichever finds the first image
header     a first line without a number, before lines with one
labels     0 to C - 1 with dataset.num_classes = C; else any whole numbers, numbered anew in their order
repeats    a file twice, under two labels, or in two splits: counted and said

Nothing is decoded, and of the images only the first of each list is looked for: looking for each would take minutes on
a network.
"""

from __future__ import annotations

import codecs
import io
import os
import re
from typing import NamedTuple

import numpy as np

from experts.data.config import DatasetConfig
from experts.data.download import require_root
from experts.data.pools import FilePool, RawDataset
from experts.data.remarks import Remark, shown
from experts.data.repeats import repeated_files

LISTS = {"train_list": "training", "val_list": "validation", "test_list": "test"}
_LIKE_A_PATH = re.compile(r"[/\\]|\.\w{2,5}\b")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTAINERS = (
    (b"PK\x03\x04", "a zip file, as tables of Excel are; save it as CSV"),
    (b"\xd0\xcf\x11\xe0", "a table of Excel; save it as CSV"),
    (b"\x1f\x8b", "a gzip file; unpack it"),
)
_WINDOWS = "cp1252"
_SEPARATORS = {None: "a blank", "\t": "a tab", ",": "a comma", ";": "a semicolon"}  # None: any blanks
_NUMBER = re.compile(r"(\d+)(?:\.0*)?")  # tables are often saved with 3.0 for 3
_LABEL = re.compile(r"-?\d+(?:\.0*)?")  # -1 is what open sets are published with
_LABEL_FIRST = re.compile(r"\d+[\s,;]+\S*[^\s\d]")
_LIMIT = 2**63
_QUOTES = "\"'"
_COLUMN = re.compile(r"\s*[\t,;|]\s*")


def find_list(root: str | None, value: str) -> str | None:
    """Return where a list is: a bare name means the one in root; a path is looked up as given, then in root.

    Returns:
        None where it is in neither place.
    """
    given = os.path.expanduser(value)
    places = [given] if root is None else [os.path.join(os.path.expanduser(root), given), given]
    if os.path.dirname(given):
        places.reverse()
    return next((place for place in places if os.path.isfile(place)), None)


def open_image_list(config: DatasetConfig) -> RawDataset:
    """List the images of text files of `relative/path label` lines, as published for ImageNet-LT and Places-LT.

    A class is named after the folder of its images if every class has a folder of its own, else by its label.
    """
    root = require_root(config, "the folder that the paths in dataset.train_list are relative to")
    lists = {key: read_list(root, key, value) for key in LISTS if (value := getattr(config, key)) is not None}
    train = lists["train_list"]  # DatasetConfig refuses source=image_list without it
    if config.num_classes is None:
        labels = np.unique(train.labels)
    elif config.num_classes > len(train.labels):
        raise ValueError(
            f"dataset.num_classes = {config.num_classes}: {train.file} has {len(train.labels):,} images, so that some "
            f"class would have no training image; needed at least 1 of each; check dataset.num_classes"
        )
    else:
        labels = np.arange(config.num_classes)
    for key, one in lists.items():
        _refuse_labels(config, key, one, labels)
    pools = {key: FilePool(root, one.paths, np.searchsorted(labels, one.labels)) for key, one in lists.items()}
    remarks = [remark for one in lists.values() for remark in one.remarks]
    if len(labels) != labels[-1] + 1:
        remarks.append(
            Remark(
                "renumbered",
                len(labels),
                f"{train.file}: its {len(labels):,} labels are {_some(labels)}; the classes are numbered 0 to "
                f"{len(labels) - 1} in their order",
            )
        )
    remarks += repeated_files({LISTS[key]: pool for key, pool in pools.items()})
    return RawDataset(
        _class_names(pools["train_list"], labels),
        pools["train_list"],
        pools.get("val_list"),
        pools.get("test_list"),
        tuple(remarks),
    )


def _some(labels: np.ndarray) -> str:
    """Return labels as text, the first ones and the last."""
    values = [str(label) for label in labels[:3]]
    return ", ".join(values if len(labels) <= 3 else [*values, "...", str(labels[-1])])


def _refuse_labels(config: DatasetConfig, key: str, one: ImageList, labels: np.ndarray) -> None:
    """Raise ValueError for the first label that is not among those of the set."""
    unknown = np.flatnonzero(~np.isin(one.labels, labels))
    if not len(unknown):
        return
    label, line = one.labels[unknown[0]], one.line_numbers[unknown[0]]
    if config.num_classes is None:
        raise ValueError(
            f"dataset.{key} = {getattr(config, key)}: label {label} is not in dataset.train_list, whose labels are "
            f"{_some(labels)} ({one.file}:{line}); use lists of one set"
        )
    found = np.unique(one.labels)
    from_one = found[0] == 1 and found[-1] == config.num_classes
    remedy = "; its labels count from 1: leave dataset.num_classes unset, which takes any labels" if from_one else ""
    raise ValueError(
        f"{one.file}:{line}: label {label} is out of range; needed 0 to {config.num_classes - 1} "
        f"(dataset.num_classes = {config.num_classes}){remedy}"
    )


class ImageList(NamedTuple):
    """A list as read.

    Attributes:
        file: path of the list.
        paths: of the images, as the file system's bytes.
        labels: int64 [N], as written.
        line_numbers: from 1.
        remarks: what was not as usual.
    """

    file: str
    paths: np.ndarray
    labels: np.ndarray
    line_numbers: list[int]
    remarks: list[Remark]


class _Form(NamedTuple):
    """The form of a list's lines: what stands before the label, if any, and what is around or inside of a path."""

    separator: str | None
    quoted: bool = False
    backslashes: bool = False
    labelled: bool = True

    def split(self, line: str) -> tuple[str, str]:
        """Return path and label of a line, as text; both empty where it has no separator."""
        if not self.labelled:
            image, label = line, ""
        elif self.separator is None:
            parts = line.rsplit(None, 1)
            image, label = parts if len(parts) == 2 else ("", "")
        else:
            image, _, label = line.rpartition(self.separator)
            image, label = image.strip(), label.strip()
        if self.quoted:
            image, label = _unquoted(image), _unquoted(label)
        return image.replace("\\", "/") if self.backslashes else image, label


def _unquoted(text: str) -> str:
    inside = len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES
    return text[1:-1].replace('""', '"') if inside else text


_FORMS = [_Form(s, q, b) for b in (False, True) for q in (False, True) for s in _SEPARATORS]
_ALONE = [_Form(None, q, b, labelled=False) for b in (False, True) for q in (False, True)]


def read_list(root: str, key: str, value: str) -> ImageList:
    """Read and check one list.

    Raises:
        ValueError: there is no such file or no line in it, a line is not a path and a whole number, or the first image
            is not below root; names file and line.
    """
    file = find_list(root, value)
    if file is None:
        raise ValueError(
            f"dataset.{key} = {value}: no such file, here or in dataset.root = {root}; needed a text file "
            f"of `path label` lines"
        )
    lines, encoding = _lines(root, file)
    if not lines:
        raise ValueError(f"{file}: holds no image; needed at least one `path label` line (dataset.{key})")

    remarks = []
    form = _form_of(root, lines[0][1])
    if (
        form is None
        and len(lines) > 1
        and (form := _form_of(root, lines[1][1]))
        and not _names_a_file(root, lines[0][1])
        and not _LIKE_A_PATH.search(lines[0][1])  # of an image whose label is wrong
    ):
        text_of = shown(lines[0][1][:80])
        remarks.append(Remark("header", 1, f"{file}: its first line, '{text_of}', is taken for a header"))
        lines = lines[1:]
    elif form is None or _number(form.split(lines[0][1])[1]) is None:
        raise _bad_line(file, *lines[0])
    if encoding is not None:
        remarks.append(Remark("encoding", len(lines), f"{file}: read as {encoding}"))

    paths, labels = _parse(root, file, form, lines)
    # The first image alone: a wrong root fails for all of them.
    first = os.path.join(os.fsencode(root), paths[0])
    if not os.path.isfile(first):
        raise ValueError(
            f"{file}: its first image is not at {shown(first)}; {_elsewhere(root, lines[0][1])} "
            f"(line {lines[0][0]}: '{shown(lines[0][1][:80])}')"
        )
    return ImageList(file, paths, labels, [n for n, _ in lines], remarks)


def read_paths(root: str, file: str) -> np.ndarray:
    """Read the paths of a list whose labels, if it has any, do not matter; as the file system's bytes.

    Raises:
        ValueError: it is no text, holds no path, or its first image is not below root; names file and line.
    """
    lines, _ = _lines(root, file)
    if not lines:
        raise ValueError(f"{file}: holds no path; needed one image per line")
    found = ((lines[at:], form) for at in (0, 1) for form in (*_ALONE, *_FORMS) if _is_there(root, form, lines[at:]))
    taken = next(found, None)
    if taken is None:
        raise ValueError(
            f"{file}:{lines[0][0]}: '{shown(lines[0][1][:80])}' names no image below {root}; set dataset.root to the "
            f"folder that its paths are relative to"
        )
    rest, form = taken  # without a header
    return _as_stored(root, file, [os.fsencode(_path_of(root, line, form)) for _, line in rest])


def _path_of(root: str, line: str, form: _Form) -> str:
    """Return the path in a line of a list of paths; a line may have a label where the first had none, or none."""
    image, label = form.split(line)
    if form.labelled and _LABEL.fullmatch(label):
        return image
    # Words, or nothing, where a label would be: what is there decides.
    candidates = [image, *(other.split(line)[0] for other in (*_ALONE, *_FORMS))]
    return next((path for path in candidates if path and os.path.isfile(os.path.join(root, path))), image or line)


def _is_there(root: str, form: _Form, lines: list[tuple[int, str]]) -> bool:
    """Say whether the first of some lines names a file in a form, by its bytes or by the letters of Windows."""
    image = os.fsencode(form.split(lines[0][1])[0]) if lines else b""
    spellings = (image, _from_windows(image)) if image else ()
    return any(path and os.path.isfile(os.path.join(os.fsencode(root), path)) for path in spellings)


def _lines(root: str, file: str) -> tuple[list[tuple[int, str]], str | None]:
    """Return the lines of a list with their numbers, without empty ones and remarks, and its encoding as `_text`."""
    text, encoding = _text(file)
    lines = [(n, line.strip()) for n, line in enumerate(io.StringIO(text, newline=None), start=1) if line.strip()]
    return [(n, line) for n, line in lines if not (line.startswith("#") and not _names_a_file(root, line))], encoding


def _text(file: str) -> tuple[str, str | None]:
    """Return the text of a list, and the name of its encoding where it is not UTF-8.

    Raises:
        ValueError: it is no text.
    """
    with open(file, "rb") as opened:
        data = opened.read()
    for start, what in _CONTAINERS:
        if data.startswith(start):
            raise ValueError(f"{file}: is {what}")
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                if encoding == "utf-8":
                    return data[len(mark) :].decode(encoding, "surrogateescape"), None
                return data.decode(encoding), encoding.upper()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}: begins with the mark of {encoding.upper()} and is not ({error.reason} at byte "
                    f"{error.start}); save it as UTF-8"
                ) from None
    if b"\0" in data:
        at = data.index(b"\0")
        begin = data.rfind(b"\n", 0, at) + 1
        raise ValueError(
            f"{file}:{data.count(chr(10).encode(), 0, at) + 1}: found {data[begin : begin + 40]!r}, which has zero "
            f"bytes, as UTF-16 and files that are no text have; save it as UTF-8"
        )
    return data.decode("utf-8", "surrogateescape"), None


def _names_a_file(root: str, line: str) -> bool:
    """Say whether a line has the path of a file, with or without something after it."""
    candidates = [line, *(form.split(line)[0] for form in _FORMS)]
    return any(path and os.path.isfile(os.path.join(root, path)) for path in candidates)


def _form_of(root: str, line: str) -> _Form | None:
    """Return the form in which a line has a number and an image that exists, or else the first with a number."""
    fitting = [form for form in _FORMS if _number(form.split(line)[1]) is not None and form.split(line)[0]]
    there = (form for form in fitting if os.path.isfile(os.path.join(root, form.split(line)[0])))
    return next(there, fitting[0] if fitting else None)


def _number(label: str) -> int | None:
    """Return a label as a number, None where it is none; 2^63 for all that are too large."""
    match = _NUMBER.fullmatch(label)
    if match is None:
        return None
    digits = match[1].lstrip("0") or "0"
    return min(int(digits), _LIMIT) if len(digits) < 20 else _LIMIT


def _parse(root: str, file: str, form: _Form, lines: list[tuple[int, str]]) -> tuple[np.ndarray, np.ndarray]:
    paths, labels = [], []
    usual = form == _FORMS[0]
    for n, line in lines:
        image, label = line.rsplit(None, 1) if usual and " " in line else form.split(line)
        if line[0] in _QUOTES or line[-1] in _QUOTES:
            image, label = _where_needed(root, image), _unquoted(label)
        number = int(label) if label.isdecimal() and len(label) < 19 else _number(label)
        if not image or number is None or number >= _LIMIT:
            raise _bad_line(file, n, line, form)
        paths.append(os.fsencode(image))
        labels.append(number)
    # Bytes, not text: a name that is not UTF-8 survives, and millions of paths take a quarter of the memory.
    return _as_stored(root, file, paths), np.array(labels, dtype=np.int64)


def _as_stored(root: str, file: str, paths: list[bytes]) -> np.ndarray:
    """Return paths as the file system has them, where a list was written with the letters of Windows.

    Raises:
        ValueError: the first path that is no UTF-8 is there in neither way.
    """
    odd = [at for at, path in enumerate(paths) if not path.isascii() and not _is_utf8(path)]
    if odd:
        first = paths[odd[0]]
        there = os.path.isfile(os.path.join(os.fsencode(root), first))
        other = _from_windows(first)
        if not there and not (other and os.path.isfile(os.path.join(os.fsencode(root), other))):
            raise ValueError(
                f"{file}: '{shown(first)}' is no UTF-8, and there is no such file, nor with the letters of Windows "
                f"({_WINDOWS}); save the list as UTF-8"
            )
        if not there:
            for at in odd:
                paths[at] = _from_windows(paths[at]) or paths[at]
    return np.array(paths)


def _is_utf8(path: bytes) -> bool:
    try:
        path.decode()
    except UnicodeDecodeError:
        return False
    return True


def _from_windows(path: bytes) -> bytes | None:
    try:
        return path.decode(_WINDOWS).encode()
    except UnicodeDecodeError:
        return None


def _where_needed(root: str, image: str) -> str:
    """Return a path without its quotes: some writers put them around those alone that have a comma in them."""
    return image if os.path.isfile(os.path.join(root, image)) else _unquoted(image)


def _bad_line(file: str, number: int, line: str, form: _Form | None = None) -> ValueError:
    """Return the error of a line that is none, with what is probably meant.

    Args:
        form: of the list's other lines; None where it is the first.
    """
    label = next((label for form in _FORMS if _number(label := form.split(line)[1]) == _LIMIT), None)
    if label is not None:
        return ValueError(
            f"{file}:{number}: label {label[:40]} is too large; needed a whole number below 2^63 (labels are numbers "
            f"of classes)"
        )
    other = next((form for form in _FORMS if form.split(line)[0] and _number(form.split(line)[1]) is not None), None)
    hint = ""
    if _LABEL_FIRST.match(line):
        hint = "found the label first, it comes last"
    elif form is not None and other is not None:
        hint = f"other lines have {_SEPARATORS[form.separator]} before the label, this one has not"
    elif line[0] in "{[":
        hint = "found JSON, needed plain lines"
    elif between := re.search(r"([|:])\s*\d+$", line):
        hint = f"found '{between[1]}' before the label, needed a blank, tab, comma or semicolon"
    elif len(columns := _COLUMN.split(line)) > 2:
        hint = f"found {len(columns)} columns, needed path and label alone"
    elif re.search(r"[\s,;][\"']?[^\W\d_]\S*$", line):
        hint = "found a word last: number the classes from 0"
    return ValueError(
        f"{file}:{number}: found '{shown(line[:80])}'; needed `path label`, the label a whole number from 0"
        f"{f'; {hint}' if hint else ''}"
    )


def _elsewhere(root: str, line: str) -> str:
    """Return what to do about a first line whose image is not where it says."""
    if re.match(r"[\"']?[A-Za-z]:[\\/]", line):
        return "that is a path of Windows; write paths that are relative to dataset.root"
    if re.match(r"[\"']?\w+://", line):
        return "that is a URL; write paths that are relative to dataset.root"
    columns = _COLUMN.split(line)
    if len(columns) > 2 and any(os.path.isfile(os.path.join(root, _unquoted(column))) for column in columns):
        return f"found {len(columns)} columns, one of them the path; keep path and label alone"
    return "set dataset.root to the folder that its paths are relative to"


def _class_names(pool: FilePool, labels: np.ndarray) -> tuple[str, ...]:
    folders: dict[int, str] = {}
    numbers = tuple(map(str, labels.tolist()))
    for path, label in zip(pool.paths.tolist(), pool.labels.tolist(), strict=True):
        folder = os.path.dirname(os.fsdecode(path))
        if folders.setdefault(label, folder) != folder:
            return numbers

    # Two folders of the same name in different places would give two classes one name; then numbers are clearer.
    names = [os.path.basename(folders.get(c, "")) for c in range(len(labels))]
    return tuple(names) if len(set(names)) == len(labels) and all(names) else numbers
