"""CutMix: a box of another image of the step is pasted into every image; labels are weighted by area.

Source: Yun et al. 2019, arXiv:1905.04899. One box for all images of a step, as in the published code, which mixes half
of the steps on CIFAR and all of them on ImageNet.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from experts.cases import Case
from experts.mixing.boxes import draw_box
from experts.mixing.mixing import Alpha, Blend, Mixing, MixingSettings, Step
from experts.registry import register


@register("mixing", "cutmix")
class CutMix(Mixing):
    """The share of the first label is what the box, clipped at the border, leaves of the image."""

    class Config(MixingSettings):
        name: Literal["cutmix"] = "cutmix"
        alpha: Alpha = 1.0
        """The share that the box would leave if it were not clipped is drawn from Beta(alpha, alpha)."""
        probability: Annotated[float, Field(gt=0, le=1)] = 1.0
        """Probability of a step to be mixed."""

    config: Config

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Mixing.cases`."""
        return [Case(cls.Config()), Case(cls.Config(probability=0.5))]

    def blend(self, step: Step) -> Blend | None:
        """See `Mixing.blend`."""
        generator = step.generator("cutmix")
        if generator.random() >= self.config.probability:
            return None
        box = draw_box(generator, self.config.alpha, step.image_size)
        order_B = step.order("cutmix order")
        return Blend(box.share_left(step.image_size), step.labels_B, step.labels_B[order_B], order_B, box)
