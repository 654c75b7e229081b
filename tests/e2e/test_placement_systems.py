"""Where experts live changes nothing, for every system of experts: packed, spread, replicas and the plain engine agree.

Digits at 8 x 8, batches of 50 of 405 images: the last of an epoch has 5 (ACE's rare experts then have no image at
all), unless the recipe drops it. Later stages begin with new weights here: what they train is the same program. From
the first stage on, each system is trained in tests/contract/test_placements.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from experts.data.dataset import open_dataset
from orchestration.config.compose import load_config
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer
from tests.combinations import COMBINED
from tests.e2e.test_placement import train_on
from tests.recipes import saved_tensors

pytestmark = pytest.mark.ray

STEPS = 20
WEIGHTED = ["method.stages.train.class_weights.rule=power", "method.stages.train.class_weights.after_epoch=1"]
SYSTEMS = {
    "tade": ("train", []),
    "ace": ("train", []),
    "bbn": ("train", []),
    "reslt": ("train", []),
    "ride_h2t": ("h2t", []),
    "reslt_h2t": ("h2t", []),
    "ride_router": ("router", []),
    "dr_h2t": ("train", []),
    "gcl": ("train", ["method.num_experts=3"]),
    "esql": ("train", ["method.num_experts=3"]),
    "lade": ("train", ["method.num_experts=3"]),
    "seesaw": ("train", ["method.num_experts=3", *WEIGHTED]),
    "ride": (
        "train",
        [
            "method.stages.train.objective.name=sum",
            "method.stages.train.objective.terms.balanced.name=balanced_softmax",
            "method.stages.train.objective.terms.apart.name=expert_divergence",
            "method.stages.train.objective.weights.apart=-0.45",
            *WEIGHTED,
        ],
    ),
}
"""Stage and further words of each. dr_h2t's first stage has mixup, and one expert; gcl's has mixup and draws."""
SYSTEMS |= COMBINED
LONG = pytest.mark.drill
PLACEMENTS = [
    *(pytest.param(name, "spread", "1", id=f"{name}, spread") for name in ("ace", "bbn", "reslt", "ride_h2t")),
    pytest.param("dr_h2t", "replicas", "1", id="dr_h2t, 2 replicas", marks=LONG),
    pytest.param("gcl", "replicas", "1", id="gcl, 2 replicas", marks=LONG),
    pytest.param("ride", "spread", "1", id="ride of parts, spread", marks=LONG),
    pytest.param("RIDE + CMO", "spread", "1", id="RIDE + CMO, spread"),
    pytest.param("BSCE + CMO", "replicas", "1", id="BSCE + CMO, 2 replicas", marks=LONG),
    pytest.param("lade", "replicas", "1", id="lade, 2 replicas", marks=LONG),
    *(
        pytest.param(name, "spread", "1", id=f"{name}, spread", marks=LONG)
        for name in ("tade", "reslt_h2t", "ride_router", "gcl", "esql", "seesaw", "lade", *COMBINED)
        if name != "RIDE + CMO"
    ),
    *(
        pytest.param(name, "replicas", "1", id=f"{name}, 2 replicas", marks=LONG)
        for name in (
            *("tade", "ace", "bbn", "reslt", "ride_h2t", "reslt_h2t", "ride_router", "esql", "seesaw", "ride"),
            *("RIDE + CMO", "LADE + CutMix", "ACE + Remix"),
        )
    ),
    *(pytest.param(name, "packed", "1", id=f"{name}, packed", marks=LONG) for name in SYSTEMS),
    pytest.param("ace", "spread", "2", id="ace, spread, ZeRO 2", marks=LONG),
    *(
        pytest.param(name, "both", "2", id=f"{name}, spread x 2, ZeRO 2", marks=LONG)
        for name in SYSTEMS
        if name != "dr_h2t"
    ),
]


def words_of(name: str) -> list[str]:
    stage, more = SYSTEMS[name]
    return [
        *(more if name in COMBINED else [f"method={name}"]),
        "dataset.image_size=8",
        f"method.stages.{stage}.batch_size=50",
        "engine.threads=1",
        "engine.precision=float64",
        "cluster.cpus_per_worker=0.1",
        *([] if name in COMBINED else more),
    ]


def train_here(trainer, folder):
    """Train in this process; return what `train_on` does of workers."""
    losses, per_epoch = [], trainer.setup.steps_per_epoch
    while len(losses) < STEPS:
        losses += trainer.train(min(STEPS, (len(losses) // per_epoch + 1) * per_epoch)).losses
    trainer.save(str(folder))
    return np.array(losses), saved_tensors(folder)


@pytest.fixture(scope="module")
def controls(tmp_path_factory):
    """Train each system in one process with plain PyTorch when its losses and tensors are first asked for."""
    made: dict[str, tuple] = {}

    def control(name):
        if name not in made:
            stage, _ = SYSTEMS[name]
            config = load_config([*words_of(name), "engine.name=torch"])
            mesh = Mesh(mesh_shape(config.method.num_experts, 1))
            trainer = StageTrainer(config, stage, open_dataset(config.dataset), mesh)
            made[name] = train_here(trainer, tmp_path_factory.mktemp("control"))
        return made[name]

    return control


@pytest.mark.parametrize(("name", "placement", "zero"), PLACEMENTS)
def test_losses_weights_and_statistics_agree_in_float64(name, placement, zero, controls, warm, tmp_path):
    """1e-6 over 20 steps is asked; BatchNorm's running statistics are among the tensors, BBN's trunk's too."""
    stage, _ = SYSTEMS[name]
    num_experts = load_config(words_of(name)).method.num_experts
    workers = {"packed": 1, "spread": num_experts, "replicas": 2, "both": 2 * num_experts}[placement]
    where = [f"cluster.workers={workers}", f"engine.zero_stage={zero}"]
    if placement == "replicas":
        where.append(f"cluster.experts_per_worker={num_experts}")
    losses, tensors = train_on([*words_of(name), *where], tmp_path / "saved", stage, STEPS)
    expected, expected_tensors = controls(name)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-6)
    assert tensors.keys() == expected_tensors.keys()
    for key, values in expected_tensors.items():
        np.testing.assert_allclose(tensors[key], values, rtol=0, atol=1e-6, err_msg=key)
