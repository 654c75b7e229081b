"""Operations that a GPU cannot repeat to the bit are found; test_devices.py says that no recipe needs one."""

from __future__ import annotations

import pytest
import torch

from tests.emulated_device import DEVICE, EmulatedDevice
from tests.repeatable import Repeatable


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.bincount(x.long(), x),
        lambda x: x.median(0),
        torch.histc,
        lambda x: torch.ops.aten._adaptive_avg_pool2d_backward(x.view(1, 1, 2, 2), x.view(1, 1, 2, 2)),
    ],
)
def test_such_operations_are_found(work):
    with EmulatedDevice(), Repeatable() as seen:
        x = torch.ones(4, device=DEVICE)
        torch.bincount(x.long())
        x.median()
        assert seen.refused == []
        work(x)
        assert len(seen.refused) == 1
