"""Mixup, Remix, CutMix and CMO against fixed numbers, and against the papers' sentences in NumPy.

Origin: the functions of published code (mixup: dvlab-research/MiSLAS @ 0fc381e; boxes and the samplers of CMO:
naver-ai/cmo @ 10d2d09) with the seeds named at each number, printed to 6 decimals. For Remix no code of its authors was
at hand: its numbers are computed from the paper's formula. Images are 32 x 32 unless it is said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import experts
from experts.batches import Batch, Mixed
from experts.draws import StepDraws
from experts.losses.class_weights import ClassWeights
from experts.losses.cross_entropy import CrossEntropy
from experts.mixing.boxes import Box, box_around, draw_box
from experts.mixing.cmo import CMO
from experts.mixing.cutmix import CutMix
from experts.mixing.mixing import Blend, Part, Step, mix
from experts.mixing.mixup import Mixup
from experts.mixing.remix import Remix, label_shares
from experts.progress import Progress
from experts.registry import build, import_pieces
from orchestration.training.step import TrainingStep

import_pieces(experts)  # CMO's config takes any sampler

COUNTS = np.array([100, 40, 10, 4])
Z = torch.tensor([[2, 0.5, -1, 0], [0.1, 1.2, 0.3, -0.7], [-0.5, 0.4, 0.9, 1.5]], dtype=torch.float64)
Y = np.array([0, 2, 3])
MIDDLE = Progress(5, 10)


class Published:
    """NumPy's global generator as published code uses it."""

    def __init__(self, seed: int) -> None:
        self._draws = np.random.RandomState(seed)

    def random(self) -> float:
        return float(self._draws.rand())

    def betavariate(self, alpha: float, beta: float) -> float:
        return float(self._draws.beta(alpha, beta))

    def randint(self, a: int, b: int) -> int:
        return int(self._draws.randint(a, b + 1))


@dataclass(frozen=True)
class Drawn(Step):
    """A step whose draws are given."""

    now: Progress = MIDDLE
    key_of: None = None
    given: Published = field(default_factory=lambda: Published(0))
    order_B: np.ndarray | None = None

    def order(self, name):
        return self.order_B

    def generator(self, name):
        return self.given


def step(labels, order=None, *, second=None, seed=0, share=None):
    given = Published(seed) if share is None else SimpleNamespace(betavariate=lambda *_: share)
    second = None if second is None else np.array(second)
    return Drawn(np.array(labels), second, 32, given=given, order_B=None if order is None else np.array(order))


def loss_of(blend: Blend, logits=Z, weights=None) -> float:
    """Return the loss that a training step computes of a blend."""
    objective = CrossEntropy(CrossEntropy.Config(), torch.from_numpy(COUNTS), 1).double()
    if weights is not None:
        objective.weigh(weights, torch.from_numpy(COUNTS))
    first, second = torch.from_numpy(blend.first_B), torch.from_numpy(blend.second_B)
    share, rest = (torch.tensor(w, dtype=torch.float64) for w in (blend.share, 1 - blend.share))
    batch = Batch(torch.zeros(len(first), 3, 1, 1), first, first, mixed=Mixed(share, rest, second, second))
    flow = SimpleNamespace(labels=lambda batch: (batch.labels_B, batch.global_labels), scored=lambda batch: batch)
    setup = SimpleNamespace(
        teachers={}, objective=objective, distillation=None, step_draws=StepDraws(lambda *_: 0), flow=flow,
        auxiliaries=SimpleNamespace(made_labels=lambda batch, now: (np.zeros(0, np.int64), slice(0, 0))),
        stage=SimpleNamespace(objective_weight=SimpleNamespace(times=lambda total, *_: total)),
    )  # fmt: skip
    return float(TrainingStep._loss(SimpleNamespace(_setup=setup), logits[None], batch, MIDDLE)[0])


def nll(logits, labels):
    return -np.take_along_axis(logits - np.log(np.exp(logits).sum(1, keepdims=True)), labels[:, None], 1)[:, 0]


# Mixup


@pytest.mark.parametrize(
    ("alpha", "share", "row"),
    [(1, 0.449125, [7.652624, 8.652624, 9.652624]), (0.2, 0.210163, [8.369511, 9.369511, 10.369511])],
)
def test_mixup_draws_and_blends_as_published(alpha, share, row):
    """NumPy seed 0, torch seed 0, images 0 .. 11 as 4 x 3, labels 0 .. 3; the order is [0, 1, 3, 2]."""
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).numpy()
    assert order.tolist() == [0, 1, 3, 2]
    blend = Mixup(Mixup.Config(alpha=alpha), COUNTS).blend(step([0, 1, 2, 3], order))
    assert blend.share == pytest.approx(share, abs=1e-6)
    assert (blend.first_B.tolist(), blend.second_B.tolist()) == ([0, 1, 2, 3], [0, 1, 3, 2])
    images = torch.arange(12, dtype=torch.float64).view(4, 3, 1, 1)
    mixed = mix(images.clone(), images[torch.from_numpy(blend.order_B)], [Part(blend, slice(0, 4))])
    assert mixed[2].flatten().tolist() == pytest.approx(row, abs=1e-6)
    assert torch.equal(mixed[:2], images[:2])


def test_mixup_blends_the_losses_of_both_sets_of_labels():
    blend = Mixup(Mixup.Config(), COUNTS).blend(step(Y, [2, 0, 1], share=0.3))
    assert blend.second_B.tolist() == [3, 0, 2]
    assert loss_of(Blend(0.3, Y, np.array([3, 0, 1]), None)) == pytest.approx(1.630007, abs=1e-6)


# Remix


@pytest.mark.parametrize(("share", "expected"), [(0.3, [0, 0.3, 0.3, 0.3]), (0.7, [0.7, 0.7, 0.7, 1])])
def test_remix_gives_the_whole_label_to_the_rarer_class(share, expected):
    counts_B, partners_B = COUNTS[[0, 1, 2, 3]], COUNTS[[2, 0, 3, 0]]
    assert label_shares(share, counts_B, partners_B, kappa=3, tau=0.5).tolist() == expected


@pytest.mark.parametrize(
    ("own", "partners", "share", "expected"),
    [
        (300, 100, 0.4, 0),
        (300, 100, 0.6, 0.6),
        (100, 300, 0.6, 1),
        (100, 300, 0.4, 0.4),
        (200, 100, 0.4, 0.4),
        (1000, 10, 0.1, 0),
    ],
)
def test_remix_compares_the_larger_classs_pixels_with_tau(own, partners, share, expected):
    assert label_shares(share, np.array([own]), np.array([partners]), kappa=3, tau=0.5).tolist() == [expected]


@pytest.mark.parametrize(("share", "weights", "loss"), [(0.3, [0, 0.3, 0.3], 1.713341), (0.7, [0.7, 1, 0.7], 1.120007)])
def test_remix_with_one_share_per_step_is_the_loss_with_one_per_image(share, weights, loss):
    """Labels 0, 2, 3 with partners 3, 0, 2."""
    blend = Remix(Remix.Config(), COUNTS).blend(step(Y, [2, 0, 1], share=share))
    assert loss_of(blend) == pytest.approx(loss, abs=1e-6)
    per_image_B = np.array(weights) * nll(Z.numpy(), Y) + (1 - np.array(weights)) * nll(Z.numpy(), Y[[2, 0, 1]])
    assert loss_of(blend) == pytest.approx(per_image_B.mean(), abs=1e-12)


def test_class_weights_make_a_weighted_mean_of_each_set_of_labels():
    blend, weights = Blend(0.3, Y, Y[[2, 0, 1]], None), ClassWeights(rule="power")
    weight_C = 1 / COUNTS
    means = [np.average(nll(Z.numpy(), labels), weights=weight_C[labels]) for labels in (blend.first_B, blend.second_B)]
    assert loss_of(blend, weights=weights) == pytest.approx(0.3 * means[0] + 0.7 * means[1], abs=1e-12)


# Boxes

SEEDS = [
    # seed, whether half of the steps would have this one mixed, box, share of the first label
    (0, False, (11, 8, 31, 28), 0.609375),
    (1, True, (11, 5, 11, 5), 1.0),
    (2, True, (3, 0, 32, 26), 0.263672),
    (3, False, (0, 13, 8, 29), 0.875),
    (4, False, (0, 0, 23, 19), 0.573242),
    (5, True, (6, 8, 24, 26), 0.683594),
]


@pytest.mark.parametrize(("seed", "mixed", "box", "share"), SEEDS)
def test_cmo_draws_the_published_boxes(seed, mixed, box, share):
    """In the order of the code: whether to mix, share, column, row; NumPy's generator with the seed."""
    given = step([0, 1], second=[3, 2], seed=seed)
    blend = CMO(CMO.Config(probability=1), COUNTS).blend(given)
    assert tuple(blend.box) == box
    assert blend.share == pytest.approx(share, abs=1e-6)
    assert (blend.first_B.tolist(), blend.second_B.tolist(), blend.order_B) == ([0, 1], [3, 2], None)
    half = CMO(CMO.Config(), COUNTS).blend(step([0, 1], second=[3, 2], seed=seed))
    assert (half is not None) == mixed


@pytest.mark.parametrize(("seed", "mixed", "box", "share"), SEEDS)
def test_cutmix_draws_boxes_like_cmo_and_partners_from_the_step(seed, mixed, box, share):
    blend = CutMix(CutMix.Config(), COUNTS).blend(step([0, 1, 3], [2, 0, 1], seed=seed))
    assert tuple(blend.box) == box and blend.second_B.tolist() == [3, 0, 1]
    assert blend.share == pytest.approx(share, abs=1e-6)
    half = CutMix(CutMix.Config(probability=0.5), COUNTS).blend(step([0, 1, 3], [2, 0, 1], seed=seed))
    assert (half is not None) == mixed


@pytest.mark.parametrize(
    ("share", "centre", "box", "left"),
    [
        (0.75, (16, 16), (8, 8, 24, 24), 0.75),
        (0.75, (0, 31), (0, 23, 8, 32), 0.929688),
        (0.75, (0, 0), (0, 0, 8, 8), 0.9375),
        (0.5, (16, 16), (5, 5, 27, 27), 0.527344),
        (0.5, (0, 31), (0, 20, 11, 32), 0.871094),
        (0.05, (16, 16), (1, 1, 31, 31), 0.121094),
        (0.05, (0, 31), (0, 16, 15, 32), 0.765625),
        (0, (16, 16), (0, 0, 32, 32), 0),
        (1, (16, 16), (16, 16, 16, 16), 1),
    ],
)
def test_a_box_is_clipped_before_its_area_counts(share, centre, box, left):
    found = box_around(*centre, share, 32)
    assert tuple(found) == box
    assert found.share_left(32) == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alike", [True, False], ids=["one box", "a box for each step"])
def test_pixels_are_pasted_as_in_numpy(seed, alike):
    draws, size = np.random.default_rng(seed), 9
    boxes = [draw_box(Published(seed if alike else seed * 10 + k), 1, size) for k in range(1 if alike else 3)]
    counts = [6] if alike else [3, 0, 3]
    images, others = draws.normal(size=(2, 6, 3, size, size))
    expected, row = images.copy(), 0
    for (left, top, right, bottom), count in zip(boxes, counts, strict=True):
        for _ in range(count):
            expected[row, :, top:bottom, left:right] = others[row, :, top:bottom, left:right]
            row += 1
    ends = np.cumsum([0, *counts])
    parts = [
        Part(Blend(box.share_left(size), Y, Y, None, box), slice(ends[k], ends[k + 1])) for k, box in enumerate(boxes)
    ]
    assert np.array_equal(mix(torch.from_numpy(images), torch.from_numpy(others), parts).numpy(), expected)


def test_only_the_parts_that_are_mixed_change():
    images, others = torch.zeros(5, 1, 4, 4), torch.ones(3, 1, 4, 4)
    box = Box(1, 0, 3, 2)
    parts = [Part(Blend(0.75, Y, Y, None, box), slice(1, 2)), Part(Blend(0.75, Y, Y, None, box), slice(3, 5))]
    mixed = mix(images, others, parts)
    assert mixed.flatten(1).sum(1).tolist() == [0, 4, 0, 4, 4]
    assert mixed[1, 0].tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


# CMO


@pytest.mark.parametrize(
    ("sampler", "published"),
    [
        (None, [0.25, 0.25, 0.25, 0.25]),  # weighted_alpha 1, the default
        ("square_root", [0.465401, 0.294346, 0.147173, 0.093080]),  # 0.5
        ("reversed", [0.025974, 0.064935, 0.259740, 0.649351]),  # 2: q of the paper
    ],
)
def test_classes_are_cut_out_as_often_as_published(sampler, published):
    config = CMO.Config() if sampler is None else CMO.Config(sampler={"name": sampler})
    labels = np.repeat(np.arange(4), COUNTS)
    found = build("sampler", config.second_sampler, labels, 4)
    assert found.class_probabilities(MIDDLE) == pytest.approx(published, abs=1e-6)
    drawn = found.draw(MIDDLE, 0)
    assert len(set(np.bincount(drawn)[drawn].tolist())) > 1, "images are drawn independently"


def test_cmo_is_quiet_in_the_first_four_and_the_last_three_epochs():
    """3 < index < E - 3, as its code has it, counted from 0."""
    piece = CMO(CMO.Config(probability=1), COUNTS)
    blends = [piece.blend(Drawn(Y, Y, 32, now=Progress(epoch, 12))) for epoch in range(1, 13)]
    assert [index for index, blend in enumerate(blends) if blend is not None] == [4, 5, 6, 7, 8]
    assert CMO.Config().length_problem(8) is None
    problem = CMO.Config().length_problem(7)
    assert all(word in problem for word in ("mixing.quiet_first = 4", "mixing.quiet_last = 3", "epochs = 7"))
