"""Loader processes that fail: the training process says why, and does not wait for them."""

from __future__ import annotations

import errno
import os
import signal
import time

import numpy as np
import pytest
import torch

from experts.data.prefetch import LoaderLost, Prefetcher, Request


class Store:
    """Stands in for image files; every read calls a function in the loader process."""

    def __init__(self, action):
        self.action = action

    def read(self, positions, crops):
        return self.action(positions)


class HandsOver:
    """Stands in for pixels that cannot be handed over."""

    nbytes = 3 * 2**20

    def __init__(self, error):
        self.error = error

    def share_memory_(self):
        return self

    def __reduce__(self):
        raise self.error


class NoRoom(HandsOver):
    def share_memory_(self):
        raise self.error


def ended(number):
    return lambda positions: os.kill(os.getpid(), number)


def returned(value):
    return lambda positions: value


def odd(positions):
    class Local(Exception):  # of a type that no other process can name
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    raise Local("odd", "error")


def short_of_memory(positions):
    raise MemoryError("256 MiB")


FULL = RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")


@pytest.mark.parametrize(
    ("action", "kind", "text"),
    [
        (odd, RuntimeError, "Local: odd error"),
        (short_of_memory, MemoryError, "256 MiB"),
        (ended(signal.SIGKILL), MemoryError, "was killed"),
        (ended(signal.SIGTERM), LoaderLost, "SIGTERM"),
        (ended(signal.SIGBUS), ValueError, "MiB of /dev/shm are free; enlarge"),
        (returned(NoRoom(FULL)), ValueError, "a batch of 3.0 MiB: .* MiB of /dev/shm are free"),
        (returned(HandsOver(OSError(errno.EMFILE, "Too many open files"))), ValueError, "open files"),
        (returned(HandsOver(TypeError("no pickle"))), LoaderLost, "exit code 1"),
    ],
    ids=["odd", "memory", "killed", "terminated", "bus", "full", "files", "unsendable"],
)
def test_the_error_of_a_loader_process_is_raised_here_within_seconds(action, kind, text):
    prefetcher = Prefetcher(Store(action), 1)
    begun = time.monotonic()
    with pytest.raises(kind, match=text):
        list(prefetcher.read_all([Request(np.arange(2)), Request(np.arange(2))]))
    assert time.monotonic() - begun < 20
    prefetcher.close()


def test_another_pass_after_an_error_starts_new_processes():
    prefetcher = Prefetcher(Store(ended(signal.SIGKILL)), 1)
    with pytest.raises(MemoryError):
        list(prefetcher.read_all([Request(np.arange(2))]))
    prefetcher.store = Store(lambda positions: torch.from_numpy(positions.astype(np.uint8)))
    assert [values.tolist() for values in prefetcher.read_all([Request(np.arange(2))])] == [[0, 1]]
    prefetcher.close()
