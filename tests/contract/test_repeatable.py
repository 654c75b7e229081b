"""With engine.deterministic a GPU refuses operations that it cannot repeat to the bit: no recipe needs one.

The operations are those that `torch.use_deterministic_algorithms` lists as raising on CUDA.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestration.training.mesh import Mesh, MeshShape
from tests.emulated_device import DEVICE, EmulatedDevice, OnDevice
from tests.recipes import Recipe, every_recipe

REFUSED = re.compile(
    r"_?(adaptive_avg_pool[23]d|avg_pool3d|adaptive_max_pool[23]d|fractional_max_pool[23]d|reflection_pad[123]d"
    r"|upsample_(linear1d|bilinear2d|bicubic2d|trilinear3d)(_aa)?|nll_loss2d|ctc_loss|grid_sampler_[23]d"
    r"|embedding_bag.*)_backward|max_unpool[23]d|nll_loss2d_forward|put_?|histc|scatter_reduce_?|(nan)?median\.dim"
)


def refused(name, args, kwargs):
    """Say whether a GPU that must repeat itself refuses an operation."""
    if name.startswith("bincount"):
        return (len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None
    return bool(REFUSED.fullmatch(name) or REFUSED.fullmatch(name.partition(".")[0]))


class Repeatable(TorchDispatchMode):
    """Raises where a GPU would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(func).removeprefix("aten.")
        on_device = any(isinstance(value, OnDevice) for value in tree_leaves((args, kwargs)))
        if on_device and refused(name, args, kwargs):
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return func(*args, **kwargs)


@every_recipe
def test_no_recipe_needs_an_operation_that_cannot_be_repeated(method, tmp_path):
    def mesh(config):
        return Mesh(MeshShape(config.method.num_experts, config.method.num_experts), device=DEVICE)

    with EmulatedDevice(), Repeatable():
        for trainer in Recipe(method, tmp_path, mesh=mesh).trainers():
            if trainer.training is not None:
                trainer.train(1)
            trainer.evaluate("test")


@pytest.mark.parametrize(
    "work",
    [
        lambda x: torch.bincount(x.long(), x),
        lambda x: x.median(0),
        torch.histc,
        lambda x: torch.ops.aten._adaptive_avg_pool2d_backward(x.view(1, 1, 2, 2), x.view(1, 1, 2, 2)),
    ],
)
def test_such_operations_are_found(work):
    with EmulatedDevice(), Repeatable():
        x = torch.ones(4, device=DEVICE)
        with pytest.raises(RuntimeError, match="does not have a deterministic"):
            work(x)
        torch.bincount(x.long())
        x.median()
