"""The GIST classifier against scores, loss and gradient of its published code (CPU, float32, 6 decimals)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.ensemble import keyed_draws
from experts.heads.gist import GistHead

FEATURES = torch.tensor([[1.0, 1], [1, -2]])
BALANCED = torch.tensor([[1.0, 0], [0, 1], [-1, 1]])
RANDOM = torch.tensor([[2.0, 1], [0, 1], [-1, 0]])
DISPLACEMENTS = torch.tensor([[0.5, 0.5], [0, -0.5]])


def close(found, published) -> None:
    torch.testing.assert_close(found.detach().double(), torch.tensor(published).double(), atol=2e-6, rtol=1e-6)


def head(rows_CD):
    built = GistHead(GistHead.Config(displacements=2), 2, 3)
    built.weight.data, built.displacement_SD.data = rows_CD.T.contiguous(), DISPLACEMENTS.clone()
    return built


def test_scores_are_the_published_ones():
    close(head(BALANCED)(FEATURES), [[14.310835, 14.310835, 7.155417], [12.799999, -11.313707, -12.799999]])
    close(head(RANDOM)(FEATURES), [[15.522281, 14.310835, 0.0], [3.470887, -11.313707, 0.0]])


def test_loss_of_both_branches_and_gradient_of_the_displacements_are_the_published_ones():
    """The second branch, of class-balanced images, counts half and gives the displacements no gradient."""
    random, balanced = head(RANDOM), head(BALANCED)
    first = F.cross_entropy(random(FEATURES), torch.tensor([0, 2]))
    second = F.cross_entropy(balanced(FEATURES), torch.tensor([1, 0]))
    close(first + 0.5 * second, 2.054459)
    first.backward()
    close(random.displacement_SD.grad, [[0.571098, -0.295115], [-2.212452, 2.642782]])


def test_scores_equal_the_definition_in_float64():
    with keyed_draws(3, "gist"):
        built = GistHead(GistHead.Config(displacements=4, initial_length=0.7), 6, 5).double()
    features = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows_CD, moves = built.weight.detach().T, [torch.zeros(6), *built.displacement_SD.detach()]
    for f, found in zip(features, built(features), strict=True):
        expected = [16 * max(F.cosine_similarity(f, row + move, dim=0).item() for move in moves) for row in rows_CD]
        torch.testing.assert_close(found.detach(), torch.tensor(expected).double(), atol=1e-6, rtol=1e-6)


def test_displacements_learn_from_the_first_step_on():
    """At zero, as published, all copies of a class tie, and their gradient is zero for ever."""
    with keyed_draws(0, "gist"):
        built = GistHead(GistHead.Config(), 6, 5)
    F.cross_entropy(
        built(torch.randn(64, 6, generator=torch.Generator().manual_seed(0))), torch.arange(64) % 5
    ).backward()
    assert (built.displacement_SD.grad.abs().sum(dim=1) > 0).all()
