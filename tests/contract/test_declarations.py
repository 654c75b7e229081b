"""A method is one file and one recipe: orchestration knows pieces by what they declare, never by their names."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import aggregation
import experts
from experts import registry
from orchestration.config.words import available

registry.import_pieces(experts, aggregation)

ROOT = Path(__file__).parents[2]
KINDS = (
    "aggregator",
    "attention",
    "auxiliary",
    "calibration",
    "distillation",
    "flow",
    "head",
    "lr_schedule",
    "mixing",
    "model",
    "objective",
    "router",
    "sampler",
)
# Functions whose first argument is a kind of piece: one kind, "router", is a name of pieces too.
TAKES_A_KIND = {"PieceOf", "build", "cases_of", "choice", "piece", "registered_names", "_one_of"}


def names() -> set[str]:
    return set(available("method")).union(*(registry.registered_names(kind) for kind in KINDS))


def kinds_in(tree: ast.AST) -> set[int]:
    """Nodes of constants that say a kind."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
    return {id(call.args[0]) for call in calls if isinstance(call.func, ast.Name) and call.func.id in TAKES_A_KIND}


def test_orchestration_names_no_piece_and_no_recipe():
    """No string equals a name, and nothing is imported from a method's file."""
    found, known = [], names()
    assert {"ride", "cross_entropy", "router", "ride_h2t"} <= known
    for path in sorted((ROOT / "orchestration").rglob("*.py")):
        tree = ast.parse(path.read_text())
        kinds = kinds_in(tree)
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Constant) and node.value in known and id(node) not in kinds:
                found.append(f"{where}: {node.value!r}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experts.methods"):
                found.append(f"{where}: {node.module}")
    assert not found, "declare it in the piece's base class and read the declaration"


METHOD = '''"""Toy: cross-entropy that counts hard images more, with a head and a flow of its own.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from experts.batches import Batch
from experts.flow import Flow, FlowSettings, Network, through_shared_head
from experts.heads.head import Head
from experts.objective import Objective, ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import Settings, register


@register("objective", "toy")
class Toy(Objective):
    """Sum over experts of the mean of (1 - p_y) CE, without a gradient through the factor."""

    class Config(ObjectiveSettings):
        name: Literal["toy"] = "toy"
        power: float = 1.0

        @property
        def switches(self) -> dict[str, int]:
            return {"power": 0}

    num_experts_allowed: ClassVar[tuple[int, ...]] = (2,)
    roles: ClassVar[str] = "a toy and another"
    flow: ClassVar[str | None] = "toy"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"power": 2.0},)

    @property
    def detached(self) -> str:
        return "the factor (1 - p_y)^power"

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        self.check_shapes(logits_EBC, labels_B)
        log_p_EBC = at_least_float32(logits_EBC).log_softmax(dim=-1)
        log_p_EB = log_p_EBC.gather(-1, labels_B.expand(len(log_p_EBC), -1).unsqueeze(-1)).squeeze(-1)
        factor_EB = (1 - log_p_EB.detach().exp()) ** self.config.power
        loss_E = -(factor_EB * log_p_EB).sum(dim=-1) / now.denominators["images"].to(log_p_EB.dtype)
        return loss_E.sum(), {"toy": loss_E.detach()}


@register("head", "toy")
class ToyHead(Head):
    """Twice a linear layer without bias."""

    class Config(Settings):
        name: Literal["toy"] = "toy"
        scale: ClassVar[float] = 1.0

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes, bias=False)

    def forward(self, features_BD: Tensor) -> Tensor:
        return 2 * self.linear(features_BD)


@register("flow", "toy")
class ToyFlow(Flow):
    """Every expert scores every image and its mirror image, and counts both alike."""

    class Config(FlowSettings):
        name: Literal["toy"] = "toy"

    takes: ClassVar[type[Objective] | None] = Toy

    def __call__(
        self, network: Network, batch: Batch, progress: Progress, gather: Callable[[Tensor], Tensor]
    ) -> Tensor:
        h, mirrored = network.trunk(lambda trunk: (trunk(batch.images_B3HW), trunk(batch.images_B3HW.flip(-1))))
        scores = network.experts(lambda experts: torch.stack([e(h) + e(mirrored) for e in experts.values()]))
        return gather(through_shared_head(network, scores / 2))
'''
RECIPE = """# Toy: a method put in by a test.
# family: baseline
method:
  num_experts: 2
  head: {name: toy}
  aggregator: {name: mean_logits}
  stages:
    train:
      sampler: {name: class_balanced}
      objective: {name: toy}
      flow: {name: toy}
"""


@pytest.mark.slow
def test_a_method_of_one_file_and_one_recipe_passes_every_contract_check(tmp_path):
    """In a copy of the packages, with no other edit; protocols and paces give it every data set."""
    for folder in ("experts", "aggregation", "orchestration", "configs", "tests/contract"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", Path(__file__).name)
        )
    for file in ("pyproject.toml", *(f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py"))):
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "experts/methods/toy.py").write_text(METHOD)
    (tmp_path / "configs/method/toy.yaml").write_text(RECIPE)

    words = ["-q", "-k", "toy", "-p", "no:cacheprovider", "-n", "0", "-rA", "tests/contract"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = set(re.findall(r"^PASSED tests/contract/(test_\w+\.py)", done.stdout, re.MULTILINE))
    others = {
        "test_calibrations.py",
        "test_devices.py",
        "test_flows.py",
        "test_graphs.py",
        "test_heads.py",
        "test_models.py",
        "test_placements.py",
        "test_recipes.py",
        "test_steps.py",
    }
    assert passed == {"test_objectives.py"} | others
