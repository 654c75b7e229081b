"""The reconstruction of MBJ against a transcription in NumPy: what goes into its memory, and the loss of the drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.auxiliaries.auxiliary import Seen
from experts.auxiliaries.queue import EMPTY
from experts.heads.linear import LinearHead
from experts.methods.mbj import MemoryOfFeatures
from experts.progress import Progress

EARLY, LATE, YES = Progress(1, 4), Progress(2, 4), torch.tensor(True)
COUNTS = torch.tensor([8, 4, 2, 0])


def test_rare_classes_go_in_more_often_and_the_head_learns_from_what_is_drawn():
    piece = MemoryOfFeatures(MemoryOfFeatures.Config(queue_size=5, after_epoch=1), 2, COUNTS).double()
    head = LinearHead(LinearHead.Config(), 2, 4).double()
    piece.meet(head)
    assert piece.chance_C[:3].tolist() == [0.25, 0.5, 1.0]
    random, memory = np.random.default_rng(0), []
    for _ in range(6):
        f, y, u = random.normal(size=(5, 2)), random.integers(0, 3, 5), random.random((5, 2))
        seen = Seen(*map(torch.from_numpy, (f[None],)), None, None, torch.from_numpy(y), draws_BU=torch.from_numpy(u))
        assert piece.loss(seen, EARLY) == 0
        loss = piece.loss(seen, LATE)
        expected, w, b = 0.0, *(p.detach().numpy() for p in (head.weight, head.bias))
        for draw in u[:, 1] if memory else ():
            place = int(draw * len(memory[-5:]))
            entry, label = ordered(memory)[place]
            z = w @ entry + b
            expected += (np.log(np.exp(z).sum()) - z[label]) / 5
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        piece.update(seen, 0.1, YES)
        memory += [(f[i], y[i]) for i in range(5) if u[i, 0] < [0.25, 0.5, 1.0][y[i]]]
        filled = piece.queue.labels_K != EMPTY
        assert piece.queue.labels_K[filled].tolist() == [label for _, label in ordered(memory)]
    assert len(memory) > 5, "the memory has gone round"


def ordered(memory):
    """Return the newest five entries by their place: the k-th that went in lies at k modulo 5."""
    newest = list(enumerate(memory))[-5:]
    return [entry for _, entry in sorted(newest, key=lambda pair: pair[0] % 5)]


def test_features_of_the_memory_have_no_gradient():
    piece = MemoryOfFeatures(MemoryOfFeatures.Config(queue_size=5, after_epoch=0), 2, COUNTS)
    piece.meet(LinearHead(LinearHead.Config(), 2, 4))
    features = torch.ones(1, 3, 2, requires_grad=True)
    seen = Seen(features, None, None, torch.tensor([2, 2, 2]), draws_BU=torch.zeros(3, 2))
    piece.update(seen, 0.1, YES)
    (found,) = torch.autograd.grad(piece.loss(seen, LATE), features, allow_unused=True)
    assert found is None
