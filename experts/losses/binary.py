"""Binary losses: every class of every image is a yes-or-no question, asked of the sigmoid of its score.

Their scores rank the classes; a softmax of them is no calibrated probability.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def one_hot(labels_B: Tensor, like: Tensor) -> Tensor:
    """Return 1 at every image's label and 0 elsewhere, [B, C], in the type of scores [..., B, C].

    Raises:
        RuntimeError: a label outside [0, C).
    """
    return torch.zeros_like(like[0]).scatter(-1, labels_B.unsqueeze(-1), 1.0)


def binary_cross_entropy(logits_EBC: Tensor, target_BC: Tensor) -> Tensor:
    """Return -log sigmoid(z) where the target is 1 and -log(1 - sigmoid(z)) where it is 0, [E, B, C].

    Exact for scores of any size; torch's softplus is linear from 20 on.
    """
    return -F.logsigmoid((2 * target_BC - 1) * logits_EBC)


def focal_factor(logits_EBC: Tensor, target_BC: Tensor, gamma: float) -> Tensor:
    """Return (1 - p_t)^gamma, p_t the probability given to the true answer, [E, B, C]."""
    # log(1 - p_t) is minus the loss of the opposite answer; its power cannot overflow, nor its slope at p_t = 1.
    return (gamma * F.logsigmoid((1 - 2 * target_BC) * logits_EBC)).exp()
