"""Weights of experts for a test set whose class distribution is unknown, learnt from its images without their labels.

An expert that fits the test distribution agrees with itself on two random views of an image. So E numbers are learnt
that make the weighted ensemble agree with itself; the networks stay as they are. Two things to compare it with lie
here too: the best weights that labels would give (the oracle), and the correction for a known test distribution.

Source: Zhang et al. 2022, arXiv:2107.09249 (TADE, SADE), section 4.3 and the published scripts.

Shapes: E experts, B images of a batch, N images of a test set, C classes, G candidate weightings; 2 views.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from experts.data.transfer import to_device
from experts.precision import at_least_float32
from experts.registry import Settings

MIN_CLASSES = 20
"""Below this the agreement of two views says little about accuracy (issue 9 of the published repository)."""
SCORES_AT_ONCE = 2**24  # numbers held while candidate weightings are tried
MAX_GRID = 240  # candidates of the oracle's grid
FINEST_MOVE = 0.005  # of the oracle's refinement
LEAST_PRIOR = 1e-12


class WeightLearning(Settings):
    """How the E weights are learnt. The defaults are those of the published CIFAR script."""

    lr: Annotated[float, Field(gt=0)] = 0.1
    """Constant learning rate; published: that of the network's training."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Nesterov's; 0 is plain gradient descent."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 penalty on the E numbers under the softmax."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy term; published: 0.01 for iNaturalist, else 0."""
    epochs: Annotated[int, Field(ge=1)] = 5
    """Most passes over the test images, each with new views."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images per step, shuffled; the last batch of a pass may be smaller."""
    stop_below: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """No further pass once a weight, rounded to 2 decimals, is below this; 0 never stops early."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the views and of the order of the images."""


PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10_lt": {"lr": 0.1, "weight_decay": 5e-4},
    "cifar100_lt": {"lr": 0.1, "weight_decay": 5e-4},
    "imagenet_lt": {"lr": 0.025, "weight_decay": 5e-4},
    "places_lt": {"lr": 0.01, "weight_decay": 4e-4},
    "inat18": {"lr": 0.2, "weight_decay": 2e-4, "entropy": 0.01},
}
"""Values of the published scripts by name of the dataset; others take the defaults."""


def combine(weights_E: Tensor, logits_EBC: Tensor) -> Tensor:
    """Return the weighted sum of the experts' logits, [B, C]."""
    logits_EBC = at_least_float32(logits_EBC)
    return torch.einsum("e,ebc->bc", to_device(weights_E, logits_EBC.device, logits_EBC.dtype), logits_EBC)


def disagreement(weights_E: Tensor, views_2EBC: Tensor, entropy: float = 0.0) -> Tensor:
    """Return the quantity to minimise: how little the ensemble's probabilities agree between two views of an image.

    Per image, with p' and p'' the softmax of the weighted logits of its two views:
    - cos(p', p'') + entropy * (mean over classes of p' log p' + the same of p'').

    Args:
        weights_E: on the simplex.
        views_2EBC: logits of both views, any float type; computed in float64.
        entropy: weight of the second term, which prefers spread-out probabilities.

    Returns:
        float64 [B]; its mean is the published loss, since every image has the same C.

    Source: arXiv:2107.09249, Eq. 8, and `test_training_*.py` of its repository.
    Differs: p log p is taken from log-probabilities, so that p = 0 gives 0 and not NaN.
    """
    zhat_2BC = torch.einsum("e,vebc->vbc", weights_E.double(), views_2EBC.double())
    log_p_2BC = zhat_2BC.log_softmax(dim=-1)
    p_2BC = log_p_2BC.exp()
    loss_B = -cosine_similarity(p_2BC[0], p_2BC[1], dim=-1, eps=1e-6)
    if entropy:
        loss_B = loss_B + entropy * (p_2BC * log_p_2BC).mean(dim=-1).sum(dim=0)
    return loss_B


class Learner:
    """The E weights of one test set while they are learnt.

    Attributes:
        trajectory: the weights after every pass.
        stopped: whether a weight became so small that no further pass follows.
        steps: taken in finished passes.
    """

    def __init__(self, num_experts: int, settings: WeightLearning, device: torch.device | str = "cpu") -> None:
        self.settings = settings
        self.trajectory: list[list[float]] = []
        self.stopped = False
        self.steps = 0
        self._losses: list[Tensor] = []  # of the steps since then
        self._ok = torch.ones((), dtype=torch.bool, device=device)  # all losses so far are finite
        # Any equal numbers give uniform weights; 1 / E is the published start, and weight decay acts on it.
        start = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64, device=device)
        self._w_E = start.requires_grad_()
        self._optimizer = torch.optim.SGD(
            [self._w_E],
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )

    @property
    def numbers_E(self) -> Tensor:
        """The learnt numbers under the softmax, a copy; they start at 1 / E."""
        return self._w_E.detach().clone()

    @property
    def weights_E(self) -> Tensor:
        """Softmax of the learnt numbers, float64."""
        return self.numbers_E.softmax(dim=0)

    def step(self, views_2EBC: Tensor) -> Tensor:
        """Take one step on a batch of views and return the loss before it.

        The host does not wait for it: `end_pass` finds out whether loss and numbers were finite. If not, the numbers
        stay as they were before.
        """
        before_E = self.numbers_E
        self._optimizer.zero_grad()
        loss = disagreement(self._w_E.softmax(dim=0), views_2EBC, self.settings.entropy).mean()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            self._ok = self._ok & loss.isfinite() & self._w_E.isfinite().all()
            self._w_E.copy_(torch.where(self._ok, self._w_E, before_E))
        self._losses.append(loss.detach())
        return self._losses[-1]

    def end_pass(self) -> None:
        """Record the weights of a finished pass over the images, and decide whether it was the last.

        Raises:
            FloatingPointError: the loss of a step was not finite.
        """
        numbers = torch.stack([*self._losses, *self.weights_E]).tolist()
        losses, weights = numbers[: len(self._losses)], numbers[len(self._losses) :]
        for step, loss in enumerate(losses, self.steps + 1):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"test-time weights: the loss of step {step} is {loss}; the experts' logits are not finite or too "
                    "large: the model has diverged, evaluate another one (--model last or best)"
                )
        self.steps += len(losses)
        self._losses.clear()
        self.trajectory.append(weights)
        self.stopped = min(round(weight, 2) for weight in weights) < self.settings.stop_below


@dataclass(frozen=True)
class WeightChoice:
    """The weights to use for one test set, and why.

    Attributes:
        weights: those to use, on the simplex.
        learnt: those that were learnt; they differ from `weights` where they were refused.
        loss_uniform, loss_learnt: mean `disagreement` on views that took no part in learning.
        fallback: why uniform weights are used instead; None where they are not.
        warnings: reasons to doubt the weights.
    """

    weights: list[float]
    learnt: list[float]
    loss_uniform: float
    loss_learnt: float
    fallback: str | None
    warnings: list[str] = field(default_factory=list)


def choose_weights(learner: Learner, loss_uniform: float, loss_learnt: float, num_classes: int) -> WeightChoice:
    """Choose the learnt weights, or uniform ones where the learnt ones do worse by their own measure on new views.

    Args:
        learner: at its end.
        loss_uniform, loss_learnt: mean `disagreement` of uniform and of learnt weights on the same, new views.
        num_classes: C.
    """
    learnt = learner.weights_E.tolist()
    uniform = [1 / len(learnt)] * len(learnt)
    fallback = None
    if not loss_learnt <= loss_uniform:  # also where a loss is NaN
        fallback = (
            f"uniform weights are used, because the learnt ones agree less with themselves on new views (surrogate "
            f"{loss_learnt:.6f}, with uniform weights {loss_uniform:.6f}; lower is better)"
        )
    warnings = []
    if num_classes < MIN_CLASSES:
        warnings.append(
            f"{num_classes} classes: with fewer than {MIN_CLASSES}, agreement between views says little about "
            "accuracy, and the learnt weights may do harm; compare them with uniform ones"
        )
    if len(learnt) == 1:
        warnings.append("1 expert: there is nothing to weigh, its weight is 1")
    return WeightChoice(uniform if fallback else learnt, learnt, loss_uniform, loss_learnt, fallback, warnings)


def simplex_grid(num_experts: int, max_points: int = MAX_GRID) -> np.ndarray:
    """Return evenly spread weightings, float64 [G, E], nearest to uniform first; the first is uniform.

    All multiples of 1/s that sum to 1, s as large as max_points allows, at most 100.
    """
    parts = 1
    while parts < 100 and math.comb(parts + num_experts, num_experts - 1) <= max_points:
        parts += 1
    # Stars and bars: E - 1 bars among `parts` stars, and a weight is the number of stars between two bars.
    bars = itertools.combinations(range(parts + num_experts - 1), num_experts - 1)
    edges_GE = np.array([(-1, *bar, parts + num_experts - 1) for bar in bars])
    grid_GE = (np.diff(edges_GE) - 1) / parts
    uniform_E = np.full((1, num_experts), 1 / num_experts)
    # Rounded, so that weightings at the same distance stay in the same order on every machine.
    order = np.argsort(((grid_GE - uniform_E) ** 2).sum(axis=1).round(12), kind="stable")
    return np.concatenate([uniform_E, grid_GE[order]])


def correct_counts(weights_GE: np.ndarray, logits_ENC: Tensor, labels_N: Tensor) -> np.ndarray:
    """Count the images that each of G weightings classifies rightly, int64 [G].

    Only images on which the experts disagree are computed: a class that every expert puts first is first in every
    weighting that has no negative weight.
    """
    top_EN = logits_ENC.argmax(dim=-1)
    alike_N = (top_EN == top_EN[0]).all(dim=0)
    total_G = ((top_EN[0] == labels_N) & alike_N).sum().repeat(len(weights_GE))
    # As many images at a time as keep the scores of all weightings in bounds.
    open_N = (~alike_N).nonzero()[:, 0]
    weights = to_device(weights_GE, logits_ENC.device, logits_ENC.dtype)
    images = max(1, SCORES_AT_ONCE // max(1, len(weights_GE) * logits_ENC.shape[-1]))
    for rows in open_N.split(images):
        predicted_GB = torch.einsum("ge,ebc->gbc", weights, logits_ENC[:, rows]).argmax(dim=-1)
        total_G += (predicted_GB == labels_N[rows]).sum(dim=1)
    return total_G.cpu().numpy()


def oracle_weights(logits_ENC: Tensor, labels_N: Tensor, also: Iterable[Sequence[float]] = ()) -> list[float]:
    """Return the best weights found with the labels: an upper bound for learning without them.

    A grid over the simplex, and from its best point moves of weight between two experts, ever smaller down to 0.005.
    Among equally good weights on the grid, those nearest to uniform win. At least as good as uniform and as `also`.

    Args:
        logits_ENC: of the test images, N at least 1.
        labels_N: their class ids.
        also: further weightings to begin from.
    """
    num_experts = len(logits_ENC)
    logits_ENC, labels_N = at_least_float32(logits_ENC), to_device(labels_N, logits_ENC.device)
    tried_GE = np.concatenate([simplex_grid(num_experts), np.array([list(w) for w in also]).reshape(-1, num_experts)])
    correct_G = correct_counts(tried_GE, logits_ENC, labels_N)
    best_E, most = tried_GE[correct_G.argmax()], correct_G.max()
    move = 0.04
    while move >= FINEST_MOVE:
        around_GE = _moved(best_E, move)
        correct_G = correct_counts(around_GE, logits_ENC, labels_N) if len(around_GE) else np.array([most])
        if correct_G.max() > most:
            best_E, most = around_GE[correct_G.argmax()], correct_G.max()
        else:
            move /= 2
    return best_E.tolist()


def _moved(weights_E: np.ndarray, move: float) -> np.ndarray:
    """Return all weightings that move `move`, or as much as there is, from one expert to another, [G, E]."""
    moved = []
    for giver, taker in itertools.permutations(range(len(weights_E)), 2):
        given = min(move, weights_E[giver])
        if given > 0:
            other = weights_E.copy()
            other[giver] -= given
            other[taker] += given
            moved.append(other)
    return np.array(moved)


def class_prior(counts_C: np.ndarray) -> np.ndarray:
    """Return class frequencies, float64 [C], none below 1e-12: a class without an image is all but ruled out.

    Raises:
        ValueError: there is no image at all.
    """
    counts = np.asarray(counts_C, np.float64)
    if not counts.sum() > 0:
        raise ValueError("a class prior needs at least 1 image, found none")
    return np.maximum(counts / counts.sum(), LEAST_PRIOR)


def correct_for_prior(logits_EBC: Tensor, target_C: np.ndarray, trained_log_EC: np.ndarray) -> Tensor:
    """Return the logits for a test set whose class distribution is known: z + log p_test - log p_trained, [E, B, C].

    Args:
        logits_EBC: scores of experts, each for the class distribution that it was trained for.
        target_C: class frequencies of the test set, all above 0.
        trained_log_EC: log of the distribution that each expert's softmax is for, up to a constant; zeros are uniform.

    Raises:
        ValueError: shapes do not fit, or a frequency is not above 0.

    Source: Saerens et al. 2002; Hong et al. 2021 (LADE), arXiv:2012.00321, Eq. 5, "PC softmax".
    """
    experts, _, classes = logits_EBC.shape
    if target_C.shape != (classes,) or trained_log_EC.shape != (experts, classes):
        raise ValueError(
            f"prior correction: found a test prior {list(target_C.shape)} and trained priors "
            f"{list(trained_log_EC.shape)}; needed [{classes}] and [{experts}, {classes}]"
        )
    if not (target_C > 0).all():
        raise ValueError(
            f"prior correction: class {int(np.argmin(target_C))} has test frequency {target_C.min():g}, needed more "
            "than 0; use class_prior, which has a least frequency"
        )
    shift_EC = np.log(target_C) - trained_log_EC
    logits_EBC = at_least_float32(logits_EBC)
    return logits_EBC + to_device(shift_EC, logits_EBC.device, logits_EBC.dtype)[:, None]
