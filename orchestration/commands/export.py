"""`expertail export`: a trained ensemble as one file for other programs, torch.export or ONNX.

    expertail export runs/ride-birds-s0 birds.onnx
    expertail export runs/ride-birds-s0 birds --onnx --torch        birds.onnx and birds.pt2

The file takes `images`, float32 [B, 3, S, S] for any B, framed and normalised as its metadata say, and answers with
`probabilities` [B, C], the ensemble's `logits` [B, C] and those of its `experts` [E, B, C]. It is checked against the
model it was made from before it is put in its place.

Shapes: B images of side S, E experts, C classes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aggregation.serving import ServedModel, load_model
from experts.augmentation.stack import prepare_eval
from experts.data.images import FileImages, ImageStore
from experts.precision import exact_float32
from orchestration.config.messages import in_one_line, say
from orchestration.config.paths import expand
from orchestration.config.secrets import redact
from orchestration.results.saved_run import open_run
from orchestration.results.text import bytes_
from orchestration.storage.files import CONFIG
from orchestration.tracking.models import model_folder

ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
OUTPUTS = ("probabilities", "logits", "experts")
METADATA = "expertail.json"
"""Name of the metadata inside a .pt2 file; an ONNX file has them as properties of the model."""
TOLERANCE = 1e-5  # of the largest score, at least of 1: kernels add in other orders
_IMAGES = 32  # of the test set, to check with
_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}


@dataclass(frozen=True)
class Options:
    """The model to export, and the forms.

    Attributes:
        which: "best" or "last", of a run's models.
        stage: the final stage whose model is exported; "" for the run's own result.
        forms: keys of ENDINGS; empty for the one that the name of the file says.
    """

    which: str = "best"
    stage: str = ""
    forms: tuple[str, ...] = ()


class Portable(nn.Module):
    """An ensemble with its rule, as one function of prepared images."""

    def __init__(self, model: ServedModel) -> None:
        super().__init__()
        self.ensemble = model.ensemble
        self._model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return probabilities [B, C], scores [B, C] of the ensemble, and scores [E, B, C] of its experts."""
        outputs = self._model.outputs(images)
        logits_BC = self._model.aggregator(outputs)
        return logits_BC.softmax(dim=1), logits_BC, outputs.logits_EBC


def export(source: str, out: str, options: Options) -> str:
    """Write a model as one file, or one of each form, and return a line about each.

    Args:
        source: as for `model_folder`.
        out: the file; without an ending of ENDINGS each form adds its own.
        options: the model, and the forms.

    Raises:
        ValueError: there is no such model, packages are missing, the model has no such form, or the file would answer
            otherwise than the model.
    """
    targets = _targets(out, options.forms)
    _refuse_missing(targets)
    with model_folder(source, options.which, options.stage) as folder:
        model = load_model(folder)
        about = _metadata(model, source)
        frames, origin = _frames(source, model, options)
    with torch.no_grad(), exact_float32():
        images = prepare_eval(frames, model.description.preprocessing.dataset_config())
        model.outputs(images[:1])  # the rule checks the experts now, outside of what is traced
        portable = Portable(model).eval()
        expected = [tensor.numpy() for tensor in portable(images)]
        lines = []
        for form, target in targets.items():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                file = Path(scratch) / target.name
                run = _WRITERS[form](portable, images, about, file)
                worst = _compare(target, run, images, expected)
                os.replace(file, target)
            size = bytes_(target.stat().st_size)
            lines.append(f"{target}: {size}; on {origin} its scores differ by at most {worst:.1e} from the model's")
    return "\n".join(lines)


def _targets(out: str, forms: tuple[str, ...]) -> dict[str, Path]:
    """Return the file of each form.

    Raises:
        ValueError: the name says no form and no form was asked for, it says another one, or its folder is missing.
    """
    path = expand(out)
    said = next((form for form, ending in ENDINGS.items() if path.suffix == ending), None)
    if said is None and not forms:
        raise ValueError(f"{out}: in which form? needed --onnx, --torch, or a name that ends in .onnx or .pt2")
    if said is not None and set(forms) - {said}:
        others = ", ".join(f"--{form}" for form in forms)
        raise ValueError(f"{out}: the name says {said}, found {others}; leave out the ending")
    if not path.parent.is_dir():
        raise ValueError(f"{out}: {path.parent} is no folder; needed one that exists")
    if not path.name:
        raise ValueError(f"{out or 'an empty word'}: needed the name of a file")
    chosen = [said] if said is not None else [form for form in ENDINGS if form in forms]
    found = {form: path if said else path.with_name(path.name + ENDINGS[form]) for form in chosen}
    for target in found.values():
        if target.is_dir():
            raise ValueError(f"{target}: is a folder; needed the name of a file")
    return found


def _refuse_missing(forms: Any) -> None:
    """Refuse a form whose packages are not installed."""
    missing = [name for form in forms for name in _NEEDED[form] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--onnx: {', '.join(missing)} not installed; needed: pip install {' '.join(_NEEDED['onnx'])} (the extra "
            f"`export` of this package); --torch needs nothing more"
        )


def _frames(source: str, model: ServedModel, options: Options) -> tuple[Tensor, str]:
    """Return images to check with, uint8 [B, c, S, S], and what they are: of the test set, or noise without it."""
    config = model.description.preprocessing
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            store = open_run(source, options.which, "test", [], options.stage).store
        frames = _first_of(store)
        return frames, f"{len(frames)} test images"
    except (ValueError, OSError) as problem:
        say(f"no test images to check with, noise in their place: {in_one_line(problem)}")
        draws = np.random.default_rng(0)
        shape = (_IMAGES, model.description.image_shape[2], config.image_size, config.image_size)
        return torch.from_numpy(draws.integers(0, 256, shape, dtype=np.uint8)), f"{_IMAGES} images of noise"


def _first_of(store: ImageStore) -> Tensor:
    """Return some images of a split, from its whole length."""
    places = np.unique(np.linspace(0, len(store) - 1, _IMAGES).round().astype(np.int64))
    return store.read(places) if isinstance(store, FileImages) else store.take(places)


def _metadata(model: ServedModel, source: str) -> dict[str, str]:
    """Return what goes with the weights, texts by key; all but `recipe` are JSON."""
    described, config = model.description, expand(source) / CONFIG
    preprocessing = described.preprocessing
    values = {
        "class_names": described.class_names,
        "expert_names": described.expert_names,
        "training_images_per_class": described.counts,
        "preprocessing": {
            "image_size": preprocessing.image_size,
            "short_side": preprocessing.eval.resize,
            "frame": "an image whose longer side is at most image_size: enlarged by the largest whole factor that "
            "fits, centred on black; others, and all where short_side is given: short side to short_side or "
            "image_size, centre crop",
            "input": "float32 [B, 3, image_size, image_size], RGB, (pixel / 255 - mean) / std",
            "mean": preprocessing.mean,
            "std": preprocessing.std,
        },
        "model": {key: value for key, value in described if isinstance(value, dict)},
        "weights_sha256": described.tensors_sha256,
    }
    found = {key: json.dumps(value) for key, value in values.items()}
    return found | ({"recipe": redact(config.read_text())} if config.is_file() else {})


Runner = Callable[[Tensor], list[NDArray[Any]]]
"""Takes images to OUTPUTS, as a program would that has the file alone."""


def _write_torch(portable: Portable, images: Tensor, about: dict[str, str], file: Path) -> Runner:
    program = _traced(portable, images, "torch.export")
    with _quiet():
        torch.export.save(program, file, extra_files={METADATA: json.dumps(about, indent=1)})
        loaded = torch.export.load(file).module()
    return lambda batch: [tensor.numpy() for tensor in loaded(batch)]


def _write_onnx(portable: Portable, images: Tensor, about: dict[str, str], file: Path) -> Runner:
    import onnxruntime

    program = _traced(portable, images, "ONNX")
    with _quiet(), _or_refused("ONNX"):
        program = program.run_decompositions(torch.export.default_decompositions() | _UNKNOWN_TO_ONNX)
        made = torch.onnx.export(program, (), input_names=["images"], output_names=list(OUTPUTS), verbose=False)
        assert made is not None
        made.model.metadata_props.update(about)
        made.save(file, external_data=False)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda batch: session.run(list(OUTPUTS), {"images": batch.numpy()})


def _distances(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Return the distances of rows from rows, as `torch.cdist` does."""
    del compute_mode
    return torch.linalg.vector_norm(a[..., :, None, :] - b[..., None, :, :], ord=p, dim=-1)


def _running_product(rows: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the products of the first rows, the first two, and so on, as `torch.cumprod` does; for few rows."""
    products: list[Tensor] = []
    for row in (rows if dtype is None else rows.to(dtype)).unbind(dim):
        products.append(products[-1] * row if products else row)
    return torch.stack(products, dim)


_UNKNOWN_TO_ONNX = {
    torch.ops.aten.cdist.default: _distances,
    torch.ops.aten._cdist_forward.default: _distances,
    torch.ops.aten.cumprod.default: _running_product,
}
"""Operations that the ONNX exporter does not know, in others that it does."""
_WRITERS: dict[str, Callable[[Portable, Tensor, dict[str, str], Path], Runner]] = {
    "torch": _write_torch,
    "onnx": _write_onnx,
}


def _traced(portable: Portable, images: Tensor, form: str) -> torch.export.ExportedProgram:
    """Trace an ensemble for any number of images."""
    batch = {0: torch.export.Dim("batch", min=1)}
    with _quiet(), _or_refused(form):
        return torch.export.export(portable, (images[:2],), dynamic_shapes={"images": batch}, strict=False)


@contextlib.contextmanager
def _or_refused(form: str) -> Iterator[None]:
    """Turn whatever an exporter raises into one message.

    Raises:
        ValueError: the model has no such form.
    """
    try:
        yield
    except Exception as problem:
        cause: BaseException = problem
        while cause.__cause__ is not None:  # exporters wrap what was wrong in pages about themselves
            cause = cause.__cause__
        raise ValueError(
            f"this model cannot be exported as {form}: {in_one_line(cause)}; serve it by MLflow (docs/serving.md)"
        ) from problem


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep exporters from talking: they report steps on standard output, and warn of what does not concern a user."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _compare(target: Path, run: Runner, images: Tensor, expected: list[NDArray[Any]]) -> float:
    """Return the largest difference of scores and probabilities, for all images together and for one alone.

    Raises:
        ValueError: it is larger than TOLERANCE.
    """
    worst = 0.0
    for count in (len(images), 1):
        found = dict(zip(OUTPUTS, run(images[:count]), strict=True))
        wanted = dict(zip(OUTPUTS, expected, strict=True))
        for name in OUTPUTS:
            right = wanted[name][..., :count, :]
            allowed = TOLERANCE * max(1.0, float(np.abs(right).max()))
            difference = float(np.abs(found[name] - right).max())
            if not difference <= allowed:
                raise ValueError(
                    f"{target}: not written: its {name} for {count} images differ by {difference:.2g} from the "
                    f"model's, needed at most {allowed:.2g}"
                )
            worst = max(worst, difference)
    return worst
