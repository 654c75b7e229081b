"""A trained ensemble as a folder that anyone can serve: tensors, one JSON file, no pickle.

    export/best/model.safetensors    the weights, float32
    export/best/model.json           what to build round them, and what images they expect

`load_model(folder).predict(images)` takes raw pixels of any size and returns probabilities. It goes through the same
preprocessing, network and aggregator as evaluation did. MLflow serves it by `aggregation/pyfunc.py`.

Shapes: B images of H x W pixels, E experts, C classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import aggregation
import experts
from aggregation.aggregator import Aggregator, Outputs
from aggregation.answers import Answers
from aggregation.pictures import as_trained, pixels
from experts.augmentation.stack import prepare_eval
from experts.data.config import DatasetConfig, Evaluation
from experts.data.decode import frame
from experts.data.transfer import Constant, to_device
from experts.ensemble import Ensemble, EnsembleConfig, build_ensemble
from experts.precision import exact_float32, faster_memory_format
from experts.registry import Settings, build, import_pieces, piece

FORMAT = 2
TENSORS = "model.safetensors"
DESCRIPTION = "model.json"


class Preprocessing(Settings):
    """The part of a dataset's config that decides how its images reach the network."""

    name: str
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    eval: Evaluation

    def dataset_config(self) -> DatasetConfig:
        """Return it as a dataset's config; its source, which says who reads files, is not used here."""
        return DatasetConfig(
            name=self.name, source="image_folder", image_size=self.image_size, mean=self.mean, std=self.std,
            eval=self.eval,
        )  # fmt: skip


class Description(Settings):
    """The contents of model.json."""

    format: int
    """Version of this layout."""
    backbone: dict[str, Any]
    head: dict[str, Any]
    aggregator: dict[str, Any]
    expert_names: tuple[str, ...]
    """In the order of the logits."""
    reduce_dimension: bool
    shared_head: bool
    router: dict[str, Any] | None
    calibration: dict[str, Any] | None = None
    attention: dict[str, Any] | None = None
    """Models of earlier versions have neither."""
    gives_probabilities: bool = True
    """Whether a softmax of the scores is what was trained; else it only ranks the classes."""
    num_classes: int
    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    """Training images per class, which some aggregators and corrections need."""
    preprocessing: Preprocessing
    image_shape: tuple[int | None, int | None, int]
    """Height, width and channels of the raw images; null where any size will do."""
    tensors_sha256: str
    """Of model.safetensors."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data that an ensemble was trained on, as far as serving it needs to know.

    Attributes:
        dataset: config of the dataset, for the preprocessing.
        class_names: C names.
        counts: training images per class.
        image_shape: height, width, channels of the raw images; None if they differ.
    """

    dataset: DatasetConfig
    class_names: Sequence[str]
    counts: Sequence[int]
    image_shape: Sequence[int] | None


def export_model(
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    config: EnsembleConfig,
    aggregator: Settings,
    data: TrainingData,
    *,
    gives_probabilities: bool = True,
) -> None:
    """Write a trained ensemble; a folder that exists is replaced once the new one is complete.

    Args:
        folder: such as `runs/<name>/export/best`.
        state: `Ensemble.state_dict()` of the whole ensemble, on any device; floating tensors are kept as float32.
        config: what the ensemble was built from, all its experts.
        aggregator: config of the "aggregator" piece.
        data: what it was trained on.
        gives_probabilities: see `Description`.

    Raises:
        ValueError: the tensors do not fit the description.
    """
    folder = Path(folder)
    scratch = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        save_file(_stored_tensors(state), scratch / TENSORS)
        description = describe(config, aggregator, data, _sha256(scratch / TENSORS)).model_copy(
            update={"gives_probabilities": gives_probabilities}
        )
        (scratch / DESCRIPTION).write_text(json.dumps(description.model_dump(mode="json"), indent=1) + "\n")
        load_model(scratch)  # refuse what could not be served
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise

    # A folder cannot be renamed onto another one that has files, so the old one steps aside first.
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(scratch, folder)
    shutil.rmtree(old, ignore_errors=True)


def _stored_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in state.items():
        value = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        tensors[name] = value.clone(memory_format=torch.contiguous_format)  # shared memory cannot be saved
    return tensors


def describe(config: EnsembleConfig, aggregator: Settings, data: TrainingData, sha256: str = "") -> Description:
    """Return the contents of a model.json; for the arguments see `export_model`.

    Args:
        sha256: of the tensors' file, if there is one.
    """
    dataset, shape = data.dataset, data.image_shape
    return Description(
        format=FORMAT,
        backbone=config.backbone.model_dump(mode="json"),
        head=config.head.model_dump(mode="json"),
        aggregator=aggregator.model_dump(mode="json"),
        expert_names=tuple(config.expert_names),
        reduce_dimension=config.reduce_dimension,
        shared_head=config.shared_head,
        router=None if config.router is None else config.router.model_dump(mode="json"),
        calibration=None if config.calibration is None else config.calibration.model_dump(mode="json"),
        attention=None if config.attention is None else config.attention.model_dump(mode="json"),
        num_classes=len(data.class_names),
        class_names=tuple(data.class_names),
        counts=tuple(data.counts),
        preprocessing=Preprocessing(
            name=dataset.name, image_size=dataset.image_size, mean=dataset.mean, std=dataset.std, eval=dataset.eval
        ),
        image_shape=(None, None, 3) if shape is None else (shape[0], shape[1], shape[2]),
        tensors_sha256=sha256,
    )


def load_model(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> ServedModel:
    """Build the ensemble that a folder describes, in evaluation mode.

    Raises:
        ValueError: a file is missing or damaged, was written in another format, or a tensor is missing, unknown or of
            another shape; names the file.
    """
    folder = Path(folder)
    description = read_description(folder / DESCRIPTION)
    path = folder / TENSORS
    if not path.exists():
        raise ValueError(f"{path}: missing; export the model again, or copy the whole folder")
    if _sha256(path) != description.tensors_sha256:
        raise ValueError(
            f"{path}: damaged: its SHA-256 is not the one in {DESCRIPTION}; export the model again, or copy it again"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); export the model again") from None
    ensemble = blank_ensemble(description)
    _check_tensors(path, tensors, ensemble.state_dict())
    ensemble.load_state_dict(tensors)
    ensemble.to(device).to(memory_format=faster_memory_format(torch.device(device)))
    return ServedModel(ensemble.eval().requires_grad_(False), description)


def blank_ensemble(description: Description) -> Ensemble:
    """Build what a model.json describes, with random weights."""
    import_pieces(experts, aggregation)  # a program that only serves has imported none of them
    config = EnsembleConfig(
        _config("model", description.backbone),
        _config("head", description.head),
        num_classes=description.num_classes,
        expert_names=description.expert_names,
        reduce_dimension=description.reduce_dimension,
        shared_head=description.shared_head,
        router=None if description.router is None else _config("router", description.router),
        calibration=None if description.calibration is None else _config("calibration", description.calibration),
        attention=None if description.attention is None else _config("attention", description.attention),
        image_size=description.preprocessing.image_size,
    )
    return build_ensemble(config, seed=0)


class ServedModel:
    """A loaded ensemble.

    Attributes:
        description: what it was built from.
        class_names: C names, in the order of the probabilities.
    """

    def __init__(self, ensemble: Ensemble, description: Description) -> None:
        self.description = description
        self.class_names = description.class_names
        self.ensemble = ensemble
        self.aggregator: Aggregator = build(
            "aggregator",
            _config("aggregator", description.aggregator),
            torch.tensor(description.counts),
            description.expert_names,
        )
        numbers_EK = torch.stack([self.aggregator.describe(expert) for expert in ensemble.experts.values()])
        self._numbers_EK = Constant(numbers_EK.cpu())
        self._checked = False  # not now: a model may be loaded that is never asked
        self._dataset = description.preprocessing.dataset_config()
        self._device = next(ensemble.parameters()).device

    def predict(self, images: ArrayLike, *, batch_size: int = 256) -> NDArray[np.float32]:
        """Return the class probabilities of raw images.

        Args:
            images: pixels of any size, uint8 [B, H, W] grey or [B, H, W, 3] colour; a single image is a batch of one.
                See `pixels`. A model of grey images sees the luma of colours.
            batch_size: images computed at once; does not change the result beyond rounding.

        Returns:
            Probabilities of the ensemble, float32 [B, C]; a row sums to 1.

        Raises:
            ValueError: another type or shape of images, or as `outputs`.
        """
        images_BcHW = pixels(np.asarray(images), self.description.image_shape[2])
        rows = [torch.empty(0, self.description.num_classes + 1, device=self._device)]
        with torch.inference_mode(), exact_float32():
            for start in range(0, len(images_BcHW), batch_size):
                raw = to_device(images_BcHW[start : start + batch_size].copy(), self._device)
                rows.append(self._probabilities(self.outputs(prepare_eval(self._square(raw), self._dataset))))
            found = torch.cat(rows).cpu().numpy()  # all batches together, so that the host waits once
        if np.isnan(found[:, -1]).any():
            raise ValueError(self.aggregator.undecided)
        return np.ascontiguousarray(found[:, :-1])

    def frame(self, image_cHW: Tensor) -> Tensor:
        """Bring a picture to the square that the network sees, as evaluation does.

        Args:
            image_cHW: uint8, of any size, 1 or 3 channels.

        Returns:
            uint8 [c, S, S], with the channels of training.
        """
        square = self._square(image_cHW)
        return square.expand(self.description.image_shape[2], -1, -1).contiguous()

    def _square(self, images: Tensor) -> Tensor:
        images = as_trained(images, self.description.image_shape[2])
        return frame(images, self._dataset.image_size, self._dataset.eval.resize)

    def ask(self, frames_BcSS: Tensor) -> Answers:
        """Return what ensemble and experts say of pictures that `frame` has brought to the network's square.

        Raises:
            ValueError: as `outputs`, or the aggregator has no answer.
        """
        with torch.inference_mode(), exact_float32():
            outputs = self.outputs(prepare_eval(to_device(frames_BcSS, self._device), self._dataset))
            found, experts = self._probabilities(outputs), outputs.logits_EBC.softmax(dim=2).float()
        if found[:, -1].isnan().any():
            raise ValueError(self.aggregator.undecided)
        return Answers(found[:, :-1].cpu().numpy(), experts.cpu().numpy())

    def _probabilities(self, outputs: Outputs) -> Tensor:
        """Return float32 [B, C + 1]: probabilities, and a number that is NaN where the aggregator has no answer."""
        probabilities_BC = self.aggregator(outputs).softmax(dim=1).float()
        used_B = self.aggregator.experts_used(outputs)
        sound_B = probabilities_BC.new_zeros(len(probabilities_BC)) if used_B is None else used_B.float()
        return torch.cat([probabilities_BC, sound_B[:, None]], dim=1)

    def outputs(self, images_B3HW: Tensor) -> Outputs:
        """Return the experts' outputs for images that are normalised already. The caller decides about gradients.

        Raises:
            ValueError: the aggregator cannot be applied to these weights.
        """
        if not self._checked:
            self.aggregator.check(self._numbers_EK.values)
            self._checked = True
        logits_EBC, gates_EB = self.ensemble.outputs(images_B3HW)
        return Outputs(logits_EBC, self._numbers_EK.on(logits_EBC.device), gates_EB)


def read_description(path: Path) -> Description:
    """Read a model.json.

    Raises:
        ValueError: it is missing or damaged, or was written in another format. Names the file.
    """
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); is this the folder of an export?") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not valid JSON ({error}); export the model again") from None
    found = fields.get("format") if isinstance(fields, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path}: format {found}, this version reads {FORMAT}; export the model again, or load it with the version "
            "that wrote it"
        )
    try:
        description = Description.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{path}: damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}; export the model again"
        ) from None
    if not len(description.class_names) == len(description.counts) == description.num_classes:
        raise ValueError(
            f"{path}: damaged: {len(description.class_names)} class_names and {len(description.counts)} counts for "
            f"num_classes = {description.num_classes}"
        )
    return description


def _config(kind: str, fields: Mapping[str, Any]) -> Any:
    return piece(kind, str(fields.get("name"))).Config.model_validate(dict(fields))


def _check_tensors(path: Path, found: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in needed if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in needed]
    problems += [
        f"{name} is {list(found[name].shape)}, needed {list(needed[name].shape)}"
        for name in needed
        if name in found and found[name].shape != needed[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{path}: the tensors do not fit the ensemble of {DESCRIPTION}: {'; '.join(problems[:3])}{more}; "
            "export the model again"
        )


def _sha256(path: Path) -> str:
    # orchestration/storage/files.py has the same two lines: a served model must work without orchestration.
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def preprocessing_problem(model: Preprocessing, run: DatasetConfig) -> str | None:
    """Return what makes the images of a run unfit for a model of another run; None if they fit."""
    for key in ("image_size", "mean", "std"):
        found, needed = getattr(model, key), getattr(run, key)
        if found != needed:
            return (
                f"sees images with {key} = {found}, this run has dataset.{key} = {needed}; needed the same, since "
                f"both see the same batch; set dataset.{key} to the same or name another run"
            )
    return None
