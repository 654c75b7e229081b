"""Measure what `engine.precision=autocast` would give on this CPU, where it computes in bfloat16 by itself."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from orchestration.results.text import plural

UNITS = ("amx_bf16", "avx512_bf16")
"""Flags of /proc/cpuinfo, the faster unit first. Without either, bfloat16 is emulated and slower than float32."""
_SHAPES = ((32, 16, 32), (32, 32, 16), (32, 64, 8))  # images, channels, pixels: the three stages of a ResNet-32
_PAIRS = 5
_LIMIT_S = 1.0  # no further pair is begun after this


def bfloat16_units(cpuinfo: str) -> list[str]:
    """Return the units for bfloat16 that the text of /proc/cpuinfo names."""
    flags = next((line.split(":", 1)[1].split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return [unit for unit in UNITS if unit in flags]


def autocast_line(cpuinfo: str | None = None) -> str | None:
    """Say what autocast would give on this CPU; None where it has no unit for bfloat16.

    Args:
        cpuinfo: text of /proc/cpuinfo; read by default.
    """
    units = bfloat16_units(_cpuinfo() if cpuinfo is None else cpuinfo)
    if not units:
        return None
    ratio, threads = time_ratio(), plural(torch.get_num_threads(), "thread")
    return (
        f"this CPU has {' and '.join(units)}: blocks of a ResNet-32 take {ratio:.2f} times as long with "
        f"engine.precision=autocast as in float32 (measured, {threads})"
    )


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return ""


def time_ratio() -> float:
    """Return the time of some residual blocks, forward and backward, in autocast over that in float32.

    The two are timed in turn, so that other load on the machine slows both. Takes about half a second.
    """
    blocks = [(_block(channels), torch.ones(images, channels, size, size)) for images, channels, size in _SHAPES]

    def seconds(autocast: bool) -> float:
        begun = time.perf_counter()
        for block, x in blocks:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y: Tensor = block(x)
            y.float().sum().backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - begun

    seconds(False), seconds(True)  # the first of each allocates memory
    ratios, since = list[float](), time.perf_counter()
    while not ratios or (len(ratios) < _PAIRS and time.perf_counter() - since < _LIMIT_S):
        ratios.append(seconds(True) / seconds(False))
    return statistics.median(ratios)


def _block(channels: int) -> nn.Module:
    def convolution() -> nn.Conv2d:
        return nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    norm = nn.BatchNorm2d
    return nn.Sequential(convolution(), norm(channels), nn.ReLU(), convolution(), norm(channels))
