"""MoCo and SSD's contrast against numbers of published code, rounded to 6 decimals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from experts.auxiliaries.auxiliary import Seen
from experts.auxiliaries.moco import MoCo
from experts.auxiliaries.queue import EMPTY
from experts.progress import Progress

NOW = Progress(1, 2)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def unit(*values):
    return F.normalize(rows(*values), dim=1)


class TestMoCoOfficial:
    def loss(self, q, k, queue, labels, **settings):
        piece = MoCo(MoCo.Config(queue_size=len(queue), dim=2, **settings), 2, torch.tensor([4, 2, 1])).double()
        piece.queue.keys_Kd.copy_(queue)
        piece.queue.labels_K.copy_(torch.tensor(labels))
        return piece.loss(Seen(q[None], k, None, torch.tensor([0, 1])), NOW).item()

    def test_the_loss_is_info_nce(self):
        given = unit([1, 0.2], [-0.3, 1]), unit([0.9, 0.1], [0, 1])
        queue = unit([1, 1], [-1, 0.5], [0.2, -1], [0.8, 0.3])
        assert self.loss(*given, queue, [0, 0, 1, 0]) == pytest.approx(0.590699, abs=1e-6)

    q, k = rows([1, 0], [0.6, 0.8]), rows([0.8, 0.6], [0, 1])
    queue = rows([1, 0], [0, 1], [0.6, -0.8], [0.8, 0.6], [-1, 0], [0, -1])

    def test_keys_of_the_own_class_do_not_count_in_ssd(self):
        """The last key's label is no class in published code, which counts it all the same."""
        given = self.q, self.k, self.queue, [0, 1, 0, 0, 2, 3]
        assert self.loss(*given, temperature=0.5, spare_own_class=True) == pytest.approx(0.770757, abs=1e-6)

    def test_what_is_not_filled_counts_nothing(self):
        short = self.loss(self.q, self.k, self.queue[:2], [0, 1])
        assert self.loss(self.q, self.k, self.queue, [0, 1, *[EMPTY] * 4]) == pytest.approx(short, rel=1e-12)
        assert self.loss(self.q, self.k, self.queue, [EMPTY] * 6) == 0
