"""Experts compute side by side on a GPU, and one after the other elsewhere. CUDA's streams are played by a record."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import experts.side_by_side as code
from experts.side_by_side import side_by_side
from orchestration.training.batchnorm import SynchronisedBatchNorm2d


class Stream:
    def __init__(self, name, record):
        self.name, self.record = name, record

    def wait_stream(self, other):
        self.record.append(f"{self.name} waits for {other.name}")


class Expert(nn.Module):
    """An expert that says it is on a GPU."""

    def __init__(self, name, *parts):
        super().__init__()
        self.name, self.parts = name, nn.ModuleList(parts)

    def parameters(self, recurse=True):
        yield SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture
def cuda(monkeypatch):
    """Play CUDA's streams; return what happened and a run for experts."""
    record = []
    here = [Stream("here", record)]

    @contextmanager
    def on(stream):
        here.append(stream)
        yield
        here.pop()

    def run(expert, x):
        record.append(f"{expert.name} on {here[-1].name}")
        return expert.name, x

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(code, "_streams", lambda device, count: [Stream(f"s{k}", record) for k in range(count)])
    return record, run


def test_each_waits_for_all_before_and_is_waited_for_by_all_after(cuda):
    record, run = cuda
    assert side_by_side(run, [Expert("a"), Expert("b")], [1, 2]) == [("a", 1), ("b", 2)]
    forks = ["s0 waits for here", "a on s0", "s1 waits for here", "b on s1"]
    assert record == [*forks, "here waits for s0", "here waits for s1"]


def test_experts_that_exchange_take_turns(cuda):
    record, run = cuda
    side_by_side(run, [Expert("a", SynchronisedBatchNorm2d(1)), Expert("b")], [1, 2])
    assert record == ["a on here", "b on here"]


def test_one_expert_needs_no_stream(cuda):
    record, run = cuda
    side_by_side(run, [Expert("a")], [1])
    assert record == ["a on here"]


def test_elsewhere_it_is_a_loop(cuda):
    experts = [nn.Linear(1, 1), nn.Linear(1, 1)]
    assert side_by_side(lambda expert, k: (expert, k), experts, "xy") == [(experts[0], "x"), (experts[1], "y")]
    assert cuda[0] == []


def test_every_expert_needs_its_value():
    with pytest.raises(ValueError, match="shorter"):
        side_by_side(lambda expert, k: k, [nn.Linear(1, 1), nn.Linear(1, 1)], [1])
