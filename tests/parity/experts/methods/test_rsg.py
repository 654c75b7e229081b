"""RSG against numbers of its published code, rounded to 6 decimals, and on replicas of an ensemble.

The published fixture fills the k-th parameter of a tiny module with ((7 i + 3 k) mod 11) / 10 - 0.5 at its flat index
i, and the maps with ((5 i) mod 13) / 6 - 1.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experts.auxiliaries.auxiliary import Seen
from experts.methods.rsg import RSG, pairs, vector_loss
from experts.progress import Progress

EARLY, LATE = Progress(2, 4), Progress(3, 4)
LABELS = torch.tensor([0, 1, 0, 2])
"""After epoch index 1, so from the third epoch on, images are made."""


def filled(form="published"):
    config = RSG.Config(centres=2, width=2, after_epoch=2, head_share=0.34, centre_weight=1, vector_weight=1, form=form)
    piece = RSG(config, 2, torch.tensor([9, 2, 1])).double()
    with torch.no_grad():
        for k, parameter in enumerate(piece.parts.parameters()):
            i = torch.arange(parameter.numel())
            parameter.copy_((((7 * i + 3 * k) % 11).double() / 10 - 0.5).view(parameter.shape))
    return piece


MAPS = (((5 * torch.arange(32)) % 13).double() / 6 - 1).view(4, 8)


class TestOfficial:
    def test_the_frequent_class_is_the_largest(self):
        assert filled().frequent_C.tolist() == [True, False, False]

    def test_before_images_are_made_it_learns_centres_and_a_comparison(self):
        piece = filled()
        assert piece.loss(Seen(MAPS[None], None, None, LABELS), EARLY).item() == pytest.approx(5.055463, abs=1e-6)
        assert len(piece.made_labels(LABELS.numpy(), EARLY)) == 0

    def test_then_centres_and_vectors(self):
        piece = filled()
        loss = piece.loss(Seen(MAPS[None], None, None, LABELS), LATE)
        assert loss.item() == pytest.approx(4.363181 + 9.642769, abs=2e-6)

    def test_images_are_made_of_rare_ones_and_what_sets_frequent_ones_off(self):
        piece, labels = filled(), LABELS.numpy()
        assert piece.made_labels(labels, LATE).tolist() == [1, 2]
        made = piece.make(MAPS, labels, LATE, slice(0, 2))
        expected = [
            [-0.896667, -1.113333, 1.800000, -1.756667, -0.223333, -0.883333, -0.866667, 0.456667],
            [-1.446667, -0.180000, -1.233333, -0.773333, 0.760000, -0.433333, 0.166667, 0.590000],
        ]
        torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
        assert torch.equal(piece.make(MAPS, labels, LATE, slice(1, 2)), made[1:])
        (gradient,) = torch.autograd.grad(made.sum(), piece.parts.centre_CKc, allow_unused=True)
        assert gradient is None, "centres learn by their own loss alone"


def test_vectors_of_the_paper_are_those_of_positions():
    """Against a transcription in NumPy: lengths and one cosine for each position."""
    piece = filled("paper")
    weights, maps = dict(piece.parts.named_parameters()), MAPS.view(4, 2, 2, 2)
    settings, found = piece.config, []
    for form in ("paper", "published"):
        chosen = SimpleNamespace(form=form, strength=settings.strength)
        found.append(vector_loss(weights, maps, LABELS, piece.frequent_C[LABELS], chosen).item())
    p = {name: value.detach().numpy() for name, value in weights.items()}
    x, y = maps.numpy(), LABELS.numpy()
    chosen = [(x[b].mean((1, 2)) @ p["choice_CcK"][y[b]] + p["choice_bias_CK"][y[b]]).argmax() for b in range(4)]
    apart = np.stack([x[b] - p["centre_CKc"][y[b], chosen[b]][:, None, None] for b in range(4)])
    total = 0.0
    for frequent, rare in ((0, 1), (2, 3)):
        given = torch.from_numpy(apart[frequent])[None]
        made = F.conv2d(given, weights["transfer.weight"], weights["transfer.bias"], padding=1).detach()
        both = torch.cat([torch.from_numpy(x[frequent])[None], made], dim=1)
        z = F.conv2d(both, weights["first.weight"], weights["first.bias"]).relu()
        z = F.conv2d(z, weights["second.weight"], weights["second.bias"], padding=1).mean((2, 3))
        z = (z @ weights["last.weight"].T + weights["last.bias"])[0].detach().numpy()
        total += np.log(np.exp(z).sum()) - z[0]
        v, g, own = made[0].numpy(), apart[frequent], apart[rare]
        for i in range(2):
            for j in range(2):
                lengths = [np.linalg.norm(m[:, i, j]) for m in (v, g, own)]
                total += abs(lengths[0] - lengths[1])
                total += abs(v[:, i, j] @ own[:, i, j] / lengths[0] / lengths[2] - 1)
    assert found[0] == pytest.approx(total / 2, rel=1e-12)
    assert found[0] != pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize("frequent", ["11101110", "10001000", "1111", "0000", "1"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_pairs_are_those_of_slices_of_the_larger_side(frequent, strength):
    is_frequent = np.array([c == "1" for c in frequent])
    many, few = np.flatnonzero(is_frequent), np.flatnonzero(~is_frequent)
    expected = []
    if len(many) and len(few):
        for j in range(max(1, int(max(len(many), len(few)) * strength / min(len(many), len(few))))):
            if len(many) >= len(few):
                expected += zip(many[j * len(few) : (j + 1) * len(few)], few, strict=True)
            else:
                expected += zip(many, few[j * len(many) : (j + 1) * len(many)], strict=True)
    at_frequent, at_rare, count = pairs(torch.from_numpy(is_frequent), strength)
    assert list(zip(at_frequent[:count].tolist(), at_rare[:count].tolist(), strict=True)) == expected
