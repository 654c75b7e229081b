"""The doctor and the plan tell what bfloat16 gives on a CPU, measured."""

from __future__ import annotations

import pytest

from orchestration.preflight import autocast
from orchestration.preflight.autocast import autocast_line, bfloat16_units, time_ratio


def cpu(flags):
    return f"processor\t: 0\nmodel name\t: some CPU\nflags\t\t: fpu sse2 {flags}\nbogomips\t: 1\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("flags", "units"),
    [
        ("avx2", []),
        ("avx512f avx512_bf16", ["avx512_bf16"]),
        ("avx512_bf16 amx_bf16 amx_tile", ["amx_bf16", "avx512_bf16"]),
        ("amx_tile amx_int8", []),
    ],
)
def test_units_are_read_from_the_flags_as_whole_words(flags, units):
    assert bfloat16_units(cpu(flags)) == units


def test_a_cpu_without_a_unit_measures_nothing(monkeypatch):
    monkeypatch.setattr(autocast, "time_ratio", lambda: pytest.fail("measured"))
    assert autocast_line(cpu("avx2")) is None
    assert autocast_line("") is None, "as on a system without /proc/cpuinfo"


def test_a_cpu_with_a_unit_tells_the_measured_ratio(monkeypatch):
    monkeypatch.setattr(autocast, "time_ratio", lambda: 0.523)
    line = autocast_line(cpu("avx512_bf16"))
    assert line.startswith("this CPU has avx512_bf16: blocks of a ResNet-32 take 0.52 times as long with")


def test_the_ratio_is_of_two_times():
    assert 0 < time_ratio() < float("inf")
