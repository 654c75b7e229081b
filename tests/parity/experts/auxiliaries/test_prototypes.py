"""Prototypical contrast against the formula by hand, rounded to 6 decimals."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.auxiliaries.auxiliary import Seen
from experts.auxiliaries.prototypes import Prototypes
from experts.progress import Progress

z = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
y = torch.tensor([0, 1])


def test_each_image_has_the_loss_of_the_formula_which_may_be_negative():
    piece = Prototypes(Prototypes.Config(dim=2), 2, torch.tensor([5, 3, 1])).double()
    piece.prototypes_Cd.data = torch.tensor([[1, 0.2], [0, 1], [-1, 1]], dtype=torch.float64)
    found = [piece.loss(Seen(z[None, k : k + 1], None, None, y[k : k + 1]), Progress(1, 2)) for k in range(2)]
    expected = torch.tensor([-9.804958, -0.545203], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(found).detach(), expected, rtol=0, atol=1e-6)
    whole = piece.loss(Seen(z[None], None, None, y), Progress(1, 2))
    torch.testing.assert_close(whole.detach(), torch.tensor(-5.175080, dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_length_of_a_prototype_does_not_count():
    piece = Prototypes(Prototypes.Config(dim=2), 2, torch.tensor([5, 3, 1])).double()
    before = piece.loss(Seen(z[None], None, None, y), Progress(1, 2))
    torch.testing.assert_close(piece.prototypes_Cd.norm(dim=1), torch.ones(3).double(), atol=1e-6, rtol=0)
    piece.prototypes_Cd.data *= 3
    torch.testing.assert_close(piece.loss(Seen(z[None], None, None, y), Progress(1, 2)), before)
    assert torch.isfinite(F.normalize(piece.prototypes_Cd, dim=1)).all()
