"""MoCo and SSD's contrast against numbers of published code, rounded to 6 decimals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experts.auxiliaries.auxiliary import Seen
from experts.auxiliaries.moco import MoCo
from experts.auxiliaries.queue import EMPTY
from experts.progress import Progress
from experts.registry import build
from orchestration.config.compose import load_config

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


def test_a_student_of_ssd_learns_labels_in_one_head_and_soft_labels_in_the_other():
    """Its stage is the sum of both: cross-entropy of the auxiliary, and distillation of the head."""
    config = load_config(["method=ssd", "dataset=digits_lt"]).method.stages["student"]
    student, teacher = rows([1, 2, 3], [0, 0, 1]), rows([2, 1, 0], [1, 0, 1])
    distillation = build("distillation", config.distillation)
    labels = torch.tensor([0, 2])
    objective = torch.zeros((), dtype=torch.float64)
    given = distillation.denominators(labels), NOW
    soft, _ = distillation(objective, student[None], {"teacher": teacher}, *given)
    assert soft.item() == pytest.approx(0.696679, abs=1e-6)

    (hard,) = (build("auxiliary", own, 2, torch.tensor([4, 2, 1])).double() for own in config.auxiliaries.values())
    f = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    z = (f @ hard.embed.weight.T + hard.embed.bias).detach().numpy()
    expected = np.mean(np.log(np.exp(z).sum(axis=1)) - z[[0, 1], labels.numpy()])
    assert hard.loss(Seen(hard.embed(f)[None], None, None, labels), NOW).item() == pytest.approx(expected, rel=1e-12)
