"""Read the data in a pickle file without ever running it.

Pickle is a program for a small machine, and two of its instructions call any function by name. Here the instructions
are walked with `pickletools`, and interpreted only where they build dicts, lists, tuples, text, bytes, numbers and
arrays of bytes. The few names that NumPy's arrays need are symbols, compared and never imported. All else is refused.
"""

from __future__ import annotations

import os
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

_RECONSTRUCT = {("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")}
_NDARRAY, _DTYPE, _ENCODE = ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")
_SYMBOLS = {*_RECONSTRUCT, _NDARRAY, _DTYPE, _ENCODE}
_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINBYTES",
    "SHORT_BINBYTES",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
}
_IGNORED = {"PROTO", "FRAME"}
_PLAIN = {int, str, bytes, bool, type(None)}


class _Symbol(tuple):
    """(module, name) of something a pickle wants to import."""


class _Array:
    """An array under construction: `BUILD` gives it a shape and its bytes."""

    value: np.ndarray | None = None

    def build(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Bytes) or fortran:
            raise ValueError("an array of something else than bytes in C order")
        raw = data.encode("latin-1") if isinstance(data, str) else data
        self.value = np.frombuffer(raw, dtype=np.uint8).reshape(shape)


class _Bytes:
    """The data type of unsigned bytes; its state (byte order, alignment) says nothing more."""

    def build(self, state: tuple[Any, ...]) -> None:
        del state


def read_pickled_data(path: str) -> Any:
    """The dicts, lists, texts, numbers and uint8 arrays of a pickle file, protocol 0 to 4, of Python 2 or 3.

    Bytes strings of Python 2 become text (latin-1), as its dict keys should be.

    Raises:
        ValueError: the file cannot be read, is truncated, or holds anything else; names the file. Nothing is run.
    """
    try:
        with open(path, "rb") as file:
            return _finished(_interpret(file))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check dataset.root and its permissions") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        size = os.path.getsize(path)
        raise ValueError(
            f"{path} ({size} bytes): not a data file of CIFAR ({error}); needed dicts, lists, text, "
            f"numbers and byte arrays only, whole; fetch the file again"
        ) from None


def _interpret(file: Any) -> Any:  # noqa: PLR0912, PLR0915 - a branch for each instruction
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = max(i for i, item in enumerate(stack) if item is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    argument: Any
    for opcode, argument, _position in pickletools.genops(file):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name == "LIST":
            stack.append(since_mark())
        elif name == "DICT":
            items = since_mark()
            stack.append(dict(zip(items[::2], items[1::2], strict=True)))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ", 1) if name == "GLOBAL" else [stack.pop(), stack.pop()][::-1]
            stack.append(_symbol(tuple(parts)))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_construct(stack.pop(), arguments))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], (_Array, _Bytes)):
                raise ValueError(f"it sets the state of a {type(stack[-1]).__name__}")
            stack[-1].build(state)
        elif name == "STOP":
            return stack.pop()
        elif name not in _IGNORED:
            raise ValueError(f"it uses the pickle instruction {name}")
    raise ValueError("it ends too early")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {kind.__name__} was expected where there is a {type(value).__name__}")
    return value


def _symbol(name: tuple[str, ...]) -> _Symbol:
    if name not in _SYMBOLS:
        raise ValueError(f"it asks for {'.'.join(name)}, which is refused")
    return _Symbol(name)


def _construct(symbol: Any, arguments: tuple[Any, ...]) -> Any:
    """What calling a symbol would give. Only the symbols of `_SYMBOLS` get here, and none of them is called."""
    if _expect(symbol, _Symbol) in _RECONSTRUCT:
        if arguments[0] != _NDARRAY:
            raise ValueError("an array of a kind other than numpy.ndarray")
        return _Array()
    if symbol == _DTYPE:
        if arguments[0] not in ("u1", "|u1"):
            raise ValueError(f"an array of type {arguments[0]}")
        return _Bytes()
    if symbol == _ENCODE:
        text, encoding = arguments
        if encoding != "latin1":
            raise ValueError(f"bytes in the encoding {encoding}")
        return text.encode("latin-1")
    raise ValueError(f"it calls {'.'.join(symbol)}, which is refused")


def _finished(value: Any) -> Any:
    """Replace arrays under construction by the arrays, and refuse what is no data."""
    if type(value) in _PLAIN:
        return value
    if type(value) is dict:
        return {k.decode("latin-1") if isinstance(k, bytes) else k: _finished(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_finished(v) for v in value)
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    raise ValueError("it holds something that is no data")
