"""The linear head whose rows are normalised in evaluation.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from experts.cases import Case
from experts.heads.head import Head
from experts.precision import at_least_float32
from experts.registry import Settings, register
from experts.tunable import Candidates, Tunable, tenths


@register("head", "tau_normalised")
class TauNormalisedHead(nn.Linear, Head, Tunable):
    """Linear in training; in evaluation x W'^T with every row of W divided by its norm to a power, and no bias.

    Frequent classes end training with longer rows; dividing takes that advantage away. A row of zeros scores 0.

    Source: Kang et al. 2020, arXiv:1910.09217, section 4.2; as ResLT (arXiv:2101.10633) and its published code use it
    in evaluation on ImageNet-LT and iNaturalist.
    Differs: Kang's code chooses the power (tau there) on the split that it then reports; ours on the validation split.
    ResLT's iNaturalist script evaluates with gamma 0 after training with gamma 0.3; ours is one number.
    """

    class Config(Settings):
        name: Literal["tau_normalised"] = "tau_normalised"
        scale: ClassVar[float] = 1.0
        gamma: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = 0.7
        """Power of the norm, no unit: 0 keeps the rows, 1 gives all the same length; null chooses it on the validation
        split. Published: 0.7 for ResNeXt-50 and -101, 0.3 for ResNet-10 and iNaturalist, 0.8 for Places-LT."""
        candidates: Candidates = tenths(20)
        """Powers to choose from where gamma is null; published: 0, 0.1, ..., 2."""

    continues: ClassVar[tuple[str, ...]] = ("linear",)
    evens: ClassVar[bool] = True
    tuned_key: ClassVar[str] = "gamma"
    published: ClassVar[float] = 0.7
    origin: ClassVar[str] = "Kang et al. 2020, ImageNet-LT with ResNeXt-50"

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Head.cases`."""
        return [Case(cls.Config()), Case(cls.Config(gamma=None))]

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__(num_features, num_classes)
        self.take_number(config)

    def forward(self, features_BD: Tensor) -> Tensor:
        if self.training:
            return super().forward(features_BD)
        weight_CD = at_least_float32(self.weight)
        norm_C1 = weight_CD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return F.linear(features_BD, (weight_CD / norm_C1**self.value).to(features_BD.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.value:g}"
