"""Randomness by key and position: the same numbers for every process, in whatever pieces they are asked for.

A key is a stable hash of the words that name a stream, e.g. (seed, stage, epoch, stream, "pixels"). Numbers come from
Philox, a counter-based generator: number i of a stream is a function of (key, i), so none has to be drawn before it.
That makes a resumed run, another number of replicas and another number of loader processes see the same pixels.

Only Philox's raw 64-bit words are used. NumPy promises that they never change; it may change its distributions.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import MutableSequence
from typing import Any

import numpy as np

WORDS_PER_BLOCK = 4  # 64-bit words for each step of Philox's counter


def key(*parts: int | str) -> int:
    """Return a 128-bit key that names a stream; equal parts give equal keys on every machine and in every process."""
    # JSON keeps 1 apart from "1" and ("ab", "c") from ("a", "bc"); Python's own hash() differs from process to process.
    text = json.dumps(parts, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:16], "little")


def words(key: int, first_block: int, num_blocks: int) -> np.ndarray:
    """Return raw words of a stream, uint64 [4 num_blocks], starting at a block."""
    return np.random.Philox(key=key).advance(first_block).random_raw(WORDS_PER_BLOCK * num_blocks)


def uniforms(key: int, first_position: int, count: int, width: int) -> np.ndarray:
    """Return rows first_position .. first_position + count - 1 of an endless table, float64 [count, width] in [0, 1).

    Row i depends on (key, i, width) alone: every row begins at a block of its own, and the rest of its last block is
    left unused.
    """
    blocks = -(-width // WORDS_PER_BLOCK)
    raw = words(key, first_position * blocks, count * blocks)
    # The upper 53 bits of a word fill the fraction of a float64 exactly, so 1.0 cannot come out.
    return (raw.reshape(count, blocks * WORDS_PER_BLOCK)[:, :width] >> np.uint64(11)) * 2.0**-53


def permutation(key: int, n: int) -> np.ndarray:
    """Return a uniformly random order of 0 .. n - 1, int64 [n]: the order that sorts n random words."""
    return np.argsort(words(key, 0, -(-n // WORDS_PER_BLOCK))[:n], kind="stable")


class KeyedRandom(random.Random):
    """Python's `random.Random` over a keyed stream, for algorithms that take a generator as an argument.

    `shuffle`, `randint` and the like are as uniform as the original ones but give other sequences. They are defined
    here word by word, so that no version of Python changes them.
    """

    def __init__(self, key: int) -> None:
        super().__init__()
        self._philox = np.random.Philox(key=key)
        self._words: list[int] = []

    def seed(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the key is the seed."""

    def getstate(self) -> tuple[Any, ...]:
        """Raise NotImplementedError: a keyed generator is built again from its key."""
        raise NotImplementedError("a KeyedRandom has no state to save; build it from its key")

    def setstate(self, state: tuple[Any, ...]) -> None:
        """Raise NotImplementedError: a keyed generator is built again from its key."""
        raise NotImplementedError("a KeyedRandom has no state to load; build it from its key")

    def _word(self) -> int:
        try:
            return self._words.pop()
        except IndexError:
            self._words = self._philox.random_raw(1024).tolist()
            return self._words.pop()

    def random(self) -> float:
        """Return a uniform number in [0, 1), 53 bits."""
        return (self._word() >> 11) * 2.0**-53

    def getrandbits(self, k: int, /) -> int:
        """Return a uniform k-bit integer."""
        value = 0
        for _ in range(-(-k // 64)):
            value = value << 64 | self._word()
        return value >> (-k % 64)  # drop the bits beyond k

    def _randbelow(self, n: int) -> int:
        return self._word() * n >> 64  # bias below n / 2^64

    def randint(self, a: int, b: int) -> int:
        """Return a uniform whole number, a and b included."""
        return a + (self._word() * (b - a + 1) >> 64)

    def shuffle(self, x: MutableSequence[Any]) -> None:
        """Bring a list into a uniformly random order, in place, by sorting random words."""
        if len(x) > 1:
            order = np.argsort(self._philox.random_raw(len(x)), kind="stable")
            x[:] = [x[i] for i in order.tolist()]
