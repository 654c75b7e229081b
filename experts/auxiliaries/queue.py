"""A queue of vectors with labels: the newest K keys of a momentum copy.

Shapes: B images of the whole batch, d numbers of a key, K entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMPTY = -1
"""Label of an entry that holds no key yet."""


class Queue(nn.Module):
    """The newest K vectors and their labels, first in, first out. Every replica holds and pushes the same.

    A partial batch pushes as many as it has; the next one goes on from there.

    Args:
        size: K.
        width: d.

    Attributes:
        keys_Kd: random directions where nothing was pushed yet.
        labels_K: int64, EMPTY there.
        next: place of the oldest entry, which is replaced next; int64 scalar.
    """

    keys_Kd: Tensor
    labels_K: Tensor
    next: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys_Kd", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("labels_K", torch.full((size,), EMPTY))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys_Bd: Tensor, labels_B: Tensor, ok: Tensor, chosen_B: Tensor | None = None) -> None:
        """Put vectors in the place of the oldest ones, in their order, where `ok`; the host does not wait.

        Args:
            keys_Bd, labels_B: the vectors.
            ok: bool scalar.
            chosen_B: those that are put in; None: all.
        """
        size = len(self.labels_K)
        pushed_B = ok.expand(len(labels_B))
        if chosen_B is not None:  # first, so that they lie side by side; the others write what is there already
            order_B = chosen_B.logical_not().to(torch.int8).argsort(stable=True)
            keys_Bd, labels_B, pushed_B = keys_Bd[order_B][:size], labels_B[order_B][:size], chosen_B[order_B] & ok
        # A stage's batch fits, a plan's may not.
        keys_Bd, labels_B, pushed_B = keys_Bd[-size:], labels_B[-size:], pushed_B[:size]
        at_B = (self.next + torch.arange(len(keys_Bd), device=keys_Bd.device)) % size
        kept_Bd = self.keys_Kd[at_B]
        self.keys_Kd.index_copy_(0, at_B, torch.where(pushed_B[:, None], keys_Bd.to(kept_Bd.dtype), kept_Bd))
        self.labels_K.index_copy_(0, at_B, torch.where(pushed_B, labels_B, self.labels_K[at_B]))
        self.next.copy_((self.next + pushed_B.sum()) % size)


def queue_problem(name: str, size: int, batch_size: int) -> str | None:
    """Return why a queue of so many keys does not go with a batch, and what to set; None where it does.

    Published code wants a multiple of the batch, because it writes a slice. Here places wrap round.

    Args:
        name: of the auxiliary.
        size: K.
        batch_size: images of the whole batch.
    """
    if size >= batch_size:
        return None
    return (
        f"queue_size = {size}: auxiliary '{name}' pushes a batch at once; needed at least batch_size = {batch_size}; "
        f"set queue_size={batch_size} or more, or a smaller batch_size"
    )
