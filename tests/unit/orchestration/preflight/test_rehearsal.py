"""A rehearsal takes the step that trains: whatever the step exchanges or runs is in the plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.batches import share
from experts.ensemble import TRAINING_ONLY, part_of
from experts.flows.plain import Plain
from orchestration.config.compose import load_config
from orchestration.preflight.blanks import NoArithmetic
from orchestration.preflight.plan import plan
from orchestration.preflight.rehearsal import rehearse
from orchestration.training.exchange import Alone
from orchestration.training.mesh import MeshShape
from orchestration.training.step import TrainingStep
from tests.auxiliaries import FEW_WORDS, SHAPES, config_of, few, trainer_of
from tests.threads import run_mesh


def planned(*words):
    (stage,) = plan(load_config(["method=ride", "cluster.workers=6", *words])).stages
    return {x.what: (x.kind, x.among, x.payload) for x in stage.exchanges}


def test_a_new_exchange_of_a_flow_is_in_the_plan(monkeypatch):
    """A number for each of 32 images of a replica, 4 bytes each, to the workers of the other two slots."""
    usual = Plain.__call__

    def and_more(self, network, batch, progress, gather):
        outputs_EBX = usual(self, network, batch, progress, gather)
        gather(outputs_EBX[:1, :, :1].detach(), "something new")
        return outputs_EBX

    before = planned()
    monkeypatch.setattr(Plain, "__call__", and_more)
    assert planned() == before | {"something new": ("all-gather", 3, 4 * 32)}


def test_a_new_exchange_of_the_step_is_in_the_plan(monkeypatch):
    usual = TrainingStep._global_values

    def and_more(self, *found):
        self._setup.mesh.sum_over_data(torch.zeros(5), "five numbers")
        return usual(self, *found)

    before = planned()
    monkeypatch.setattr(TrainingStep, "_global_values", and_more)
    assert planned() == before | {"five numbers": ("all-reduce", 2, 20)}


def test_images_of_imagenets_size_exchange_what_small_ones_do():
    words = ["dataset=imagenet_lt", "dataset.root=/not/there"]
    assert planned(*words) == planned(*words, "dataset.image_size=32")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_convolution_without_arithmetic_has_shape_type_and_gradients_of_a_real_one(precision):
    conv = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    image = torch.rand(2, 4, 9, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        real = conv(image)
        with NoArithmetic():
            blank = conv(image)
    assert (blank.shape, blank.dtype) == (real.shape, real.dtype) == (torch.Size([2, 6, 5, 4]), precision)
    assert real.any() and not blank.any()
    blank.float().sum().backward()
    for tensor in (image, conv.weight, conv.bias):
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


def test_initial_weights_without_arithmetic_leave_the_generator_alone():
    before = torch.get_rng_state()
    with NoArithmetic():
        weights = torch.nn.Linear(5, 3).weight
    assert weights.min() == weights.max() > 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("place", ["spread", "two replicas"])
def test_a_plan_knows_the_exchanges_of_a_step(place):
    """By name, number and bytes."""
    config = config_of()
    shape = MeshShape(3, *SHAPES[place])
    (load, *_), _ = rehearse(config, "train", few().counts_C, shape, {})
    rows = share(7, 0, shape.replicas)[1]
    planned = {t.what: (t.times, t.fixed + t.per_image * rows) for t in load.traffic}

    def work(mesh, lock):
        with lock:
            trainer = trainer_of(config, mesh)
        setup = trainer.training
        batch = next(trainer._batches_of(setup, 1, 0))
        groups = [group._group for group in vars(mesh.groups).values() if not isinstance(group, Alone)]
        before = [len(group.made) for group in groups]
        trainer._step(batch, setup.progress(0))
        return [one for group, first in zip(groups, before, strict=True) for one in group.made[first:]]

    crossed = run_mesh(shape, work)[0]
    found = {what: (len(own), sum(own)) for what in planned if (own := [n for w, n in crossed if w == what])}
    assert found == planned
    assert {what for what, _ in crossed} == set(planned)


def test_a_plan_counts_what_auxiliaries_hold_and_compute():
    config = config_of()
    bare = load_config([*FEW_WORDS, "method.stages.train.views=[]"])
    ((load,), costs), ((plain,), _) = (
        rehearse(c, "train", few().counts_C, MeshShape(3, 3), {}) for c in (config, bare)
    )
    model = trainer_of(config).setup.model
    held = sum(t.nbytes for name, t in model.state_dict().items() if part_of(name) in TRAINING_ONLY)
    assert load.auxiliary_bytes >= held  # and constants, which no checkpoint holds
    assert load.auxiliary_bytes <= 1.01 * held
    assert load.parameters == plain.parameters
    assert sum(load.learning["experts"]) > sum(plain.learning["experts"])
    # Both views go through the network, and one through its copy, without a backward pass. Embeddings cost little.
    more = 0.03 * len(config.method.stages["train"].auxiliaries)
    network = costs.trunk + 3 * costs.features
    assert load.work_each_epoch == network
    assert plain.work_each_epoch == 0
    assert 3 * network < load.work < (3 + more) * network + 3 * costs.head
    assert 7 * network < load.training_work < (7 + 3 * more) * network + 9 * costs.head


def test_a_plan_is_of_a_mixed_step_where_any_is_mixed():
    """The loss runs twice, whatever the first step of the stage would be."""

    def calls(*words):
        config = load_config(["method=ce", "dataset=digits_lt", *words])
        (load,), _ = rehearse(config, "train", np.array([30] * 10), MeshShape(1, 1), {})
        return load.calls

    mixed = calls("mix=mixup")
    assert mixed > calls()
    assert calls("mix=cmo") == calls("mix=cutmix", "method.stages.train.mixing.probability=0.001") == mixed
