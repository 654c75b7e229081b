"""The parameters that learn, in a few flat tensors ("leaves"), of which the modules hold views.

A part of the network has one leaf for each learning rate. A step then has a handful of gradients instead of hundreds:
one exchange without copying them together, one hook of DeepSpeed, a few launches of the optimiser.

    weights     every module keeps its parameters, by name, as views of the leaf: whatever loads, saves or looks at
                weights needs to know nothing of leaves
    forward     while `lent`, the modules' attributes are other views, through which gradients reach the leaf
    gradients   one flat tensor per leaf, in the order of its parameters
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experts.ensemble import Ensemble, part_of

PARTS = ("trunk", "experts", "shared")
"""Parts of an ensemble whose gradients are summed over different workers."""
_ALIGNED = 4
"""Parameters begin at multiples of so many elements: a GPU's fastest kernels take addresses in steps of 16 bytes."""


@dataclass(frozen=True)
class Place:
    """The place of one parameter in a leaf.

    Attributes:
        name: of the parameter in the ensemble.
        module, attribute: where a forward pass looks it up.
        shape: of the parameter.
        start, stop: of its elements in the leaf.
        channels_last: whether its four axes lie in the leaf with the second one last.
    """

    name: str
    module: nn.Module
    attribute: str
    shape: torch.Size
    start: int
    stop: int
    channels_last: bool = False

    def view(self, flat: Tensor) -> Tensor:
        """Return the parameter's elements of a tensor as large as the leaf, in the parameter's shape."""
        return self.shaped(flat[self.start : self.stop])

    def shaped(self, elements: Tensor) -> Tensor:
        """Return the parameter's elements in its shape."""
        if not self.channels_last:
            return elements.view(self.shape)
        kinds, channels, height, width = self.shape
        return elements.view(kinds, height, width, channels).permute(0, 3, 1, 2)


@dataclass
class Leaf:
    """Parameters of one part with one learning rate.

    Attributes:
        part: one of PARTS.
        lr_factor: factor of the learning rate.
        flat: all their elements, and a few zeros between them, which stay zeros. It is what learns.
        places: of the parameters, in the order of the ensemble.
    """

    part: str
    lr_factor: float
    flat: nn.Parameter
    places: list[Place]

    @property
    def sizes(self) -> list[int]:
        """Numbers of elements of each parameter, and of the empty ones before it where there are any."""
        sizes, end = [], 0
        for place in self.places:
            sizes += [place.start - end] if place.start > end else []
            sizes.append(place.stop - place.start)
            end = place.stop
        return sizes

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the views of a tensor as large as the leaf, by parameter."""
        return {place.name: place.view(flat) for place in self.places}

    def gathered(self, named: Mapping[str, Tensor]) -> Tensor:
        """Return a new flat tensor with the values of every parameter, in the type and on the device of the leaf."""
        flat = torch.zeros_like(self.flat.detach())
        for place in self.places:
            place.view(flat).copy_(named[place.name])
        return flat

    def name_at(self, index: int) -> str:
        """Return the name of the parameter that has the element with this index."""
        return next(place.name for place in self.places if index < place.stop)


class Leaves:
    """The leaves of an ensemble: those of the trunk first, then those of the experts held here, then shared ones.

    Args:
        model: its parameters that require gradients become views of leaves.
        lr_factors: factor of an expert's learning rate, by name; 1 if missing.
        part_factors: the same for parts by name (`part_of`). The two are multiplied.
        channels_last: whether kernels of convolutions lie in memory with their channels last.
    """

    def __init__(
        self,
        model: Ensemble,
        lr_factors: Mapping[str, float] | None = None,
        part_factors: Mapping[str, float] | None = None,
        *,
        channels_last: bool = False,
    ) -> None:
        self.all: list[Leaf] = []
        for part in PARTS:
            groups: dict[float, list[tuple[str, nn.Module, str]]] = {}
            for name, module, attribute in _learning(part, getattr(model, part)):
                factor = _factor(name, lr_factors or {}, part_factors or {})
                groups.setdefault(factor, []).append((name, module, attribute))
            self.all += [_leaf(part, factor, found, channels_last) for factor, found in groups.items()]
        self.relink()

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def of(self, *parts: str) -> list[Leaf]:
        """Return the leaves of some parts."""
        return [leaf for leaf in self.all if leaf.part in parts]

    def relink(self) -> None:
        """Make the modules' parameters views of the leaves again, after these have moved in memory."""
        for leaf in self.all:
            for place in leaf.places:
                place.module._parameters[place.attribute] = nn.Parameter(place.view(leaf.flat.detach()))

    @contextmanager
    def lent(self) -> Iterator[list[Tensor]]:
        """Give the modules views of the leaves for one forward pass; yield what to ask gradients of, one per leaf.

        These are new tensors on the leaves' memory, not the leaves: autograd's node of a leaf lives on where something
        has hooked to it, as DeepSpeed does, and keeps the CUDA stream that it was made on; a graph cannot be captured
        through another stream (graphs.py).
        """
        flats = [leaf.flat.detach().requires_grad_() for leaf in self.all]
        for leaf, flat in zip(self.all, flats, strict=True):
            # In one operation, whose gradient is one too. Between two parameters there may be some empty elements.
            pieces = iter(flat.split(leaf.sizes))
            end = 0
            for place in leaf.places:
                if place.start > end:
                    next(pieces)
                place.module.__dict__[place.attribute] = place.shaped(next(pieces))
                end = place.stop
        try:
            yield flats
        finally:  # the views hold the graph of a step, which must not outlive it
            for leaf in self.all:
                for place in leaf.places:
                    del place.module.__dict__[place.attribute]


def _learning(part: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield name, module and attribute of the parameters of a part that learn."""
    seen: set[int] = set()
    for path, owner in module.named_modules(prefix=part):
        for attribute, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                assert id(parameter) not in seen, f"{path}.{attribute} belongs to another module too"
                seen.add(id(parameter))
                yield f"{path}.{attribute}", owner, attribute


def _factor(name: str, lr_factors: Mapping[str, float], part_factors: Mapping[str, float]) -> float:
    """Return the factor of a parameter's learning rate; what belongs to no expert has none of an expert's."""
    words = name.split(".")
    factor = lr_factors.get(words[1], 1.0) if words[0] == "experts" else 1.0
    return factor * part_factors.get(part_of(name), 1.0)


def _leaf(part: str, factor: float, found: Sequence[tuple[str, nn.Module, str]], channels_last: bool) -> Leaf:
    places, elements, start = [], [], 0
    for name, module, attribute in found:
        value = module._parameters[attribute]
        assert value is not None
        aligned = -(-start // _ALIGNED) * _ALIGNED
        elements.append(value.detach().new_zeros(aligned - start))
        start, last = aligned + value.numel(), channels_last and value.ndim == 4
        places.append(Place(name, module, attribute, value.shape, aligned, start, last))
        elements.append(_flattened(value.detach(), last))
    return Leaf(part, factor, nn.Parameter(torch.cat(elements)), places)


def _flattened(value: Tensor, channels_last: bool) -> Tensor:
    return (value.permute(0, 2, 3, 1) if channels_last else value).reshape(-1)


def number_of(leaf: Leaf) -> int:
    """Return the number of elements of the parameters in a leaf."""
    return sum(place.stop - place.start for place in leaf.places)
