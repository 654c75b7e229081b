"""Turns and the guessing of them, against published code: five images with pixels 0, 1, 2, 3."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.augmentation.quarter_turn import QuarterTurn
from experts.augmentation.stack import Stack
from experts.auxiliaries.auxiliary import Seen
from experts.auxiliaries.rotation import Rotation
from experts.progress import Progress

NOW = Progress(1, 2)


class TestRotationOfficial:
    turns = (2, 2, 1, 3, 3)
    pixels = ([3, 2, 1, 0], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1], [2, 0, 3, 1])

    def test_images_are_turned_counter_clockwise(self):
        stack = Stack([QuarterTurn.Config()], (0.0,) * 3, (1.0,) * 3)
        images = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2).repeat(5, 1, 1, 1)
        draws = {"quarter_turn": np.array(self.turns)[:, None] / 4 + 0.1}
        found = stack.changed(images, draws, torch.float64)[:, 0] * 255
        assert found.flatten(1).round().tolist() == [list(map(float, row)) for row in self.pixels]
        assert stack.told(lambda table, width: draws[table])["quarter_turn"].tolist() == list(self.turns)

    def test_the_loss_is_cross_entropy_of_four_scores(self):
        piece = Rotation(Rotation.Config(), 3, torch.tensor([4, 2])).double()
        features, told = torch.tensor([[1, 0, 2], [0.5, -1, 0]], dtype=torch.float64), torch.tensor([3, 0])
        seen = Seen(piece.embed(features)[None], None, None, torch.tensor([0, 1]), told_B=told)
        w, b = (p.detach().numpy() for p in (piece.embed.weight, piece.embed.bias))
        z = features.numpy() @ w.T + b
        expected = np.mean(np.log(np.exp(z).sum(axis=1)) - z[[0, 1], told.numpy()])
        assert piece.loss(seen, NOW).item() == pytest.approx(expected, rel=1e-12)
