"""A stage whose weights lie in memory as a GPU likes them: other strides, the same numbers and files.

What the `engine` keys switch is tested in tests/unit/experts/test_precision.py.
"""

from __future__ import annotations

import pytest
import torch

from aggregation.metrics import Scores
from orchestration.config.compose import load_config
from orchestration.training import stage_setup, teachers
from orchestration.training.mesh import Mesh, MeshShape
from orchestration.training.trainer import StageTrainer
from tests.recipes import WORDS, digits, export

SMALL = [*WORDS, "backbone.depth=8", "engine.precision=float64"]


def trainer(method="ride", folders=None):
    config = load_config([f"method={method}", *SMALL])
    return StageTrainer(config, "train", digits(0), Mesh(MeshShape(3, 3)), folders)


@pytest.fixture
def side_by_side(monkeypatch):
    """Decide as for a GPU's tensor cores."""
    for module in (stage_setup, teachers):
        monkeypatch.setattr(module, "memory_format_for", lambda *_: torch.channels_last)


def kernels(model):
    return [weight for weight in model.parameters() if weight.ndim == 4 and weight.shape[2] > 1]


def test_steps_checkpoints_and_evaluations_do_not_notice(tmp_path, monkeypatch):
    plain = trainer()
    with monkeypatch.context() as patch:
        patch.setattr(stage_setup, "memory_format_for", lambda *_: torch.channels_last)
        other = trainer()
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels(other.setup.model))
    assert kernels(other.setup.model)
    assert other.train(3).losses == pytest.approx(plain.train(3).losses, rel=1e-9)

    states = {}
    for name, one in (("plain", plain), ("other", other)):
        (tmp_path / name).mkdir()
        one.save(str(tmp_path / name))
        states[name] = one.state()
    again = trainer()  # contiguous, from files of the other, and the other way round
    again.load(str(tmp_path / "other"), states["other"])
    other.load(str(tmp_path / "plain"), states["plain"])
    losses = [one.train(5).losses for one in (plain, other, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert losses[2] == pytest.approx(losses[0], rel=1e-8)
    counts = plain.setup.dataset.counts_C.tolist()
    top1 = [Scores.from_state(one.evaluate("test")[0]).result(counts, None)["members"] for one in (plain, other)]
    assert [m["top1"] for m in top1[0].values()] == [m["top1"] for m in top1[1].values()]


def test_a_teachers_kernels_lie_likewise(side_by_side, tmp_path):
    config = load_config(["method=ride_distill", *SMALL])
    folder = export(tmp_path / "teacher", config, "train", digits(0), names=[f"teacher{i}" for i in range(6)])
    held = trainer("ride_distill", {"teacher": folder}).training.teachers.held["teacher"]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels(held))
