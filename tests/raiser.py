"""An actor that raises errors that Ray alone would lose, and their types. Imports next to nothing."""

from __future__ import annotations

import threading

from orchestration.cluster.sending import carries_anything

NAME = "caf\udce9.jpg"  # as Python reads the bytes c a f e9 . j p g


class TwoArguments(ValueError):
    """Pickled with one argument, so that it cannot be built again."""

    def __init__(self, path, line):
        super().__init__(f"{path}:{line}")


class HoldsALock(ValueError):
    """Cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class PickleRaises(ValueError):
    """Fails in a way that Ray does not expect."""

    def __reduce__(self):
        raise AttributeError("no state")


class Silent(ValueError):
    """Has a fault in its text."""

    def __str__(self):
        raise ZeroDivisionError


class Choosy(RuntimeError):
    """Cannot be made without two keywords, nor be subclassed as Ray does."""

    def __new__(cls, *, this, that):
        return super().__new__(cls, this, that)

    def __init__(self, *, this, that):
        super().__init__(f"{this} and {that}")


@carries_anything
class Raiser:
    """Answers and raises what it is asked to."""

    def give_back(self, value):
        return value

    def fail(self, name):
        if name == "exit":
            raise SystemExit(3)
        raise {
            "bytes": lambda: ValueError(NAME),
            "two": lambda: TwoArguments("list.txt", 3),
            "lock": lambda: HoldsALock("no class folder"),
            "pickle": lambda: PickleRaises("no image"),
            "silent": Silent,
            "large": lambda: ValueError("x" * 10**6),
        }[name]()
