"""BatchNorm over the global batch: differentiable, with unequal and empty shares, on CPU too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from orchestration.training.exchange import Group


def momenta_of(norm: nn.BatchNorm2d) -> tuple[float, float, float]:
    """Return the momenta of mean, variance and batch counter, in the order of the buffers; 0 for the counter.

    A momentum of None means a running average over all batches in torch. No network here uses it: 0.1 is its default.
    """
    momentum = 0.1 if norm.momentum is None else norm.momentum
    return momentum, momentum, 0.0


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of a process group, on any device, for unequal and empty shares.

    Replaces `torch.nn.SyncBatchNorm`, which refuses CPU tensors. Takes maps [B, D, H, W] and rows [B, D]. Forward
    exchanges one vector of 2 D + 1 numbers per worker, backward 2 D. Shares are combined in rank order, so every worker
    computes the same bits.
    """

    exchanges = True
    """With other workers, forward and backward; see experts/side_by_side.py."""

    # Both are set by `Mesh.synchronise_batchnorm`, which changes the class of modules that exist.
    group: Group
    of_whom: str

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)  # running statistics are the same on all workers: nothing to exchange
        maps = x if x.ndim == 4 else x[:, :, None, None]
        y, mean_D, var_D, count = _GlobalBatchNorm.apply(
            maps, self.weight, self.bias, self.eps, self.group, self.of_whom
        )
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)  # type: ignore[operator, union-attr]
                # As in torch: a batch is normalised with the biased variance, the running one is unbiased.
                unbiased = count / (count - 1).clamp(min=1)
                factor = self.momentum if self.momentum is not None else 0.1
                self.running_mean.lerp_(mean_D.to(self.running_mean.dtype), factor)
                self.running_var.lerp_((var_D * unbiased).to(self.running_var.dtype), factor)
        return y if x.ndim == 4 else y.flatten(1)


class SynchronisedBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """Synchronises the rows of a projection."""


class SynchronisedBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """Synchronises the maps of a convolution."""


def synchronised(norm: nn.Module) -> type[_Synchronised] | None:
    """Return the class that a module becomes to be synchronised; None if it is no BatchNorm, or is so already."""
    if isinstance(norm, _Synchronised):
        return None
    kinds = {nn.BatchNorm1d: SynchronisedBatchNorm1d, nn.BatchNorm2d: SynchronisedBatchNorm2d}
    return next((after for before, after in kinds.items() if isinstance(norm, before)), None)


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalise with the statistics of the global batch. Every worker of the group must call both directions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, group: Group, of_whom: str
    ) -> tuple[Tensor, ...]:
        values = _in_full(x)
        num_channels = x.shape[1]
        local_count = x.numel() // num_channels
        if local_count:  # a worker without images has no mean, but the others wait for its share
            mean_D = values.mean((0, 2, 3))
            square_D = (values - mean_D[:, None, None]).square_().sum((0, 2, 3))
        else:
            mean_D = square_D = values.new_zeros(num_channels)

        # Gathered and combined by each worker in rank order, not reduced: the order of a reduction is not fixed.
        own = torch.cat([mean_D, square_D, values.new_full((1,), local_count)])
        shares = group.all_gather(own, f"BatchNorm statistics {of_whom}".rstrip())
        mean_D, square_D, count = _combine(torch.stack(shares), num_channels)

        var_D = square_D / count
        inverse_D = (var_D + eps).rsqrt()
        scale_D = weight_D * inverse_D
        y = values * scale_D[:, None, None] + (bias_D - mean_D * scale_D)[:, None, None]

        # As it came: under autocast a copy in float32 would take twice the memory of the activations.
        ctx.save_for_backward(x, weight_D, mean_D, inverse_D, count)
        ctx.group, ctx.of_whom = group, of_whom
        # They only feed the running statistics; how the loss depends on them is in the formula of `backward`.
        ctx.mark_non_differentiable(mean_D, var_D, count)
        return y.to(x.dtype), mean_D, var_D, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, mean_D, inverse_D, count = ctx.saved_tensors
        values, grad = _in_full(x), _in_full(grads[0])
        # With n the normalised values and N the global count, dL/dx = weight / std * (g - sum(g) / N - n sum(g n) / N).
        # The two sums run over all workers: mean and variance depend on every worker's images. The gradients of weight
        # and bias stay local, since the engine sums those of all parameters.
        normal = (values - mean_D[:, None, None]) * inverse_D[:, None, None]
        grad_bias_D = grad.sum((0, 2, 3))
        grad_weight_D = (grad * normal).sum((0, 2, 3))
        both = torch.cat([grad_bias_D, grad_weight_D])  # a copy, so the local sums survive the reduction
        ctx.group.all_reduce(both, f"BatchNorm gradients {ctx.of_whom}".rstrip())
        sum_D, dot_D = both.split(len(mean_D))
        centred = grad - (sum_D / count)[:, None, None] - normal * (dot_D / count)[:, None, None]
        return (
            (centred * (weight_D * inverse_D)[:, None, None]).to(grads[0].dtype),
            grad_weight_D.to(weight_D.dtype),
            grad_bias_D.to(weight_D.dtype),
            None,
            None,
            None,
        )


def _in_full(x: Tensor) -> Tensor:
    """Return half types as float32, in which sums over a batch keep their digits."""
    return x if x.dtype == torch.float64 else x.float()


def _combine(shares: Tensor, num_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, sum of squared deviations and count of the union of shares (Chan, Golub, LeVeque 1983).

    A sum of squares minus the squared mean would cancel where the mean is large.
    """
    counts = shares[:, -1:]
    count = counts.sum()
    means, squares = shares[:, :num_channels], shares[:, num_channels:-1]
    mean_D = (means * counts).sum(0) / count
    square_D = (squares + counts * (means - mean_D).square()).sum(0)
    return mean_D, square_D, count
