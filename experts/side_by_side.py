"""Experts that compute at the same time on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

Result = Any


def side_by_side(run: Callable[..., Result], experts: Iterable[nn.Module], *others: Iterable[Any]) -> list[Result]:
    """Return `run(expert, *other)` for every expert, as `map` does; on a GPU the experts compute at the same time.

    Each then has a CUDA stream of its own, which waits for all that was asked for before and is waited for by all that
    is asked for afterwards. Autograd goes back through an expert on the same stream. Experts that exchange with other
    workers while they run (`exchanges`) take turns: there a captured step is cut, and no stream may be left in it.

    Args:
        run: computes with one expert.
        experts: on one device.
        others: as many values each as there are experts.
    """
    # Memory needs no further care. What an expert reads was made before the fork, and is freed after the join at the
    # earliest; what it makes is used after the join, and its stream takes that memory again after the next fork.
    pairs = list(zip(experts, *others, strict=True))
    device = next((p.device for expert, *_ in pairs for p in expert.parameters()), torch.device("cpu"))
    if device.type != "cuda" or len(pairs) < 2 or any(_exchanges(expert) for expert, *_ in pairs):
        return [run(*pair) for pair in pairs]
    here, streams, found = torch.cuda.current_stream(device), _streams(device, len(pairs)), []
    for stream, pair in zip(streams, pairs, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            found.append(run(*pair))
    for stream in streams:
        here.wait_stream(stream)
    return found


def _exchanges(expert: nn.Module) -> bool:
    return any(getattr(module, "exchanges", False) for module in expert.modules())


@cache
def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """Return the streams of experts, the same ones in every step: memory is kept by stream, and graphs name theirs."""
    return [torch.cuda.Stream(device) for _ in range(count)]
