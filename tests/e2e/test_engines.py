"""Both engines refuse a gradient that is not finite, and neither moves a weight for it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from experts.ensemble import build_ensemble
from orchestration.compose import load_config
from orchestration.engine import NonFiniteGradient, TorchEngine
from orchestration.mesh import Mesh, MeshShape, Rendezvous, leave_world

ENGINES = {"plain": ["engine.name=torch"], "ZeRO 1": ["engine.zero_stage=1"], "ZeRO 2": ["engine.zero_stage=2"]}


@pytest.fixture
def world():
    """A world of one process; DeepSpeed wants one."""
    Rendezvous("127.0.0.1", 1, host_here=True).join(0, 1, gpu=False, timeout_s=60)
    assert dist.is_initialized()
    yield
    leave_world()


@pytest.fixture(params=ENGINES)
def engine_and_model(request, world):
    config = load_config(ENGINES[request.param])
    model = build_ensemble(
        config.backbone,
        config.method.head,
        num_classes=4,
        expert_names=("expert0", "expert1"),
        reduce_dimension=True,
        seed=0,
    )
    arguments = (model, Mesh(MeshShape(2, 2)), config.method.stages["train"].optimizer, config.engine)
    if config.engine.name == "torch":
        engine = TorchEngine(*arguments)
    else:
        from orchestration.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(*arguments)
    yield engine, model
    engine.close()


def test_a_gradient_that_is_not_finite_is_refused(engine_and_model):
    """The loss is finite: 0 * sqrt(0) is 0, its derivative 0 * inf is not a number."""
    engine, model = engine_and_model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = engine.forward(torch.rand(2, 3, 16, 16))
    loss = logits.sum() * 0 + ((logits - logits.detach()) * 0).abs().sum().sqrt() * 0
    assert torch.isfinite(loss)
    with pytest.raises(NonFiniteGradient):
        engine.step(loss, 0.1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_bad_gradient_in_one_head_alone_is_refused(engine_and_model):
    engine, model = engine_and_model
    logits = engine.forward(torch.rand(2, 3, 16, 16))
    weight = model.experts["expert1"].head.weight
    with pytest.raises(NonFiniteGradient):
        engine.step(logits.sum() + ((weight - weight.detach()) * 0).abs().sum().sqrt() * 0, 0.1)


@pytest.mark.parametrize("words", [["engine.name=torch"], ["engine.name=deepspeed"]], ids=["plain", "DeepSpeed"])
def test_autocast_computes_convolutions_in_bfloat16(words, world):
    config = load_config([*words, "engine.precision=autocast"])
    model = build_ensemble(
        config.backbone,
        config.method.head,
        num_classes=4,
        expert_names=("expert0",),
        reduce_dimension=True,
        seed=0,
    )
    arguments = (model, Mesh(MeshShape(1, 1)), config.method.stages["train"].optimizer, config.engine)
    if config.engine.name == "torch":
        engine = TorchEngine(*arguments)
    else:
        from orchestration.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(*arguments)
    seen = []
    for conv in (model.trunk.conv1, model.experts["expert0"].features.layer3[0].conv1):
        conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    engine.forward(torch.rand(2, 3, 16, 16))
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert model.trunk.conv1.weight.dtype == torch.float32
    engine.close()


def test_momentum_is_whole_and_comes_back(engine_and_model):
    engine, model = engine_and_model
    assert engine.momentum() == {}
    engine.step(engine.forward(torch.rand(2, 3, 16, 16)).square().mean(), 0.1)
    momentum = engine.momentum()
    assert {name: m.shape for name, m in momentum.items()} == {n: p.shape for n, p in model.named_parameters()}
    engine.restore({name: m + 1 for name, m in momentum.items()})
    back = engine.momentum()
    assert all(torch.equal(back[name], m + 1) for name, m in momentum.items())
