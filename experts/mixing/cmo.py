"""CMO, context-rich minority over-sampling: images of rare classes are pasted into images as they come.

Every image of a step may get a box of another one, which comes from a second sampler: rare objects before the many
backgrounds of frequent ones.

Source: Park et al., CVPR 2022, arXiv:2112.00412, as its code does it: one box for all images of a step, in half of the
steps, and in none of the first and last epochs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from experts.mixing.boxes import draw_box
from experts.mixing.mixing import Alpha, Blend, Mixing, MixingSettings, Step
from experts.registry import PieceOf, register
from experts.samplers.class_balanced import ClassBalanced


@register("mixing", "cmo")
class CMO(Mixing):
    """The share of the first label is what the box, clipped at the border, leaves of the image; empty, it leaves all.

    Published code weights an image of class c by n_c^-a, so that a class is drawn with p_c ~ n_c^(1 - a). Its default
    a = 1 is the sampler here. a = 2, the sampler `reversed`, is the distribution of the paper, q ~ 1 / n; a = 0.5 is
    `square_root`.
    """

    class Config(MixingSettings):
        model_config = ConfigDict(defer_build=True)  # samplers are registered later

        name: Literal["cmo"] = "cmo"
        alpha: Alpha = 1.0
        """The share that the box would leave if it were not clipped is drawn from Beta(alpha, alpha)."""
        probability: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Probability of a step to be mixed."""
        quiet_first: Annotated[int, Field(ge=0)] = 4
        """Epochs before the first that is mixed."""
        quiet_last: Annotated[int, Field(ge=0)] = 3
        """Epochs after the last that is mixed."""
        sampler: Annotated[Any, PieceOf("sampler")] = ClassBalanced.Config(form="multinomial")
        """Sampler of the images that boxes are cut from. One that draws fewer than the stage's draws again; what it
        draws beyond is not used."""

        @property
        def second_sampler(self) -> Any:
            """See `MixingSettings.second_sampler`."""
            return self.sampler

        def mixed_epochs(self, epochs: int) -> range:
            """See `MixingSettings.mixed_epochs`."""
            return range(self.quiet_first + 1, epochs - self.quiet_last + 1)

        def length_problem(self, epochs: int) -> str | None:
            """See `MixingSettings.length_problem`."""
            if self.mixed_epochs(epochs):
                return None
            return (
                f"mixing.quiet_first = {self.quiet_first}, mixing.quiet_last = {self.quiet_last}: no epoch is left "
                f"between them, found epochs = {epochs}; needed fewer quiet epochs than {epochs} in all, or epochs = "
                f"{self.quiet_first + self.quiet_last + 1} or more"
            )

    config: Config

    def blend(self, step: Step) -> Blend | None:
        """See `Mixing.blend`."""
        assert step.second_B is not None
        if step.now.epoch not in self.config.mixed_epochs(step.now.epochs):
            return None
        generator = step.generator("cmo")
        if generator.random() >= self.config.probability:
            return None
        box = draw_box(generator, self.config.alpha, step.image_size)
        return Blend(box.share_left(step.image_size), step.labels_B, step.second_B, None, box)
