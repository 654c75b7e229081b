"""Operations that a GPU refuses with engine.deterministic, since it cannot repeat them to the bit.

They are those that `torch.use_deterministic_algorithms` lists as raising on CUDA.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.emulated_device import OnDevice

REFUSED = re.compile(
    r"_?(adaptive_avg_pool[23]d|avg_pool3d|adaptive_max_pool[23]d|fractional_max_pool[23]d|reflection_pad[123]d"
    r"|upsample_(linear1d|bilinear2d|bicubic2d|trilinear3d)(_aa)?|nll_loss2d|ctc_loss|grid_sampler_[23]d"
    r"|embedding_bag.*)_backward|max_unpool[23]d|nll_loss2d_forward|put_?|histc|scatter_reduce_?|(nan)?median\.dim"
)


class Repeatable(TorchDispatchMode):
    """Notes what a GPU would refuse.

    Attributes:
        refused: names of such operations on the emulated device, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _refused(func, args, kwargs) and any(isinstance(v, OnDevice) for v in tree_leaves((args, kwargs))):
            self.refused.append(str(func))
        return func(*args, **kwargs)


def _refused(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    name = _name(func)
    if name.startswith("bincount"):  # with weights
        return (len(args) > 1 and args[1] is not None) or kwargs.get("weights") is not None
    return _matches(name)


@cache
def _name(func: Any) -> str:
    return str(func).removeprefix("aten.")


@cache
def _matches(name: str) -> bool:
    return bool(REFUSED.fullmatch(name) or REFUSED.fullmatch(name.partition(".")[0]))
