"""Both engines refuse a gradient that is not finite, have rates for parts, and take the steps of second stages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from experts.calibrations.calibration import put_on
from experts.calibrations.scales import Scales
from experts.data.dataset import open_dataset
from experts.ensemble import Ensemble, EnsembleConfig, Expert, build_ensemble, freeze
from experts.heads.linear import LinearHead
from experts.losses.label_smoothing import LabelAwareSmoothing
from experts.objective import StepContext
from experts.progress import Progress
from experts.registry import build
from orchestration.config.compose import load_config
from orchestration.config.recipe import OptimizerConfig
from orchestration.training.engine import NonFiniteGradient, TorchEngine
from orchestration.training.mesh import Mesh, MeshShape
from orchestration.training.trainer import StageTrainer
from orchestration.training.world import Rendezvous, leave_world

ENGINES = {"plain": ["engine.name=torch"], "ZeRO 1": ["engine.zero_stage=1"], "ZeRO 2": ["engine.zero_stage=2"]}


def scores(engine, images):
    """Return the logits of both experts, as the plain flow computes them."""
    h = engine.trunk(lambda trunk: trunk(images))
    return engine.experts(lambda experts: torch.stack([expert(h) for expert in experts.values()]))


@pytest.fixture
def world():
    """Join a world of one process; DeepSpeed needs one."""
    Rendezvous("127.0.0.1", 1, host_here=True).join(0, 1, gpu=False, timeout_s=60)
    assert dist.is_initialized()
    yield
    leave_world()


@pytest.fixture(params=ENGINES)
def engine_and_model(request, world):
    engine, model = make(ENGINES[request.param])
    yield engine, model
    engine.close()


def make(words, **factors):
    """Make an engine over a new ensemble of two experts; for `factors` see `TorchEngine`."""
    config = load_config(words)
    model = build_ensemble(
        EnsembleConfig(
            config.backbone,
            config.method.head,
            num_classes=4,
            expert_names=("expert0", "expert1"),
            reduce_dimension=True,
        ),
        seed=0,
    )
    if config.engine.precision == "float64":
        model.double()
    arguments = (model, Mesh(MeshShape(2, 2)), config.method.stages["train"].optimizer, config.engine)
    if config.engine.name == "torch":
        return TorchEngine(*arguments, **factors), model
    from orchestration.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(*arguments, **factors), model


def test_a_gradient_that_is_not_finite_is_refused(engine_and_model):
    """The loss is finite: 0 * sqrt(0) is 0, its derivative 0 * inf is not a number."""
    engine, model = engine_and_model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = scores(engine, torch.rand(2, 3, 16, 16))
    loss = logits.sum() * 0 + ((logits - logits.detach()) * 0).abs().sum().sqrt() * 0
    assert torch.isfinite(loss)
    with pytest.raises(NonFiniteGradient):
        engine.step(loss, 0.1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_bad_gradient_in_one_head_alone_is_refused(engine_and_model):
    engine, model = engine_and_model
    logits = scores(engine, torch.rand(2, 3, 16, 16))
    weight = model.experts["expert1"].head.weight
    with pytest.raises(NonFiniteGradient):
        engine.step(logits.sum() + ((weight - weight.detach()) * 0).abs().sum().sqrt() * 0, 0.1)


def test_one_worker_takes_plain_pytorch_whose_bits_are_those_of_deepspeed(world):
    """Two epochs of RIDE in float32, the partial last batch of each included."""
    found = {}
    for name in ("auto", "deepspeed"):
        config = load_config(["method=ride", "dataset=digits_lt", "dataset.image_size=8", f"engine.name={name}"])
        trainer = StageTrainer(config, "train", open_dataset(config.dataset), Mesh(MeshShape(3, 3)))
        assert isinstance(trainer.training.engine, TorchEngine) == (name == "auto")
        losses = [*trainer.train(7).losses, *trainer.train(14).losses]
        found[name] = losses, {key: tensor.clone() for key, tensor in trainer.setup.model.state_dict().items()}
        trainer.close()
    assert found["auto"][0] == found["deepspeed"][0]
    assert all(torch.equal(tensor, found["deepspeed"][1][key]) for key, tensor in found["auto"][1].items())
    assert load_config(["engine.name=auto"]).engine.chosen(3) == "deepspeed"


@pytest.mark.parametrize("words", [["engine.name=torch"], ["engine.name=deepspeed"]], ids=["plain", "DeepSpeed"])
def test_autocast_computes_convolutions_in_bfloat16(words, world):
    config = load_config([*words, "engine.precision=autocast"])
    model = build_ensemble(
        EnsembleConfig(
            config.backbone, config.method.head, num_classes=4, expert_names=("expert0",), reduce_dimension=True
        ),
        seed=0,
    )
    arguments = (model, Mesh(MeshShape(1, 1)), config.method.stages["train"].optimizer, config.engine)
    if config.engine.name == "torch":
        engine = TorchEngine(*arguments)
    else:
        from orchestration.training.deepspeed_engine import DeepSpeedEngine

        engine = DeepSpeedEngine(*arguments)
    seen = []
    for conv in (model.trunk.conv1, model.experts["expert0"].features.layer3[0].conv1):
        conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    scores(engine, torch.rand(2, 3, 16, 16))
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert model.trunk.conv1.weight.dtype == torch.float32
    engine.close()


def test_momentum_is_whole_and_comes_back(engine_and_model):
    engine, model = engine_and_model
    assert engine.momentum() == {}
    engine.step(scores(engine, torch.rand(2, 3, 16, 16)).square().mean(), 0.1)
    momentum = engine.momentum()
    assert {name: m.shape for name, m in momentum.items()} == {n: p.shape for n, p in model.named_parameters()}
    engine.restore({name: m + 1 for name, m in momentum.items()})
    back = engine.momentum()
    assert all(torch.equal(back[name], m + 1) for name, m in momentum.items())


FACTORS = {"lr_factors": {"expert1": 3.0}, "part_factors": {"trunk": 0.1, "features": 0.5, "heads": 2.0}}


def factor_of(name):
    part = {"trunk": 0.1, "features": 0.5, "head": 2.0}
    words = name.split(".")
    return part["trunk"] if words[0] == "trunk" else part[words[2]] * (3 if words[1] == "expert1" else 1)


def two_steps(words, first=None, **factors):
    """Return weights before, after one and after two steps, momentum after the first, and the groups by learning rate.

    Args:
        first: weights and momentum to load instead of taking the first step.
    """
    engine, model = make([*words, "engine.precision=float64"], **factors)
    try:
        seen = [{name: p.detach().clone() for name, p in model.named_parameters()}]
        for seed in (0, 1):
            if first is not None and seed == 0:
                model.load_state_dict(first[0])
                engine.restore(first[1])
                continue
            images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
            engine.step(scores(engine, images).square().mean(), 0.1)
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
            if seed == 0:
                after = {name: value.clone() for name, value in model.state_dict().items()}, engine.momentum()
        return seen, after if first is None else first
    finally:
        engine.close()


@pytest.mark.parametrize("words", ENGINES.values(), ids=ENGINES)
def test_parts_and_experts_learn_at_rates_of_their_own_and_go_on_so(words, world):
    """A first step is proportional to its rate, momentum to none; taken over, both give the same second step."""
    seen, (weights, momentum) = two_steps(words, **FACTORS)
    plain, (_, plain_momentum) = two_steps(words)
    for name, start in seen[0].items():
        assert torch.equal(start, plain[0][name])
        expected = start + factor_of(name) * (plain[1][name] - start)
        assert not torch.equal(plain[1][name], start)
        torch.testing.assert_close(seen[1][name], expected, rtol=0, atol=1e-12, msg=name)
        assert torch.equal(momentum[name], plain_momentum[name])
    again, _ = two_steps(words, (weights, momentum), **FACTORS)
    assert all(torch.equal(again[1][name], value) for name, value in seen[2].items())


def test_numbers_of_a_launcher_round_ray_choose_no_device(world, monkeypatch):
    """As under mpirun on a node of four GPUs; a worker sees its own alone."""
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    engine, _ = make(ENGINES["ZeRO 1"])
    assert {part.local_rank for part in engine._engines.values()} == {0}
    engine.close()


# Second stages on a head small enough for paper: two images with features X, three classes, labels 0 and 2.

X = torch.tensor([[1, 2, 0, -1], [0.5, -0.5, 1.5, 2]], dtype=torch.float64)
W = torch.tensor([[0.6, 0.8, 0, 0], [1, 0, 2, 2], [0, -0.5, 0.5, 0.1]], dtype=torch.float64)
B = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


def small_head(words, learns, calibration=None, **optimizer):
    """Make an engine over one expert whose features are its images, with the classifier above."""
    config = load_config([*words, "engine.precision=float64"])
    head = LinearHead(LinearHead.Config(), 4, 3).double()
    head.load_state_dict({"weight": W, "bias": B})
    if calibration is not None:
        put_on(head, build("calibration", calibration, 4, 3).double())
    model = Ensemble(torch.nn.Identity(), {"expert0": Expert(torch.nn.Identity(), head)})
    freeze(model, learns)
    factors = optimizer.pop("part_factors", {})
    arguments = (model, Mesh(MeshShape(1, 1)), OptimizerConfig(momentum=0.9, **optimizer), config.engine, {}, factors)
    if config.engine.name == "torch":
        return TorchEngine(*arguments), head
    from orchestration.training.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(*arguments), head


def steps_of(engine, lr, loss_of):
    """Take two steps; yield the loss before each."""
    try:
        for _ in range(2):
            loss = loss_of(scores(engine, X)[0])
            engine.step(loss, lr)
            yield loss.item()
    finally:
        engine.close()


def near(tensor, expected):
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=0, atol=1e-6)  # six digits are given


@pytest.mark.parametrize("words", ENGINES.values(), ids=ENGINES)
def test_two_steps_of_learnable_weight_scaling(words, world):
    """Numbers of the published classifier under torch's SGD: weight decay acts on the scales, one becomes negative."""
    engine, head = small_head(words, {"calibration"}, Scales.Config(), lr=0.2, weight_decay=5e-4)
    scales = [[1.013995, 0.275509, 1.128064], [1.047293, -0.802951, 1.330307]]
    for loss, expected, after in zip(
        steps_of(engine, 0.2, lambda z: cross_entropy(z, LABELS)), [3.058134, 0.607970], scales, strict=True
    ):
        assert loss == pytest.approx(expected, abs=1e-6)
        near(head.calibration.scale_C, after)
    assert torch.equal(head.weight, W)
    assert torch.equal(head.bias, B)


@pytest.mark.parametrize("words", ENGINES.values(), ids=ENGINES)
def test_two_steps_of_a_classifier_that_is_tuned_further(words, world):
    """As DR and MiSLAS tune it: the trained classifier goes on at a small rate."""
    engine, head = small_head(words, {"heads"}, lr=0.02, weight_decay=5e-4)
    biases = [[0.100605, -0.210251, 0.059647], [0.101750, -0.229727, 0.077978]]
    rows = [[0.994722, 0.004418, 1.985025, 1.980324], [0.984692, 0.012805, 1.956580, 1.942951]]
    losses = steps_of(engine, 0.02, lambda z: cross_entropy(z, LABELS))
    for loss, expected, bias, row in zip(losses, [3.058134, 2.980774], biases, rows, strict=True):
        assert loss == pytest.approx(expected, abs=1e-6)
        near(head.bias, bias)
        near(head.weight[1], row)


@pytest.mark.parametrize("words", ENGINES.values(), ids=ENGINES)
def test_two_steps_of_classifier_and_scales_at_rates_of_their_own(words, world):
    """MiSLAS: the classifier at a fifth of the scales' rate, labels smoothed by class: .4, .25, .1."""
    engine, head = small_head(
        words, {"heads", "calibration"}, Scales.Config(), lr=0.1, weight_decay=2e-4, part_factors={"heads": 0.2}
    )
    config = LabelAwareSmoothing.Config(head=0.4, tail=0.1)
    objective, now = LabelAwareSmoothing(config, torch.tensor([100, 40, 10]), 1), Progress(1, 10)

    def smoothed(logits_BC):
        return objective(logits_BC[None], LABELS, StepContext(objective.denominators(LABELS, now), now))[0]

    biases = [[0.098272, -0.208586, 0.060314], [0.095119, -0.221662, 0.080094]]
    scales = [[0.976361, 0.641951, 1.052895], [0.933624, -0.017819, 1.154333]]
    losses = steps_of(engine, 0.1, smoothed)
    for loss, expected, bias, scale in zip(losses, [3.434801, 2.079316], biases, scales, strict=True):
        assert loss == pytest.approx(expected, abs=1e-6)
        near(head.bias, bias)
        near(head.calibration.scale_C, scale)
