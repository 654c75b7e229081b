"""One worker's files of a checkpoint: it writes the parts it holds, and reads back the parts it needs.

Slot 0 writes the trunk, shared modules and the objective. Every slot writes its own experts. So any mesh can load a
checkpoint that another one saved.

Saving is two acts. Training stops for the first, a copy in host memory that all workers take at the same step. The
second writes the files from that copy, while the next steps change the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from aggregation.serving import load_model
from experts.auxiliaries.attached import renew_copies
from experts.ensemble import TRAINING_ONLY, part_of
from experts.registry import piece
from orchestration.storage.checkpoint import FileEntry, entry_of, read_tensors, write_file
from orchestration.storage.tensor_file import TensorFile
from orchestration.training.stage_setup import StageSetup, TrainingSetup
from orchestration.training.teachers import check_teacher

TRUNK_COPY = "trunk.copy"  # a name that no expert may have
"""File of the copy of the trunk that auxiliaries have."""


class Snapshot:
    """A copy of one worker's part of a checkpoint in host memory, as files to be written.

    Training calls `take`; another thread may call `write` or `contents` while the next steps run, but not while the
    next copy is taken: the driver waits for the files first. The memory is kept from one copy to the next, because
    page-locked memory takes longer to get than to fill.
    """

    def __init__(self) -> None:
        self._files: dict[str, TensorFile] = {}
        self._names: list[str] = []  # of the files in the newest copy

    def take(self, setup: StageSetup) -> None:
        """Copy what a checkpoint holds. Every worker must take part; those after the first replica hold no file.

        The host waits for a GPU once, after it was asked for all copies.
        """
        # Two exchanges between replicas, so before those after the first return.
        if not setup.config.engine.sync_batchnorm:
            setup.mesh.broadcast_buffers(setup.model)
        momentum = setup.engine.momentum() if isinstance(setup, TrainingSetup) else {}
        if setup.mesh.replica:
            return

        on_gpu = setup.mesh.device.type == "cuda"
        tensors = _tensors_by_file(setup, momentum)
        for name, held in tensors.items():
            if name not in self._files or not self._files[name].fits(held):
                self._files[name] = TensorFile(held, pinned=on_gpu)
            self._files[name].fill(held)
        self._names = list(tensors)
        if on_gpu:
            torch.cuda.current_stream(setup.mesh.device).synchronize()

    def write(self, folder: Path, beat: Callable[[], None]) -> list[FileEntry]:
        """Write the files to a folder that exists, and return their entries for the manifest.

        Args:
            folder: where to write.
            beat: called after every file.
        """
        entries = []
        for name in self._names:
            entries.append(write_file(folder, name, self._files[name].data()))
            beat()
        return entries

    def contents(self) -> tuple[list[FileEntry], dict[str, bytes]]:
        """Return the files' entries for the manifest, and what is in them, for a folder on another node."""
        files = {name: bytes(self._files[name].data()) for name in self._names}
        return [entry_of(name, data) for name, data in files.items()], files


def save(setup: StageSetup, folder: Path, beat: Callable[[], None]) -> list[FileEntry]:
    """Write this worker's files to a folder that exists, at once. Every worker must take part. See `Snapshot`."""
    snapshot = Snapshot()
    snapshot.take(setup)
    return snapshot.write(folder, beat)


def _tensors_by_file(setup: StageSetup, momentum: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors that this worker writes, by file name and by name within the file. No file is empty."""
    weights = setup.model.state_dict()
    files = {}
    for file, prefix in _own_files(setup):
        files[file] = {k: v for k, v in weights.items() if k.startswith(prefix)}
        files[f"{file}.momentum"] = {k: v for k, v in momentum.items() if k.startswith(prefix)}
    if setup.mesh.slot == 0 and isinstance(setup, TrainingSetup):
        files["objective"] = dict(setup.objective.state_dict())
    return {f"{file}.safetensors": tensors for file, tensors in files.items() if tensors}


def _own_files(setup: StageSetup) -> list[tuple[str, str]]:
    """Return names of the files this worker writes, with the prefix of their parameters."""
    own = [(name, f"experts.{name}.") for name in setup.model.names]
    if setup.mesh.slot:
        return own
    return [("trunk", "trunk."), (TRUNK_COPY, "trunk_copy."), ("shared", "shared."), *own]


def load(setup: StageSetup, folder: Path) -> None:
    """Load weights, momentum and the objective's state of a complete checkpoint.

    Raises:
        ValueError: the stage has other tensors, as a memory of another size.
    """
    momentum: dict[str, Tensor] = {}
    for name in _parts_held(setup):
        momentum |= read_tensors(folder, f"{name}.momentum")

    weights = _read_weights(setup, folder)
    _check_fit(setup, weights, folder)
    setup.model.load_state_dict(weights)
    if isinstance(setup, TrainingSetup):
        setup.objective.load_state_dict(read_tensors(folder, "objective"))
        setup.engine.restore(momentum)  # last: it copies the weights just loaded


def _check_fit(setup: StageSetup, weights: dict[str, Tensor], folder: Path) -> None:
    """Raise ValueError, and name the first tensor, unless a checkpoint has those of the stage, of their sizes."""
    own = {name: list(value.shape) for name, value in setup.model.state_dict().items()}
    saved = {name: list(value.shape) for name, value in weights.items()}
    odd = [name for name in sorted(own.keys() | saved.keys()) if own.get(name) != saved.get(name)]
    if odd:
        raise ValueError(
            f"stage {setup.stage_name} cannot go on from {folder}: {odd[0]} is {saved.get(odd[0], 'missing')}, needed "
            f"{own.get(odd[0], 'no such tensor')} ({len(odd)} tensors do not fit); it is of another config "
            f"or version: set the sizes of memories and parts as they were, or begin anew under another run.name"
        )


def start_from(setup: StageSetup, folder: Path) -> None:
    """Begin a stage with the weights of another stage's checkpoint, without its momentum."""
    _begin_with(setup, _read_weights(setup, folder), folder)


def load_weights(setup: StageSetup, folder: Path) -> None:
    """Load the weights of a checkpoint of this very stage, all that scoring needs; no step may follow."""
    weights, own = _read_weights(setup, folder), setup.model.state_dict()
    taken = {name: weights[name] for name in own if part_of(name) not in TRAINING_ONLY}
    setup.model.load_state_dict({**own, **taken})


def start_from_model(setup: StageSetup, folder: Path) -> bool:
    """Begin a stage with a model that another run exported; return whether its heads came whole, memories included.

    Raises:
        ValueError: it was made for other classes or of other parts.
    """
    model = load_model(folder)
    check_teacher("start_from", model, setup.dataset, folder)
    weights = dict(model.ensemble.state_dict())
    _begin_with(setup, weights, folder)
    own = {name for name in setup.model.state_dict() if part_of(name) in ("heads", "memory")}
    return "heads" not in setup.stage.reinit and own <= weights.keys()


def _begin_with(setup: StageSetup, weights: dict[str, Tensor], folder: Path) -> None:
    """Load the tensors that belong to this worker.

    Parts of `reinit` and auxiliaries keep the weights that the stage built, and so do a router, a calibration and what
    a head adds to the one it continues, where `weights` lack them.
    """
    own = setup.model.state_dict()
    new = {*setup.stage.reinit, *TRAINING_ONLY}
    taken = [name for name in own if part_of(name) not in new]
    missing = [name for name in taken if name not in weights and not _may_begin_new(setup, name)]
    odd = [name for name in taken if name in weights and own[name].shape != weights[name].shape]
    if missing or odd:
        problem = f"{missing[0]} is missing" if missing else f"{odd[0]} is {list(weights[odd[0]].shape)}"
        raise ValueError(
            f"stage {setup.stage_name} cannot begin with {folder}: {problem} (of {len(missing) + len(odd)} tensors "
            f"that do not fit); needed an ensemble with the same backbone, head, expert names and number of classes"
        )
    setup.model.load_state_dict(own | {name: weights[name] for name in taken if name in weights})
    renew_copies(setup.model)
    if isinstance(setup, TrainingSetup):
        setup.engine.restore({})  # ZeRO keeps its own copy of the weights, which must follow


def _may_begin_new(setup: StageSetup, name: str) -> bool:
    if part_of(name) in ("heads", "memory"):
        adds = piece("head", setup.config.method.head_in(setup.stage_name).name).adds
        return name.split(".head.", 1)[-1].split(".", maxsplit=1)[0] in adds
    return part_of(name) in ("gates", "calibration")


def _parts_held(setup: StageSetup) -> list[str]:
    return ["trunk", *([TRUNK_COPY] if setup.model.trunk_copy is not None else []), "shared", *setup.model.names]


def _read_weights(setup: StageSetup, folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name in _parts_held(setup):
        weights |= read_tensors(folder, name)
    return weights
