"""One worker's files of a checkpoint: it writes the parts it holds, and reads back the parts it needs.

Slot 0 writes the trunk, shared modules and the objective. Every slot writes its own experts. So any mesh can load a
checkpoint that another one saved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from aggregation.serving import load_model
from experts.ensemble import part_of
from orchestration.storage.checkpoint import FileEntry, read_tensors, write_tensors
from orchestration.training.stage_setup import StageSetup, TrainingSetup
from orchestration.training.teachers import check_teacher


def save(setup: StageSetup, folder: Path, beat: Callable[[], None]) -> list[FileEntry]:
    """Write this worker's files to a folder that exists. Every worker must take part.

    Args:
        setup: of the stage.
        folder: where to write.
        beat: called after every file.

    Returns:
        The files for the manifest; none on replicas after the first, whose weights are the same.
    """
    # Two exchanges between replicas, so before those after the first return.
    if not setup.config.engine.sync_batchnorm:
        setup.mesh.broadcast_buffers(setup.model)
    momentum = setup.engine.momentum() if isinstance(setup, TrainingSetup) else {}
    if setup.mesh.replica:
        return []

    entries = []
    for file, prefix in _own_files(setup):
        weights = {k: v.cpu() for k, v in setup.model.state_dict().items() if k.startswith(prefix)}
        if weights:
            entries.append(write_tensors(folder, file, weights))
        moving = {k: v for k, v in momentum.items() if k.startswith(prefix)}
        if moving:
            entries.append(write_tensors(folder, f"{file}.momentum", moving))
        beat()
    if setup.mesh.slot == 0 and isinstance(setup, TrainingSetup) and (state := setup.objective.state_dict()):
        entries.append(write_tensors(folder, "objective", {k: v.cpu() for k, v in state.items()}))
    return entries


def _own_files(setup: StageSetup) -> list[tuple[str, str]]:
    """Return names of the files this worker writes, with the prefix of their parameters."""
    own = [(name, f"experts.{name}.") for name in setup.model.names]
    return [("trunk", "trunk."), ("shared", "shared."), *own] if setup.mesh.slot == 0 else own


def load(setup: StageSetup, folder: Path) -> None:
    """Load weights, momentum and the objective's state of a complete checkpoint."""
    momentum: dict[str, Tensor] = {}
    for name in _parts_held(setup):
        momentum |= read_tensors(folder, f"{name}.momentum")

    setup.model.load_state_dict(_read_weights(setup, folder))
    if isinstance(setup, TrainingSetup):
        setup.objective.load_state_dict(read_tensors(folder, "objective"))
        setup.engine.restore(momentum)  # last: it copies the weights just loaded


def start_from(setup: StageSetup, folder: Path) -> None:
    """Begin a stage with the weights of another stage's checkpoint, without its momentum."""
    _begin_with(setup, _read_weights(setup, folder), folder)


def start_from_model(setup: StageSetup, folder: Path) -> None:
    """Begin a stage with a model that another run exported.

    Raises:
        ValueError: it was made for other classes or of other parts.
    """
    model = load_model(folder)
    check_teacher("start_from", model, setup.dataset, folder)
    _begin_with(setup, dict(model.ensemble.state_dict()), folder)


def _begin_with(setup: StageSetup, weights: dict[str, Tensor], folder: Path) -> None:
    """Load the tensors that belong to this worker.

    Parts of `reinit` keep the weights that the stage built, and so do a router and calibration that `weights` lack.
    """
    own = setup.model.state_dict()
    taken = [name for name in own if part_of(name) not in setup.stage.reinit]
    missing = [name for name in taken if name not in weights and part_of(name) not in ("gates", "calibration")]
    odd = [name for name in taken if name in weights and own[name].shape != weights[name].shape]
    if missing or odd:
        problem = f"{missing[0]} is missing" if missing else f"{odd[0]} is {list(weights[odd[0]].shape)}"
        raise ValueError(
            f"stage {setup.stage_name} cannot begin with {folder}: {problem} (of {len(missing) + len(odd)} tensors "
            f"that do not fit); needed an ensemble with the same backbone, head, expert names and number of classes"
        )
    setup.model.load_state_dict(own | {name: weights[name] for name in taken if name in weights})
    if isinstance(setup, TrainingSetup):
        setup.engine.restore({})  # ZeRO keeps its own copy of the weights, which must follow


def _parts_held(setup: StageSetup) -> list[str]:
    return ["trunk", "shared", *setup.model.names]


def _read_weights(setup: StageSetup, folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name in _parts_held(setup):
        weights |= read_tensors(folder, name)
    return weights
