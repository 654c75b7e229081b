"""Randomness by key and position: the same numbers whoever asks, in whatever pieces.

A key is a stable hash of what names a stream, e.g. (seed, stage, epoch, stream, "pixels"). Numbers come from Philox, a
counter-based generator: number i of a stream is a function of (key, i), so nothing has to be generated before it.
Only Philox's raw 64-bit words are used; NumPy promises those for ever, its distributions it may change.
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
    """A 128-bit key that names a stream; equal parts give equal keys on every machine and in every process."""
    text = json.dumps(parts, separators=(",", ":")).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:16], "little")


def words(key: int, first_block: int, num_blocks: int) -> np.ndarray:
    """Raw words of a stream, uint64 [4 num_blocks], starting at a block."""
    return np.random.Philox(key=key).advance(first_block).random_raw(WORDS_PER_BLOCK * num_blocks)


def uniforms(key: int, first_position: int, count: int, width: int) -> np.ndarray:
    """Rows first_position .. first_position + count - 1 of an endless table, float64 [count, width] in [0, 1).

    Row i depends on (key, i, width) alone.
    """
    blocks = -(-width // WORDS_PER_BLOCK)
    raw = words(key, first_position * blocks, count * blocks)
    return (raw.reshape(count, blocks * WORDS_PER_BLOCK)[:, :width] >> np.uint64(11)) * 2.0**-53


def permutation(key: int, n: int) -> np.ndarray:
    """A uniformly random order of 0 .. n - 1, int64 [n]."""
    return np.argsort(words(key, 0, -(-n // WORDS_PER_BLOCK))[:n], kind="stable")


class KeyedRandom(random.Random):
    """Python's `random.Random` over a keyed stream, for algorithms that take an injected source.

    `shuffle`, `randrange` and their like are as uniform as the original's but give other sequences; they are
    defined here word by word, so that no version of Python changes them.
    """

    def __init__(self, key: int) -> None:
        super().__init__()
        self._philox = np.random.Philox(key=key)
        self._words: list[int] = []

    def seed(self, *args: Any, **kwargs: Any) -> None:
        """Has no effect: the key is the seed."""

    def getstate(self) -> tuple[Any, ...]:
        """Refused: a keyed source is made again from its key."""
        raise NotImplementedError("a KeyedRandom has no state to save; build it from its key")

    def setstate(self, state: tuple[Any, ...]) -> None:
        """Refused: a keyed source is made again from its key."""
        raise NotImplementedError("a KeyedRandom has no state to load; build it from its key")

    def _word(self) -> int:
        try:
            return self._words.pop()
        except IndexError:
            self._words = self._philox.random_raw(1024).tolist()
            return self._words.pop()

    def random(self) -> float:
        """Uniform in [0, 1), 53 bits."""
        return (self._word() >> 11) * 2.0**-53

    def getrandbits(self, k: int, /) -> int:
        """Uniform k-bit integer."""
        value = 0
        for _ in range(-(-k // 64)):
            value = value << 64 | self._word()
        return value >> (-k % 64)

    def _randbelow(self, n: int) -> int:
        return self._word() * n >> 64  # bias below n / 2^64

    def randint(self, a: int, b: int) -> int:
        """Uniform whole number, a and b included."""
        return a + (self._word() * (b - a + 1) >> 64)

    def shuffle(self, x: MutableSequence[Any]) -> None:
        """Put a list in a uniformly random order, in place, by sorting random words."""
        if len(x) > 1:
            order = np.argsort(self._philox.random_raw(len(x)), kind="stable")
            x[:] = [x[i] for i in order.tolist()]
