"""The parameters of a module within a step, which are others than those that it has registered.

In a step, attributes of modules are views of the tensors that gradients are asked of. `named_parameters` does not know
them: whoever reads parameters there gets their values, and they get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters by name, with their gradients in a step."""
    return {name: getattr(owner, attribute) for name, owner, attribute in _places(module)}


@contextmanager
def with_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module compute with other tensors, by name, in the place of its parameters."""
    before = [(owner, attribute, vars(owner).get(attribute)) for _, owner, attribute in _places(module)]
    for name, owner, attribute in _places(module):
        vars(owner)[attribute] = values[name]
    try:
        yield
    finally:
        for owner, attribute, value in before:
            if value is None:
                del vars(owner)[attribute]
            else:
                vars(owner)[attribute] = value


def _places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, owner in module.named_modules():
        for attribute, _ in owner.named_parameters(recurse=False):
            yield f"{path}.{attribute}".lstrip("."), owner, attribute
