"""Training images chosen by their similarity to a target domain."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from experts.cases import Case
from experts.registry import Settings, register
from experts.samplers.sampler import PartSampler

Similarity = Annotated[float, Field(allow_inf_nan=False)]


def read_similarity(path: str) -> tuple[list[float], str]:
    """Read a similarity file: UTF-8 text, one finite number per line, empty lines skipped.

    Returns:
        The numbers in the order of the lines, and the SHA-256 of the file.

    Raises:
        ValueError: the file cannot be read, or a line is not one finite number; names the line.
    """
    try:
        content = Path(path).read_bytes()
        lines = content.decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"similarity = {path}: cannot be read ({error}); needed a text file, on every node") from None
    numbers = []
    for line, text in enumerate(lines, start=1):
        if text.strip():
            try:
                numbers.append(float(text))
            except ValueError:
                numbers.append(math.nan)
            if not math.isfinite(numbers[-1]):
                raise ValueError(f"similarity = {path}: line {line} is {text.strip()[:40]!r}; needed one finite number")
    return numbers, hashlib.sha256(content).hexdigest()


@register("sampler", "most_similar")
class MostSimilar(PartSampler):
    """The images, or all images of the classes, that are most similar to a target; each once per epoch.

    Of equally similar ones, the first are kept. The model still has an output for every class.

    Source: Cui et al. 2018 (DSTL), arXiv:1806.06193, which chooses the classes to pre-train on by an earth mover's
    distance d between mean features: similarity exp(-0.01 d).
    Differs: the similarity is given. Theirs takes the classes nearest to each target class; a file can say the same
    with the largest similarity to any target class.
    """

    class Config(Settings):
        name: Literal["most_similar"] = "most_similar"
        similarity: str | tuple[Similarity, ...]
        """Numbers, larger for more similar, without a unit: a list, or the path of a text file with one number per
        line. In the order of the class ids, or of the training images (of `dataset.train_list`: of its lines)."""
        of: Literal["classes", "images"] = "classes"
        """Kind of thing that each number is for."""
        keep: Annotated[int, Field(ge=1)]
        """Number of classes, or images, that are kept."""
        sha256: str | None = None
        """SHA-256 of the file; filled in when the recipe is read, so that a run never goes on with another file."""

        @field_validator("similarity")
        @classmethod
        def _absolute(cls, similarity: Any) -> Any:
            # Workers and later commands run in other folders.
            return str(Path(similarity).expanduser().absolute()) if isinstance(similarity, str) else similarity

        @model_validator(mode="before")
        @classmethod
        def _with_sha256(cls, given: Any) -> Any:
            if isinstance(given, dict) and isinstance(given.get("similarity"), str) and not given.get("sha256"):
                return {**given, "sha256": read_similarity(str(Path(given["similarity"]).expanduser()))[1]}
            return given

    def __init__(self, config: Config, labels: np.ndarray, num_classes: int) -> None:
        super().__init__(labels, num_classes)
        needed = num_classes if config.of == "classes" else len(labels)
        numbers = self._numbers(config)
        shown = config.similarity if isinstance(config.similarity, str) else "a list"
        if len(numbers) != needed:
            raise ValueError(
                f"sampler 'most_similar': similarity = {shown} has {len(numbers)} numbers; needed {needed}, one for "
                f"each of the {'classes' if config.of == 'classes' else 'training images'}; set of to "
                f"{'images' if config.of == 'classes' else 'classes'} if they are of those"
            )
        if config.keep > needed:
            raise ValueError(f"sampler 'most_similar': keep = {config.keep}, found {needed} {config.of}; lower keep")
        best = np.argsort(-np.asarray(numbers), kind="stable")[: config.keep]
        self.subset = np.flatnonzero(np.isin(labels, best)) if config.of == "classes" else best
        self.kept_C = np.bincount(labels[self.subset], minlength=num_classes)

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try, with four classes of 60, 25, 10 and 5 images."""
        rising = tuple(k / 7 for k in range(100))
        return [
            Case(cls.Config(similarity=(0.1, 0.7, 0.2, 0.7), keep=3)),
            Case(cls.Config(similarity=rising, of="images", keep=90)),
        ]

    def chosen(self, source_key: int) -> np.ndarray:
        """See `PartSampler.chosen`."""
        del source_key
        return self.subset

    @staticmethod
    def _numbers(config: Any) -> list[float]:
        if not isinstance(config.similarity, str):
            return list(config.similarity)
        numbers, sha256 = read_similarity(config.similarity)
        if sha256 != config.sha256:
            raise ValueError(
                f"sampler 'most_similar': similarity = {config.similarity} is not the file that the run began with: "
                f"its SHA-256 is {sha256}, needed {config.sha256}; put that file back, or start a new run"
            )
        return numbers
