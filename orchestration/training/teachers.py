"""Frozen ensembles that a stage learns from, their experts sharded over the slots of the mesh.

Every worker holds some experts of each teacher on a copy of that teacher's trunk, scores its replica's images with
them, and gathers the scores; no teacher is held whole anywhere unless there is one slot.

Shapes: B images of one replica, C classes of a teacher, T experts of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from aggregation.aggregator import Aggregator, MeanLogits, Outputs
from aggregation.serving import ServedModel, load_model, preprocessing_problem
from experts.data.dataset import Dataset
from experts.ensemble import Ensemble
from orchestration.config.recipe import Teacher
from orchestration.config.run_config import EngineConfig
from orchestration.training.mesh import Mesh
from orchestration.training.precision import casting, memory_format_for


class Teachers:
    """This worker's share of a stage's teachers.

    Args:
        configs: by name.
        models: their exported models or the folders of these, by name. A folder's model is checked.
        dataset: of the run, whole; teachers must know its preprocessing and classes, or a group of them.
        mesh: this worker's place.
        dtype: of weights and scores.
        engine: how the network computes; teachers compute likewise.

    Attributes:
        held: this worker's experts of each teacher, by its name; missing where it has none of them.

    Raises:
        ValueError: a model is missing or damaged, or was made for other classes or images.
    """

    def __init__(
        self,
        configs: Mapping[str, Teacher],
        models: Mapping[str, str | ServedModel],
        dataset: Dataset,
        mesh: Mesh,
        dtype: torch.dtype,
        engine: EngineConfig,
    ) -> None:
        self._mesh, self._engine = mesh, engine
        self.held: dict[str, Ensemble] = {}
        self._rules: dict[str, tuple[Aggregator, Tensor, int, int]] = {}
        self._slots: dict[str, list[int]] = {}  # of each expert, by teacher
        slots, dealt = mesh.shape.slots, 0
        for name, config in configs.items():
            model = _load_checked(name, models[name], dataset)
            names = model.description.expert_names
            numbers_EK = torch.stack([model.aggregator.describe(e) for e in model.ensemble.experts.values()])

            rule = model.aggregator
            if model.ensemble.has_router:  # a router stops early to save work; a teacher uses all its experts
                rule = MeanLogits(MeanLogits.Config(), torch.tensor(model.description.counts), names)
            rule.check(numbers_EK)
            self._rules[name] = rule, numbers_EK.to(mesh.device), len(names), model.description.num_classes

            # Dealt out in turn over all teachers: three teachers of one expert each lie in three slots.
            self._slots[name] = [(dealt + i) % slots for i in range(len(names))]
            dealt += len(names)
            own = {
                n: model.ensemble.experts[n]
                for n, slot in zip(names, self._slots[name], strict=True)
                if slot == mesh.slot
            }

            if own:
                # Of modules after the experts only a shared head makes scores; a router is not held.
                shared = {key: m for key, m in model.ensemble.shared.items() if key == "head"}
                held = Ensemble(model.ensemble.trunk, own, shared)  # type: ignore[arg-type]
                held.to(mesh.device, dtype).to(memory_format=memory_format_for(engine, mesh.device))
                mesh.synchronise_batchnorm(held, f"of teacher {name}")
                self.held[name] = held.train(config.mode == "train").requires_grad_(False)
        self._dtype = dtype

    def __bool__(self) -> bool:
        return bool(self._rules)

    @torch.no_grad()
    def __call__(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        """Return the scores [B, C] of every teacher by name."""
        scores = {}
        for name, (rule, numbers_EK, num_experts, num_classes) in self._rules.items():
            # Every slot sends as many rows as the fullest one, since a gather needs equal shapes. Unused rows are zero.
            most = max(self._slots[name].count(slot) for slot in range(self._mesh.shape.slots))
            own = torch.zeros(most, len(images_B3HW), num_classes, device=images_B3HW.device, dtype=self._dtype)
            if name in self.held:
                with casting(self._engine, self._mesh.device):
                    found = self.held[name](images_B3HW)
                own[: len(found)] = found
            gathered = self._mesh.gather(own, f"scores of teacher {name}").unflatten(0, (self._mesh.shape.slots, most))

            # Back into the order of the experts: expert i is row j of its slot if j experts before it lie there.
            rows = []
            for expert in range(num_experts):
                slot = self._slots[name][expert]
                rows.append(gathered[slot, self._slots[name][:expert].count(slot)])
            scores[name] = rule(Outputs(torch.stack(rows), numbers_EK))
        return scores


def _load_checked(name: str, model: str | ServedModel, dataset: Dataset) -> ServedModel:
    if isinstance(model, ServedModel):
        return model
    loaded = load_model(model)
    check_teacher(f"teachers.{name}", loaded, dataset, model)
    return loaded


def check_teacher(key: str, model: ServedModel, dataset: Dataset, folder: str | Path) -> None:
    """Refuse a model that was trained for other classes or images.

    Args:
        key: of the config, that names it.

    Raises:
        ValueError: names the key, what the model was made for and what was needed.
    """
    found = model.description
    unknown = [c for c in found.class_names if c not in dataset.class_names]
    if unknown:
        raise ValueError(
            f"{key}: {folder} was trained for other classes: found {found.num_classes}, of which "
            f"{unknown[0]!r} is not in dataset {dataset.config.name}; needed the {dataset.num_classes} of the run or a "
            f"group of them; name a run on the same dataset"
        )
    if problem := preprocessing_problem(found.preprocessing, dataset.config):
        raise ValueError(f"{key}: {folder} {problem}")
