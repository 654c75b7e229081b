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
from orchestration.training.engine import TorchEngine
from orchestration.training.leaves import Leaf, Leaves
from orchestration.training.mesh import Mesh, MeshShape
from orchestration.training.optimizer import HeldSGD
from orchestration.training.precision import casting
from orchestration.training.trainer import StageTrainer
from orchestration.training.world import Rendezvous, leave_world

ENGINES = {"plain": ["engine.name=torch"], "ZeRO 1": ["engine.zero_stage=1"], "ZeRO 2": ["engine.zero_stage=2"]}


class Learner:
    """An engine and what it trains."""

    def __init__(self, model, optimizer, config, lr_factors=None, part_factors=None):
        mesh = Mesh(MeshShape(len(model.experts), len(model.experts)))
        self.model, self.config, self.leaves = model, config, Leaves(model, lr_factors, part_factors)
        if config.name == "torch":
            self.engine = TorchEngine(self.leaves, mesh, optimizer, config)
        else:
            from orchestration.training.deepspeed_engine import DeepSpeedEngine

            self.engine = DeepSpeedEngine(self.leaves, mesh, optimizer, config)
        self.momentum, self.restore, self.close = self.engine.momentum, self.engine.restore, self.engine.close

    def step(self, images, loss_of, lr=0.1):
        """Move the weights by a loss of the logits; return the loss and the places of bad gradients."""
        with self.leaves.lent() as flats, casting(self.config, torch.device("cpu")):
            loss = loss_of(self.model(images))
        gradients = torch.autograd.grad(loss, flats, materialize_grads=True)
        return loss.item(), self.engine.step(list(gradients), loss.detach(), lr).tolist()


@pytest.fixture
def world():
    """Join a world of one process; DeepSpeed needs one."""
    Rendezvous("127.0.0.1", 1, host_here=True).join(0, 1, gpu=False, timeout_s=60)
    assert dist.is_initialized()
    yield
    leave_world()


@pytest.fixture(params=ENGINES)
def learner(request, world):
    learner = make(ENGINES[request.param])
    yield learner
    learner.close()


def make(words, **factors):
    """Make an engine over a new ensemble of two experts; for `factors` see `Leaves`."""
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
    return Learner(model, config.method.stages["train"].optimizer, config.engine, **factors)


def everything(learner):
    """Return copies of weights and momentum by name."""
    return copied(dict(learner.model.named_parameters())), copied(learner.momentum())


def copied(tensors):
    return {name: value.detach().clone() for name, value in tensors.items()}


def same(before, after):
    return all(
        torch.equal(tensor, new[name]) for old, new in zip(before, after, strict=True) for name, tensor in old.items()
    )


def a_good_step(learner):
    return learner.step(torch.rand(2, 3, 16, 16), lambda z: z.square().mean())


def bad_in(leaf_value):
    """Return a loss of 0 whose derivative by one value is not a number: 0 * sqrt(0) is 0, its derivative 0 * inf."""
    return ((leaf_value - leaf_value.detach()) * 0).abs().sum().sqrt() * 0


def test_gradients_keep_the_memory_that_a_captured_step_fills_again(learner):
    gradients = [torch.rand_like(leaf.flat) for leaf in learner.leaves]
    memory = [gradient.data_ptr() for gradient in gradients]
    for _ in range(2):
        learner.engine.step(gradients, torch.zeros(()), 0.1)
        assert [gradient.data_ptr() for gradient in gradients] == memory


@pytest.mark.parametrize("steps_before", [0, 1])
def test_neither_weights_nor_momentum_move_after_a_bad_gradient_in_one_head(steps_before, learner):
    """The loss is finite. The engine says where the gradient is not, and stays held back in good steps after it."""
    for _ in range(steps_before):
        assert a_good_step(learner)[1] == [-1, -1]
    before = everything(learner)

    def loss(logits_EBC):
        return logits_EBC.square().mean() + bad_in(learner.model.experts["expert1"].head.weight)

    value, places = learner.step(torch.rand(2, 3, 16, 16), loss)
    assert np.isfinite(value)
    assert not learner.engine.ok
    assert places[0] == -1
    assert learner.leaves.all[1].name_at(int(places[1])) == "experts.expert1.head.weight"
    a_good_step(learner)
    assert not learner.engine.ok
    assert same(before[:1], everything(learner)[:1])
    if steps_before:
        assert same(before, everything(learner))


def test_weights_do_not_move_by_a_loss_that_is_not_finite(learner):
    before = everything(learner)
    _, places = learner.step(torch.rand(2, 3, 16, 16), lambda z: z.square().mean() * 0 + torch.inf)
    assert places == [-1, -1]  # of a constant: the gradients are 0
    assert not learner.engine.ok
    assert same(before[:1], everything(learner)[:1])


def test_our_sgd_is_pytorchs_to_the_last_bit():
    """Three steps from the same weights and gradients, with every term of the update on or off."""
    for momentum, nesterov, decay in [(0.9, True, 5e-4), (0.9, False, 0.0), (0.0, False, 1e-3)]:
        draws = torch.Generator().manual_seed(0)
        ours = torch.nn.Parameter(torch.randn(1003, generator=draws))
        theirs = torch.nn.Parameter(ours.detach().clone())
        config = OptimizerConfig(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
        own = HeldSGD([Leaf("trunk", 1.0, ours, [])], config, torch.tensor(True))
        reference = torch.optim.SGD(
            [theirs], lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay, foreach=True
        )
        for lr in (0.1, 0.07, 0.3):
            theirs.grad = torch.randn(1003, generator=draws)
            ours.grad = theirs.grad.clone()
            own.set_lr(lr)
            reference.param_groups[0]["lr"] = lr
            own.step()
            reference.step()
            assert torch.equal(ours, theirs)
        if momentum:
            assert torch.equal(own.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


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
    learner = Learner(model, config.method.stages["train"].optimizer, config.engine)
    seen = []
    for conv in (model.trunk.conv1, model.experts["expert0"].features.layer3[0].conv1):
        conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    a_good_step(learner)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert model.trunk.conv1.weight.dtype == torch.float32
    learner.close()


def test_momentum_is_whole_and_comes_back(learner):
    assert learner.momentum() == {}
    a_good_step(learner)
    momentum = learner.momentum()
    assert {name: m.shape for name, m in momentum.items()} == {n: p.shape for n, p in learner.model.named_parameters()}
    learner.restore({name: m + 1 for name, m in momentum.items()})
    back = learner.momentum()
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
    learner = make([*words, "engine.precision=float64"], **factors)
    model = learner.model
    try:
        seen = [{name: p.detach().clone() for name, p in model.named_parameters()}]
        for seed in (0, 1):
            if first is not None and seed == 0:
                model.load_state_dict(first[0])
                learner.restore(first[1])
                continue
            images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
            learner.step(images, lambda z: z.square().mean())
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
            if seed == 0:
                after = copied(model.state_dict()), copied(learner.momentum())
        return seen, after if first is None else first
    finally:
        learner.close()


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
    learner = make(ENGINES["ZeRO 1"])
    assert {part.local_rank for part in learner.engine._engines.values()} == {0}
    learner.close()


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
    return Learner(model, OptimizerConfig(momentum=0.9, **optimizer), config.engine, {}, factors), head


def steps_of(learner, lr, loss_of):
    """Take two steps; yield the loss before each."""
    try:
        for _ in range(2):
            yield learner.step(X, lambda z: loss_of(z[0]), lr)[0]
    finally:
        learner.close()


def near(tensor, expected):
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=0, atol=1e-6)  # six digits are given


@pytest.mark.parametrize("words", ENGINES.values(), ids=ENGINES)
def test_two_steps_of_learnable_weight_scaling(words, world):
    """Numbers of the published classifier under torch's SGD: weight decay acts on the scales, one becomes negative."""
    learner, head = small_head(words, {"calibration"}, Scales.Config(), lr=0.2, weight_decay=5e-4)
    scales = [[1.013995, 0.275509, 1.128064], [1.047293, -0.802951, 1.330307]]
    for loss, expected, after in zip(
        steps_of(learner, 0.2, lambda z: cross_entropy(z, LABELS)), [3.058134, 0.607970], scales, strict=True
    ):
        assert loss == pytest.approx(expected, abs=1e-6)
        near(head.calibration.scale_C, after)
    assert torch.equal(head.weight, W)
    assert torch.equal(head.bias, B)


@pytest.mark.parametrize("words", ENGINES.values(), ids=ENGINES)
def test_two_steps_of_a_classifier_that_is_tuned_further(words, world):
    """As DR and MiSLAS tune it: the trained classifier goes on at a small rate."""
    learner, head = small_head(words, {"heads"}, lr=0.02, weight_decay=5e-4)
    biases = [[0.100605, -0.210251, 0.059647], [0.101750, -0.229727, 0.077978]]
    rows = [[0.994722, 0.004418, 1.985025, 1.980324], [0.984692, 0.012805, 1.956580, 1.942951]]
    losses = steps_of(learner, 0.02, lambda z: cross_entropy(z, LABELS))
    for loss, expected, bias, row in zip(losses, [3.058134, 2.980774], biases, rows, strict=True):
        assert loss == pytest.approx(expected, abs=1e-6)
        near(head.bias, bias)
        near(head.weight[1], row)


@pytest.mark.parametrize("words", ENGINES.values(), ids=ENGINES)
def test_two_steps_of_classifier_and_scales_at_rates_of_their_own(words, world):
    """MiSLAS: the classifier at a fifth of the scales' rate, labels smoothed by class: .4, .25, .1."""
    learner, head = small_head(
        words, {"heads", "calibration"}, Scales.Config(), lr=0.1, weight_decay=2e-4, part_factors={"heads": 0.2}
    )
    config = LabelAwareSmoothing.Config(head=0.4, tail=0.1)
    objective, now = LabelAwareSmoothing(config, torch.tensor([100, 40, 10]), 1), Progress(1, 10)

    def smoothed(logits_BC):
        return objective(logits_BC[None], LABELS, StepContext(objective.denominators(LABELS, now), now))[0]

    biases = [[0.098272, -0.208586, 0.060314], [0.095119, -0.221662, 0.080094]]
    scales = [[0.976361, 0.641951, 1.052895], [0.933624, -0.017819, 1.154333]]
    losses = steps_of(learner, 0.1, smoothed)
    for loss, expected, bias, scale in zip(losses, [3.434801, 2.079316], biases, scales, strict=True):
        assert loss == pytest.approx(expected, abs=1e-6)
        near(head.bias, bias)
        near(head.calibration.scale_C, scale)
