"""Weights pretrained on ImageNet: a PyTorch file becomes safetensors once, and runs start from those.

`import_weights` reads the state dict of a torchvision network, or of one converted from Caffe. It unpickles no objects
and drops the head. `load_pretrained` copies the early layers into an ensemble's trunk and the late stages into each
expert. Names are those of the whole network ("layer3.4.conv1.weight"), whatever backbone.split is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from experts.backbones.resnet_imagenet import BLOCKS, ResNetImageNet
from experts.ensemble import Ensemble, Expert
from experts.registry import Settings, build, registered_name
from orchestration.storage.files import file_sha256

FORMAT = "1"
MODEL = registered_name(ResNetImageNet)
_SHOWN = 5  # the most names of one kind in a message
_HEADS = ("fc.",)
_COUNTER = "num_batches_tracked"  # converted Caffe files lack it; BatchNorm reads it only if its momentum is None


@dataclass(frozen=True)
class Imported:
    """The network that was imported from a file.

    Attributes:
        depth: of the network, as backbone.depth.
        cardinality: of the network, as backbone.cardinality.
        num_parameters: number of parameters kept, without BatchNorm statistics.
        dropped: names of the head's tensors, which are left out.
        missing_counters: number of BatchNorm counters that the file lacks; they start at 0.
    """

    depth: int
    cardinality: int
    num_parameters: int
    dropped: tuple[str, ...]
    missing_counters: int

    def __str__(self) -> str:
        kind = "ResNet" if self.cardinality == 1 else "ResNeXt"
        text = f"{kind}-{self.depth}, {self.num_parameters:,} parameters"
        if self.dropped:
            text += f"; left out the head ({', '.join(self.dropped)})"
        if self.missing_counters:
            text += f"; {self.missing_counters} BatchNorm counters are not in the file and start at 0"
        return text


def import_weights(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Imported:
    """Turn a PyTorch file of a ResNet or ResNeXt into a safetensors file.

    Args:
        source: a file that `torch.save` wrote: a state dict, or a mapping that holds one. Names may begin with
            "module.".
        target: the .safetensors file to write. An existing file is replaced once the new one is complete.

    Raises:
        ValueError: the source is missing, holds more than tensors, is not a network of `resnet_imagenet`, or has names,
            shapes or values that do not fit; or the target does not end in .safetensors.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: needed a name that ends in .safetensors")

    tensors = _state_dict(source)
    dropped = tuple(name for name in tensors if name.startswith(_HEADS))
    tensors = {name: tensor for name, tensor in tensors.items() if name not in dropped}

    depth, cardinality = _architecture(source, tensors)
    wanted = _whole_network(depth, cardinality)
    _refuse(
        str(source),
        _misfits(tensors, wanted),
        f"by its blocks it is depth {depth}, cardinality {cardinality}; needed torchvision's names and shapes for that",
    )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    _refuse(str(source), [("values that are not finite", broken)], "download the file again")

    kept = {}
    for name, tensor in tensors.items():
        # A copy: safetensors refuses tensors that share memory, as slices of one saved storage do.
        kept[name] = tensor.to(wanted[name].dtype).clone(memory_format=torch.contiguous_format)
    metadata = {
        "format": FORMAT,
        "model": MODEL,
        "depth": str(depth),
        "cardinality": str(cardinality),
        "source": source.name,
        "source_sha256": file_sha256(source),
    }
    target.parent.mkdir(parents=True, exist_ok=True)

    # Renamed when complete, so that a run that starts meanwhile never reads half a file.
    scratch = target.with_name(f".{target.name}.new")
    try:
        save_file(kept, scratch, metadata)
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
    return Imported(
        depth=depth,
        cardinality=cardinality,
        num_parameters=sum(tensor.numel() for name, tensor in kept.items() if not _is_statistic(name)),
        dropped=dropped,
        missing_counters=sum(name.endswith(_COUNTER) for name in wanted.keys() - kept.keys()),
    )


def load_pretrained(ensemble: Ensemble, path: str | os.PathLike[str], *, experts: bool = True) -> list[str]:
    """Copy pretrained weights into an ensemble, in place.

    Heads, gates and layers that a whole network does not have (ResLT's branches, LFME's extra layer) stay as they are.
    So do BatchNorm counters that the file lacks.

    Args:
        ensemble: all experts or some of them, on any device, of any float type.
        path: a file that `import_weights` wrote.
        experts: whether the late stages are copied into each expert; if not, they keep their random weights.

    Returns:
        Names of the trunk's and of the experts' tensors that were not copied.

    Raises:
        ValueError: the file is missing or damaged, or a name or a shape does not fit. Nothing is copied then.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    parts = {"trunk": ensemble.trunk.state_dict()}
    for name, expert in ensemble.experts.items():
        parts[f"experts.{name}.features"] = expert.features.state_dict()  # type: ignore[union-attr]

    # A tensor that the file lacks is a misfit if the file has others of its layer ("layer3"); else the layer is one
    # that only this method has.
    known_words = {name.split(".")[0] for name in tensors}
    problems: list[tuple[str, list[str]]] = [
        ("not in the ensemble", [name for name in tensors if not any(name in part for part in parts.values())])
    ]

    # All is compared before anything is copied, so that a misfit leaves the ensemble as it was.
    left, copies = [], []
    for where, state in parts.items():
        missing, reshaped = [], []
        for name, value in state.items():
            full_name = f"{where}.{name}"
            if name not in tensors:
                left.append(full_name)
                if name.split(".")[0] in known_words and not name.endswith(_COUNTER):
                    missing.append(full_name)
            elif tensors[name].shape != value.shape:
                reshaped.append(f"{full_name} {_shapes(tensors[name], value)}")
            elif experts or where == "trunk":
                copies.append((value, tensors[name]))
            else:
                left.append(full_name)
        problems += [("not in the file", missing), ("of another shape", reshaped)]

    of = f"depth {metadata.get('depth', '?')}, cardinality {metadata.get('cardinality', '?')}"
    _refuse(
        str(path),
        problems,
        f"the file is of resnet_imagenet, {of}: set backbone to the same, and method.reduce_dimension = false",
    )
    with torch.no_grad():
        for value, tensor in copies:
            value.copy_(tensor)
    return left


def check_pretrained(path: str | os.PathLike[str], backbone: Settings, reduce_dimension: bool) -> None:
    """Refuse a file that `load_pretrained` would refuse for the ensembles of a run, without building one.

    Args:
        path: a file that `import_weights` wrote.
        backbone: config of the "model" piece.
        reduce_dimension: as the run's ensembles are built.

    Raises:
        ValueError: see `load_pretrained`.
    """
    model = build("model", backbone)
    with torch.device("meta"):  # shapes without memory; copies to it do nothing
        expert = Expert(model.late_stages(reduce_dimension=reduce_dimension), nn.Identity())
        ensemble = Ensemble(model.trunk(), {"expert": expert})
    load_pretrained(ensemble, path)


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch file by name, without the prefix that DataParallel gives all of them."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; needed the weights of a network, as torch.save writes them") from None
    except Exception as error:  # the errors of a damaged or foreign file have no common base
        # Torch's own text is left out: it explains how to unpickle the file after all.
        raise ValueError(
            f"{path}: not a PyTorch file of tensors alone ({type(error).__name__}); objects are never unpickled: where "
            f"you trust the file, save its state_dict() and import that"
        ) from None
    tensors = _find_tensors(found)
    if tensors is None:
        keys = ", ".join(map(str, list(found)[:_SHOWN])) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"{path}: found {keys or 'nothing'}; needed names with tensors, or one such mapping inside")
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _find_tensors(found: Any) -> dict[str, Tensor] | None:
    """Return a mapping of names to tensors: the object itself, its "state_dict", or the only such mapping inside."""
    if not isinstance(found, Mapping):
        return None
    if found and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
        return dict(found)
    inside = [found["state_dict"]] if "state_dict" in found else list(found.values())
    candidates = [tensors for tensors in map(_find_tensors, inside) if tensors is not None]
    return candidates[0] if len(candidates) == 1 else None


def _architecture(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the depth and the cardinality of the network that the tensors belong to.

    Raises:
        ValueError: no network of `resnet_imagenet` has this number of blocks per stage, or of groups.
    """
    blocks = []
    for stage in range(1, 5):
        matches = [re.match(rf"layer{stage}\.(\d+)\.", name) for name in tensors]
        blocks.append(1 + max((int(match[1]) for match in matches if match), default=-1))
    depths = [depth for depth, numbers in BLOCKS.items() if list(numbers) == blocks]
    grouped = tensors.get("layer1.0.conv2.weight", torch.empty(0))
    cardinality = grouped.shape[0] // grouped.shape[1] if grouped.ndim == 4 and grouped.shape[1] else 0
    if depths and (cardinality == 1 or (cardinality == 32 and depths[0] in (50, 101))):
        return depths[0], cardinality
    raise ValueError(
        f"{path}: found {'/'.join(map(str, blocks))} residual blocks in layer1 to layer4, in {cardinality} groups; "
        f"needed the weights of ResNet-10, 50, 101 or 152, or of ResNeXt-50 or 101 32x4d"
    )


def _whole_network(depth: int, cardinality: int) -> dict[str, Tensor]:
    """Return the tensors of a network without its head; they have names, shapes and types, but no memory."""
    config = ResNetImageNet.Config.model_validate({"depth": depth, "cardinality": cardinality, "split": "whole"})
    with torch.device("meta"):
        network: nn.Module = ResNetImageNet(config).late_stages(reduce_dimension=False)
    return network.state_dict()


def _misfits(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[tuple[str, list[str]]]:
    """Return the names that do not fit, by kind of misfit."""
    missing = [name for name in wanted if name not in tensors and not name.endswith(_COUNTER)]
    unknown = [name for name in tensors if name not in wanted]
    both = [name for name in tensors if name in wanted]
    reshaped = [
        f"{name} {_shapes(tensors[name], wanted[name])}" for name in both if tensors[name].shape != wanted[name].shape
    ]
    return [("missing", missing), ("unknown", unknown), ("of another shape", reshaped)]


def _shapes(found: Tensor, needed: Tensor) -> str:
    return f"(found {list(found.shape)}, needed {list(needed.shape)})"


def _refuse(path: str, problems: list[tuple[str, list[str]]], advice: str) -> None:
    """Raise one error that lists all problems, if there are any."""
    lines = list(_problem_lines(problems))
    if lines:
        raise ValueError(f"{path}: does not fit; {advice}\n" + "\n".join(f"  {line}" for line in lines))


def _problem_lines(problems: list[tuple[str, list[str]]]) -> Iterator[str]:
    for kind, names in problems:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{kind}: {', '.join(names[:_SHOWN])}{more}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a file that `import_weights` wrote."""
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; needed weights as `expertail import-weights FILE {path.name}` writes them"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); import the weights again") from None
    if metadata.get("model") != MODEL or metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: found model {metadata.get('model')!r}, format {metadata.get('format')!r}; needed "
            f"'{MODEL}', format '{FORMAT}': import the weights again"
        )
    return tensors, metadata


def _is_statistic(name: str) -> bool:
    return name.endswith((_COUNTER, "running_mean", "running_var"))
