"""Send arguments, answers and errors of actors through Ray, whatever text and whichever types they hold.

Ray alone loses some of them, and the worker with them. Plain lists, dicts and strings travel in a format that knows
UTF-8 only, and so do the traces of errors; a file's name may have other bytes, which Python holds as lone surrogates.
An error that cannot be pickled, or not built again from its pickle, arrives as a failure of Ray. One that is larger
than Ray's store never arrives.

`call` and `carries_anything` are the two ends of a call. Values are pickled, which keeps every string. An error that
would not arrive as it is goes as a plain one of the nearest type, or else as a `WorkerFault`.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from ray.exceptions import RayTaskError

from experts.data.names import readable

LONGEST = 16_384
"""Characters of an error's text, and of the trace of an unexpected one, that are sent."""
_REFUSALS = (ValueError, FloatingPointError, MemoryError, OSError)
"""Types with a meaning to the driver (failures.py)."""

ActorClass = TypeVar("ActorClass", bound=type)


class WorkerFault(RuntimeError):
    """An error of a worker that cannot be sent as it is.

    Attributes:
        kind: name of its type.
        text: what it said.
        trace: where it was raised, ending in kind and text.
    """

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(kind, text, trace)  # built again from these in the other process
        self.kind, self.text, self.trace = kind, text, trace

    def __str__(self) -> str:
        return self.trace


class _Pickled:
    """A value that Ray pickles whole, and that arrives as the value itself."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._value,)


def _itself(value: Any) -> Any:
    return value


def whole(value: Any) -> Any:
    """Return a stand-in for a value that arrives in another process as the value, whatever text it holds."""
    return _Pickled(value) if isinstance(value, str | list | dict) else value


def call(method: Any, *args: Any) -> Any:
    """Call an actor's method with arguments of any text. Returns the promise of its answer."""
    return method.remote(*map(whole, args))


def carries_anything(actor: ActorClass) -> ActorClass:
    """Let the public methods of an actor's class answer with any text and raise any error. A class decorator."""
    for name, method in vars(actor).copy().items():
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(actor, name, _carrying(method))
    return actor


def _carrying(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def answer(*args: Any, **kwargs: Any) -> Any:
        try:
            return whole(method(*args, **kwargs))
        except KeyboardInterrupt:  # Ray's way to cancel a call
            raise
        except BaseException as error:  # SystemExit too: Ray would take it for the wish to end this process
            if isinstance(error, Exception) and arrives(error):
                raise
            sent = plain(error)
        raise sent

    return answer


def arrives(error: Exception) -> bool:
    """Say whether Ray brings an error to another process as what it is, with its trace."""
    try:
        trace = "".join(traceback.format_exception(error))
        again = _built_again(error)
        RayTaskError("method", "", again).make_dual_exception_instance()
        return type(again) is type(error) and str(again) == str(error) and _fits(trace)
    except Exception:
        return False


def _built_again(error: Exception) -> Exception:
    """Return what the other process would make of an error, from what a pickle of it has.

    Raises:
        ValueError: it is of a type that the other process does not find, or holds more than plain values.
        Exception: whatever its own methods raise.
    """
    reduced: Any = error.__reduce_ex__(2)
    kind, parts, *state = reduced
    found: Any = sys.modules.get(getattr(kind, "__module__", ""))
    for name in getattr(kind, "__qualname__", "?").split("."):
        found = getattr(found, name, None)
    if kind is not type(error) or found is not kind or not _is_plain([parts, *state]):
        raise ValueError("not to be sent as it is")
    again: Exception = kind(*parts)
    if state:
        again.__setstate__(state[0])
    return again


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return _is_plain([*value, *value.values()])
    return value is None or type(value) in (str, bytes, int, float, bool)


def plain(error: BaseException) -> Exception:
    """Return an error that arrives anywhere and has the same meaning: the nearest plain type, and readable text."""
    said = _said(error)
    if isinstance(error, OSError) and error.errno is not None:
        # The driver looks at number and file; the number makes the subclass.
        strerror, filename = readable(error.strerror or os.strerror(error.errno)), error.filename
        name = (
            None if filename is None else readable(os.fsdecode(filename) if isinstance(filename, bytes) else filename)
        )
        return OSError(error.errno, _shortened(strerror), *([] if name is None else [_shortened(str(name))]))
    for kind in type(error).__mro__:
        if issubclass(kind, _REFUSALS):
            candidate = _built(kind, said)
            if candidate is not None and arrives(candidate):
                return candidate
    return WorkerFault(type(error).__name__, said, _trace(error, said))


def _built(kind: type[BaseException], text: str) -> Exception | None:
    """Return an error of a type that says the text, if the type can be made of a text alone."""
    try:
        made = kind(text)
        return made if isinstance(made, Exception) and str(made) == text else None
    except Exception:
        return None


def _said(error: BaseException) -> str:
    try:
        return _shortened(readable(str(error)))
    except Exception as problem:  # a __str__ with a fault of its own
        return f"{type(error).__name__} without a text ({type(problem).__name__} while it was made)"


def _trace(error: BaseException, said: str) -> str:
    lines = traceback.format_tb(error.__traceback__)
    return _shortened(readable("".join(lines))) + f"{type(error).__name__}: {said}"


def _shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"


def _fits(text: str) -> bool:
    return len(text) <= 4 * LONGEST and readable(text) == text
