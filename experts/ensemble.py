"""An ensemble: a trunk that experts share, the experts by name, and the parts after all of them.

Shapes: E experts, e of them on this worker, B images, D features, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experts.attention.attention import put_before_pooling
from experts.calibrations.calibration import put_on
from experts.registry import build

RESERVED = ("ensemble", "all experts", "trunk", "shared", "objective")
"""Names that a run gives to other rows of its tables and to other files, so that no expert may have them."""


class Expert(nn.Module):
    """Late stages and a head. They are separate, because some methods mix the features of several images in between.

    Attributes:
        features: trunk output to [B, D].
        head: features to [B, C], or to what the ensemble's shared head takes.
        gate: features to the hidden layer of a router; None without a router, and in the last expert.
        position: place among all experts, from 0.
        auxiliaries: by name; only while a stage that has some trains (experts/auxiliaries/).
        momentum_copy: a twin of "features" and of "embed", the auxiliaries' embeddings by name, which follows them
            while such a stage trains; None where no auxiliary asks for one.
    """

    momentum_copy: nn.ModuleDict | None

    def __init__(self, features: nn.Module, head: nn.Module, gate: nn.Module | None = None, position: int = 0) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.gate = gate
        self.position = position
        self.auxiliaries = nn.ModuleDict()
        self.momentum_copy = None

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits [B, C] of a trunk output."""
        return self.head(self.features(h))


class Ensemble(nn.Module):
    """The experts of one worker, with a copy of the trunk and of the parts after all experts.

    Attributes:
        trunk: images [B, 3, H, W] to the input of every expert.
        experts: name to `Expert`, in the order of the logits.
        shared: "head", where all experts share one (ResLT), and "router", the last layer of a router (RIDE).
        trunk_copy: a twin of the trunk that follows it, for the experts' momentum copies; else None.
    """

    trunk_copy: nn.Module | None

    def __init__(
        self, trunk: nn.Module, experts: dict[str, Expert], shared: dict[str, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.experts = nn.ModuleDict(experts)
        self.shared = nn.ModuleDict(shared or {})
        self.trunk_copy = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts of this worker, in the order of the logits."""
        return tuple(self.experts)

    @property
    def has_router(self) -> bool:
        """Whether a router may ask fewer than all experts."""
        return "router" in self.shared

    def members(self) -> list[Expert]:
        """Return the experts of this worker, in the order of the logits."""
        return list(self.experts.values())  # type: ignore[arg-type]

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Return the logits of the experts of this worker, [e, B, C]."""
        h = self.trunk(images_B3HW)
        return self.through_shared_head(torch.stack([expert(h) for expert in self.experts.values()]))

    def through_shared_head(self, scores: Tensor) -> Tensor:
        """Return the scores of the experts' own heads, [e, B, X], after the head that they share, if there is one."""
        return self.shared["head"](scores) if "head" in self.shared else scores

    def outputs(
        self, images_B3HW: Tensor, gather: Callable[[Tensor], Tensor] = lambda own: own
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits [E, B, C] and router scores [E, B] (None without a router) of all experts.

        Args:
            images_B3HW: the images.
            gather: [e, ...] of this worker's experts to [E, ...] of all; an exchange where they are on several workers.
        """
        return self.outputs_of(self.features(images_B3HW), gather)

    def features(self, images_B3HW: Tensor) -> list[Tensor]:
        """Return what the heads of this worker's experts take, one [B, D] each."""
        h = self.trunk(images_B3HW)
        return [expert.features(h) for expert in self.members()]

    def outputs_of(
        self, features: Sequence[Tensor], gather: Callable[[Tensor], Tensor] = lambda own: own
    ) -> tuple[Tensor, Tensor | None]:
        """Return the same as `outputs`, from the `features` of the images."""
        scores = torch.stack([x.head(f) for x, f in zip(self.members(), features, strict=True)])
        logits_EBC = gather(self.through_shared_head(scores))
        if not self.has_router:
            return logits_EBC, None
        return logits_EBC, gather(self.gate_scores(features, logits_EBC))

    def gate_scores(self, features: Sequence[Tensor], logits_EBC: Tensor) -> Tensor:
        """Return scores [e, B] of this worker's gates for asking the next expert too; 0 for an expert without a gate.

        Args:
            features: one [B, D] per expert of this worker.
            logits_EBC: of all experts; gate k takes the mean of the first k + 1.
        """
        scores = []
        for expert, features_BD in zip(self.members(), features, strict=True):
            if expert.gate is not None:
                running_BC = logits_EBC[: expert.position + 1].mean(dim=0)
                scores.append(self.shared["router"](expert.gate(features_BD), running_BC))
            else:
                scores.append(features_BD.new_zeros(features_BD.shape[0]))  # `len` would be a constant in an export
        return torch.stack(scores)


@dataclass(frozen=True)
class EnsembleConfig:
    """The parts of an ensemble. Together with a seed it determines the initial weights.

    Attributes:
        backbone: config of a registered "model".
        head: config of a registered "head".
        num_classes: C, at least 2.
        expert_names: all experts of the ensemble, in the order of the logits.
        reduce_dimension: thinner late stages, as RIDE has them.
        calibration: config of a registered "calibration" on every head; None for none.
        shared_head: one head for all experts, in `Ensemble.shared`.
        router: config of a registered "router"; None for none.
        attention: config of a registered "attention" on every expert's last map; None for none.
        image_size: side of the images in pixels, which attention needs; None where it is not known.
    """

    backbone: Any
    head: Any
    _: KW_ONLY
    num_classes: int
    expert_names: Sequence[str]
    reduce_dimension: bool
    shared_head: bool = False
    router: Any = None
    calibration: Any = None
    attention: Any = None
    image_size: int | None = None

    @property
    def num_features(self) -> int:
        """D, the width of an expert's features."""
        return int(build("model", self.backbone).num_features(reduce_dimension=self.reduce_dimension))

    @property
    def trunk_channels(self) -> int:
        """c, the channels of the trunk's output."""
        return int(build("model", self.backbone).trunk_channels)


def build_ensemble(config: EnsembleConfig, *, seed: int, only: Sequence[str] | None = None) -> Ensemble:
    """Build the trunk and some or all experts, on the CPU, in float32.

    The weights of the trunk and of each expert are a pure function of the seed and of "trunk" or the expert's name.
    They depend neither on the other experts that are built nor on the state of a generator, and change no such state.
    So workers that build their own experts alone have, together, what one worker would have built.

    Args:
        config: backbone, heads, experts and classes.
        seed: of the run.
        only: the experts to build, in any order; all if None.

    Raises:
        ValueError: there is no expert, a name is used twice or cannot be a key, a name in `only` is not an expert's, or
            there are fewer than 2 classes.
    """
    names = config.expert_names
    check_names(names)
    chosen = list(names) if only is None else list(only)
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        raise ValueError(
            f"experts to build: {', '.join(map(repr, chosen)) or 'none'}; needed one or more of "
            f"{', '.join(map(repr, names))}"
        )
    if config.num_classes < 2:
        raise ValueError(f"num_classes = {config.num_classes}; a classifier needs at least 2")
    return _Builder(config, seed).ensemble(chosen)


class _Builder:
    """Builds the parts of an ensemble. Each part draws its weights with a key of its own."""

    def __init__(self, config: EnsembleConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.backbone = build("model", config.backbone)
        self.num_features = self.backbone.num_features(reduce_dimension=config.reduce_dimension)
        self.router = None if config.router is None else build("router", config.router)

    def ensemble(self, chosen: Collection[str]) -> Ensemble:
        with keyed_draws(self.seed, "trunk"):
            trunk = self.backbone.trunk()
            self.backbone.initialise(trunk)
        experts = {
            name: self.expert(position, name)
            for position, name in enumerate(self.config.expert_names)
            if name in chosen
        }
        return Ensemble(trunk, experts, self.shared())

    def expert(self, position: int, name: str) -> Expert:
        with keyed_draws(self.seed, f"expert/{name}"):
            # Layers draw weights when they are made, and `initialise` draws again. In another order, the same seed
            # would give other weights.
            features = self.backbone.late_stages(reduce_dimension=self.config.reduce_dimension)
            head = nn.Identity() if self.config.shared_head else self.head(position)
            expert = Expert(features, head, position=position)
            self.backbone.initialise(expert)
        self.attend(features, name)
        if not self.config.shared_head:
            self.calibrate(head, name)
        last = position == len(self.config.expert_names) - 1  # after it there is no expert to ask
        if self.router is not None and not last:
            # A key of its own: a router stage starts from experts that were built without a router.
            with keyed_draws(self.seed, f"gate/{name}"):
                expert.gate = self.router.hidden(self.num_features)
        return expert

    def shared(self) -> dict[str, nn.Module]:
        shared = {}
        if self.config.shared_head:
            with keyed_draws(self.seed, "shared/head"):
                shared["head"] = self.head(0)
                self.backbone.initialise(shared["head"])
            self.calibrate(shared["head"], "shared")
        if self.router is not None:
            with keyed_draws(self.seed, "shared/router"):
                shared["router"] = self.router.final(self.config.num_classes)
        return shared

    def calibrate(self, head: nn.Module, name: str) -> None:
        """Put a calibration on a head, if there is one. Its draws have a key of their own: a head is older than it."""
        if self.config.calibration is not None:
            with keyed_draws(self.seed, f"calibration/{name}"):
                put_on(head, build("calibration", self.config.calibration, self.num_features, self.config.num_classes))

    def attend(self, features: nn.Module, name: str) -> None:
        """Put attention on an expert's last map, if there is one. Its draws have a key of their own."""
        if self.config.attention is None:
            return
        assert self.config.image_size is not None, "attention on maps of a size that is not known"
        assert self.backbone.experts_have_maps, "attention without a map; a config is refused for it"
        shape = self.backbone.map_shape(self.config.image_size, reduce_dimension=self.config.reduce_dimension)
        with keyed_draws(self.seed, f"attention/{name}"):
            put_before_pooling(features, build("attention", self.config.attention, *shape))

    def head(self, position: int) -> nn.Module:
        return build("head", self.config.head, self.num_features, self.config.num_classes, position)


TRAINING_ONLY = ("auxiliaries", "momentum copies")
"""Parts that an ensemble has only while a stage trains: no model that is exported has them, and no later stage."""


def part_of(name: str) -> str:
    """Return the part of an ensemble that a tensor belongs to.

    It is trunk, features, attention, heads, memory, calibration, gates, or one of TRAINING_ONLY.
    """
    words = name.split(".")  # trunk.<...>, trunk_copy.<...>, experts.<name>.<part>.<...> or shared.<part>.<...>
    if words[0] in ("trunk", "trunk_copy"):
        return "trunk" if words[0] == "trunk" else "momentum copies"
    kind, *inner = words[1:] if words[0] == "shared" else words[2:]
    if kind == "head" and inner[0] in ("calibration", "memory"):
        return inner[0]
    if kind == "features" and inner[:2] == ["pool", "attention"]:
        return "attention"
    return {
        "features": "features",
        "head": "heads",
        "gate": "gates",
        "router": "gates",
        "auxiliaries": "auxiliaries",
        "momentum_copy": "momentum copies",
    }[kind]


def freeze(model: Ensemble, learning: Collection[str]) -> list[nn.Module]:
    """Let only some parts of an ensemble learn.

    Args:
        model: requires_grad of its parameters is set.
        learning: the parts that learn, as `part_of` names them.

    Returns:
        The trunk and features that do not learn, and copies of them, whose BatchNorm statistics may have to stay as
        they are.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in learning)
    frozen: list[nn.Module | None] = [] if "trunk" in learning else [model.trunk, model.trunk_copy]
    if "features" not in learning:
        for expert in model.members():
            frozen += [expert.features, None if expert.momentum_copy is None else expert.momentum_copy["features"]]
    return [module for module in frozen if module is not None]


def check_names(expert_names: Sequence[str]) -> None:
    """Refuse expert names that would be ambiguous or invalid in logs and files.

    Raises:
        ValueError: there is no name, or one is used twice, is empty, has a dot or a slash, or is reserved.
    """
    if not expert_names:
        raise ValueError("an ensemble needs at least 1 expert; set method.num_experts to 1 or more")
    for name in expert_names:
        if not name or "." in name or "/" in name or name in RESERVED:
            raise ValueError(f"expert name '{name}': needs a word without '.' and '/' other than {', '.join(RESERVED)}")
        if hasattr(nn.ModuleDict, name):
            raise ValueError(f"expert name '{name}': torch's containers have an attribute of that name; choose another")
        if list(expert_names).count(name) > 1:
            raise ValueError(f"expert name '{name}' is used twice; every expert needs its own")


@contextmanager
def keyed_draws(seed: int, key: str) -> Iterator[None]:
    """Make torch's CPU draws a function of (seed, key) inside the block, and restore the generator after it."""
    digest = hashlib.sha256(f"initial weights/{seed}/{key}".encode()).digest()
    default_dtype = torch.get_default_dtype()
    # The CPU generator alone: torch.manual_seed would also seed GPUs, which a driver must not touch.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # 63 bits: a seed of 64 would be negative wherever it is read as a signed number.
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default_dtype)
