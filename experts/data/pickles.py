"""Read the fields of CIFAR's pickled files, and run nothing that a file names.

A pickle is a program whose instructions may call any function by name. Python's manual offers `Unpickler.find_class` to
decide what a name means. Here it knows the five names that NumPy's arrays need. They mean the classes below, which hold
bytes and do nothing else: no name is imported, and nothing of NumPy is called with what a file says. No other file of
the program imports `pickle`; tests/unit/test_security.py states the exception.

Guarded: every other name, including those behind methods, attributes and registered extensions; data types other than
bytes; lengths and memo places beyond the file's own size, for which the unpickler would claim memory before it reads
(9 bytes can ask for 34 GB); deep nesting, which it walks without recursion.

Not guarded: time and memory in proportion to a file, and a file that is made to use its own parts again and again. It
can fill the memory of the process or keep it busy, as a huge image can; it cannot run anything.
"""

from __future__ import annotations

import os
import pickle
import pickletools
from textwrap import shorten
from typing import Any, BinaryIO

import numpy as np

_NDARRAY = "numpy.ndarray"  # only ever an argument, so a word will do


def _shown(word: Any) -> str:
    """Return a word for a message, but never a list: lists may hold each other, and be endless when written out."""
    return word if isinstance(word, str) else f"({type(word).__name__})"


class _StandIn:
    """Stands for something of NumPy or Python. A pickle sets state by `__setstate__`, and can do so to these classes
    only by a call without an instance, which fails: so no file changes them for the next one."""

    def __setstate__(self, state: Any) -> None:
        del state


class _Bytes(_StandIn):
    """The data type of unsigned bytes; its state (byte order, alignment) says nothing more."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        if name not in ("u1", "|u1"):
            raise ValueError(f"an array of type {_shown(name)}")


class _Array(_StandIn):
    """An array, empty until its state gives it shape and bytes."""

    value: np.ndarray | None = None

    def __init__(self, kind: str, shape: tuple[int, ...], code: bytes | str) -> None:
        if kind != _NDARRAY:
            raise ValueError("an array of a kind other than numpy.ndarray")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Bytes) or fortran:
            raise ValueError("an array of something else than bytes in C order")
        raw = data.encode("latin-1") if isinstance(data, str) else data
        self.value = np.frombuffer(raw, dtype=np.uint8).reshape(shape)


class _Latin1(_StandIn, bytes):
    """Bytes that protocol 2 of Python 3 writes as text to be encoded."""

    def __new__(cls, text: str, encoding: str) -> _Latin1:
        if encoding != "latin1":
            raise ValueError(f"bytes in the encoding {_shown(encoding)}")
        return super().__new__(cls, text.encode("latin-1"))


_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Bytes,
    ("_codecs", "encode"): _Latin1,
}


class _DataUnpickler(pickle.Unpickler):
    """Builds data: all that a file may name are the stand-ins above."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise ValueError(f"it asks for {module}.{name}, which is refused")
        return _NAMES[module, name]


def read_pickled_fields(path: str) -> dict[str, Any]:
    """Return the fields of a pickled dict, protocol 0 to 4, of Python 2 or 3.

    Byte strings of Python 2 become text (latin-1), as the names of its fields should be.

    Returns:
        Name to uint8 array, list, text or number; what lies inside a list is as the file says.

    Raises:
        ValueError: the file cannot be read, is truncated, or holds anything else; names the file. Nothing is run.
    """
    try:
        with open(path, "rb") as file:
            _check_sizes(file)
            file.seek(0)
            content = _DataUnpickler(file, encoding="latin1").load()
        if type(content) is not dict:
            raise ValueError(f"it holds a {type(content).__name__}")
        return {_text(name): _finished(value) for name, value in content.items()}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check dataset.root and its permissions") from None
    except Exception as error:  # the manual has no complete list of what a damaged pickle raises
        reason = shorten(str(error) or type(error).__name__, 200)
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes): not a data file of CIFAR ({reason}); "
            f"needed a dict of lists, text, numbers and byte arrays only, whole; fetch the file again"
        ) from None


def _check_sizes(file: BinaryIO) -> None:
    """Raise ValueError where a length or a memo place is beyond the file: the unpickler would claim it all at once."""
    size = os.fstat(file.fileno()).st_size
    for opcode, argument, _position in pickletools.genops(file):  # raises where a length is more than there is
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > size:
            raise ValueError(f"it keeps something at place {argument}")


def _text(name: Any) -> str:
    if not isinstance(name, str | bytes):
        raise ValueError(f"it has a field called by a {type(name).__name__}")
    return name.decode("latin-1") if isinstance(name, bytes) else name


def _finished(value: Any) -> Any:
    """Return the array that an `_Array` holds, and other data as it is."""
    if not isinstance(value, _Array):
        return value
    if value.value is None:
        raise ValueError("it holds an array without content")
    return value.value
