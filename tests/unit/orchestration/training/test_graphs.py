"""Captured steps compute what steps of their own would, and what cannot be captured stays right."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from experts.batches import Batch
from experts.draws import Moment, StepDraws
from experts.progress import Progress
from orchestration.config.run_config import EngineConfig
from orchestration.training.exchange import Alone, Groups
from orchestration.training.graphs import EAGER_CALLS, MOST_KEYS, StepGraphs, graphs_for, rebuilt, tensors_in
from tests.echo import Crossing
from tests.emulated_device import DEVICE, EmulatedDevice, RefusedByDevice
from tests.emulated_graphs import EmulatedGraphs, emulated_graphs


@pytest.fixture
def seen():
    with EmulatedDevice() as seen:
        yield seen


def batch(step, images=4, **rest):
    values = np.random.default_rng(step).standard_normal((images, 3, 2, 2)).astype(np.float32)
    labels = torch.arange(images).to(DEVICE, non_blocking=True)
    pixels = torch.from_numpy(values).to(DEVICE, non_blocking=True)
    return Batch(pixels, labels, labels, first_row=step * images, **rest)


def now(step):
    return Progress(1, 1, step, 100)


class Steps:
    """Steps of `compute(batch, now)`, with and without graphs."""

    def __init__(self, compute, backend="emulated"):
        self.draws = StepDraws(lambda *words: sum(map(hash, words)) % 2**63, DEVICE)
        self.backend = EmulatedGraphs() if backend == "emulated" else backend
        self.reports = []
        self.graphs = StepGraphs(compute, self.draws, self.backend, self.reports.append)

    def __call__(self, step, key=(), images=4, **rest):
        self.draws.begin(Moment(1, step, step * images, images))
        found = self.graphs(batch(step, images, **rest), now(step), key)
        return [value.tolist() for value in tensors_in(found)]


def both(make, steps=5, **each):
    """Return results of some steps with graphs and without; `make` returns a new `compute`."""
    captured, eager = Steps(make()), Steps(make(), backend=None)
    return [captured(s, **each) for s in range(steps)], [eager(s, **each) for s in range(steps)], captured


def toy(steps=None):
    """Return a step of a small network; it moves BatchNorm's statistics, as a step does."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    network = network.to(DEVICE)

    def compute(batch, now):
        loss = network(batch.images_B3HW).square().mean()
        return {"loss": loss, "gradients": torch.autograd.grad(loss, list(network.parameters()))}

    return compute


def test_replays_give_the_numbers_of_steps_of_their_own(seen):
    captured, eager, steps = both(toy)
    assert captured == eager
    assert len(steps.backend.pieces) == 1
    assert steps.backend.replays == 5 - EAGER_CALLS


def test_nothing_is_done_by_a_capture(seen):
    """The step before it has moved BatchNorm's statistics once, and the capture does not move them again."""
    norm = nn.BatchNorm2d(3).to(DEVICE)
    steps = Steps(lambda batch, now: norm(batch.images_B3HW))
    for step in range(EAGER_CALLS):
        steps(step)
    assert steps.backend.pieces
    assert norm.num_batches_tracked.tolist() == EAGER_CALLS
    steps(EAGER_CALLS)
    assert norm.num_batches_tracked.tolist() == EAGER_CALLS + 1


def test_a_replay_is_one_launch_beside_the_batch(seen):
    steps = Steps(toy())
    for step in range(EAGER_CALLS):
        steps(step)
    seen.launches.clear()
    seen.waits.clear()
    steps.draws.begin(Moment(1, 9))
    given = batch(9)
    seen.launches.clear()
    steps.graphs(given, now(9))
    assert seen.launches == {"aten.copy_.default": 3, "graph": 1}
    assert not seen.waits


def test_a_number_that_python_computes_must_be_in_the_key(seen):
    """It is a constant of the graph: with it in the key results are right, without they are those of the capture."""

    def make():
        return lambda batch, now: batch.images_B3HW * (now.step // 6)

    captured, eager, _ = both(make, 12)
    assert captured[:6] == eager[:6]
    assert captured[6:] != eager[6:]
    steps, plain = Steps(make()), Steps(make(), backend=None)
    assert [steps(s, key=s // 6) for s in range(12)] == [plain(s) for s in range(12)]
    assert len(steps.backend.pieces) == 2


def test_draws_are_made_for_every_step(seen):
    def make():
        draws = StepDraws(lambda *_: 0)
        steps = []

        def compute(batch, now):
            drawn = steps[0].draws("noise", lambda moment: np.full(4, float(moment.step)))
            return drawn[:, None] + batch.images_B3HW.flatten(1)

        del draws
        return compute, steps

    found = []
    for backend in ("emulated", None):
        compute, own = make()
        own.append(Steps(compute, backend))
        found.append([own[0](s) for s in range(5)])
    assert found[0] == found[1]
    assert found[0][3] != found[0][4]


def test_a_draw_that_was_not_made_before_is_not_captured(seen):
    """Nothing could fill it again: it would be the capture's in every replay."""
    calls = []

    def compute(batch, now):
        calls.append(now)
        name = "late" if len(calls) > EAGER_CALLS else "early"
        return steps.draws(name, lambda moment: np.full(1, float(moment.step))) + batch.labels_B

    steps = Steps(compute)
    assert [steps(s)[0][0] for s in range(5)] == [0, 1, 2, 3, 4]
    assert "late is drawn in some steps only" in steps.reports[0]


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x * float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(x.shape).to(x.device, non_blocking=True),
        lambda x: x + torch.tensor(2.0, device=x.device),
    ],
    ids=["reads a number", "size from values", "copies from the host", "makes a constant"],
)
def test_what_cannot_be_captured_goes_on_one_kernel_at_a_time(bad, seen):
    captured, eager, steps = both(lambda: lambda batch, now: bad(batch.images_B3HW))
    assert captured == eager
    assert len(steps.reports) == 1
    assert "some steps run without CUDA graphs: RefusedByDevice: operation not permitted" in steps.reports[0]
    assert steps.backend.replays == 0


def test_a_failed_capture_leaves_everything_as_it_was(seen):
    def make():
        norm = nn.BatchNorm2d(3).to(DEVICE)

        def compute(batch, now):
            y = norm(batch.images_B3HW)
            return y, norm.running_mean + float(y.detach().sum())

        return compute

    captured, eager, _ = both(make)
    assert captured == eager


def test_numbers_of_the_host_are_out_of_reach_in_a_capture(seen):
    """They are those of one step."""

    @dataclass(frozen=True)
    class WithHost(Batch):
        host_labels: np.ndarray | None = None

    steps = Steps(lambda batch, now: batch.labels_B * int(batch.host_labels.sum()))
    for step in range(4):
        steps.draws.begin(Moment(1, step))
        given = batch(step)
        given = WithHost(given.images_B3HW, given.labels_B, given.labels_B, host_labels=np.full(1, step))
        assert steps.graphs(given, now(step)).tolist() == [0, step, 2 * step, 3 * step]
    assert "NoneType" in steps.reports[0]


def test_numbers_of_images_and_paired_batches_are_kinds_of_their_own(seen):
    def compute(batch, now):
        found = batch.images_B3HW.sum(0)
        return found if batch.partner is None else found + batch.partner.images_B3HW.mean(0)

    def results(backend):
        steps = Steps(compute, backend)
        found = [steps(s, images=2 + s % 2) for s in range(8)]
        return found + [steps(s, partner=batch(100 + s)) for s in range(4)], steps

    (captured, steps), (eager, _) = results("emulated"), results(None)
    assert captured == eager
    assert len(steps.backend.pieces) == 3


def test_few_kinds_are_kept(seen):
    steps = Steps(toy())
    for key in range(2 * MOST_KEYS):
        for step in range(4):
            steps(step, key=key)
    assert len(steps.graphs._replays) == MOST_KEYS


def test_weights_that_move_between_replays_are_seen(seen):
    weight = torch.zeros(3, device=DEVICE)
    steps = Steps(lambda batch, now: batch.images_B3HW.mean((0, 2, 3)) * 0 + weight)
    found = []
    for step in range(5):
        weight.add_(1.0)
        found.append(steps(step)[0][0])
    assert found == [1, 2, 3, 4, 5]


def test_weights_in_another_place_are_missed_until_it_is_told(seen):
    held = [torch.zeros(3, device=DEVICE)]
    steps = Steps(lambda batch, now: batch.images_B3HW.mean((0, 2, 3)) * 0 + held[0])
    for step in range(4):
        steps(step)
    held[0] = torch.ones(3, device=DEVICE)
    assert steps(5)[0] == [0, 0, 0]
    steps.graphs.forget()
    assert steps(6)[0] == [1, 1, 1]


# Cuts


class Summed(torch.autograd.Function):
    """Sum over workers, forward and backward, as synchronised BatchNorm does."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        ctx.save_for_backward(x)
        return sum(group.all_gather(x, "forward"))

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        total = gradient * x.sign()
        ctx.group.all_reduce(total, "backward")
        return total, None


def of_two_workers(backend):
    """Return what two workers compute, their exchanges and pieces, for a step that crosses in both directions."""

    def work(rank, half):
        group = Groups(half, Alone(), Alone()).with_cuts().data
        weight = torch.full((3,), 1.0 + rank, device=DEVICE)

        def compute(batch, now):
            own = weight.detach().requires_grad_()
            x = Summed.apply((batch.images_B3HW.mean((0, 2, 3)) * own).square(), group)
            loss = (Summed.apply(x * own, group) * (1 + rank)).sum()
            return loss, *torch.autograd.grad(loss, [own])

        steps = Steps(compute, backend)
        found = []
        for step in range(5):
            found.append(steps(2 * step + rank))
            weight.add_(0.5)
        return found, half.made, steps

    return Crossing().run(work)


def test_a_step_is_cut_where_workers_exchange(seen):
    """Two exchanges forward and two backward make five pieces; all numbers are as without graphs."""
    captured, eager = of_two_workers("emulated"), of_two_workers(None)
    for (found, made, steps), (expected, expected_made, _) in zip(captured, eager, strict=True):
        assert found == expected
        assert made == expected_made, "a capture exchanges nothing"
        assert len(steps.backend.pieces) == 5
        assert not steps.reports
    assert captured[0][0] != captured[1][0]


def test_a_worker_whose_capture_fails_still_fits_the_others(seen):
    def work(rank, half):
        group = Groups(half, Alone(), Alone()).with_cuts().data

        def compute(batch, now):
            x = sum(group.all_gather(batch.images_B3HW.mean((0, 2, 3)), "forward"))
            if rank:
                x.tolist()
            group.all_reduce(x, "again")
            return x

        steps = Steps(compute)
        return [steps(2 * step + rank) for step in range(5)], steps

    (first, captures), (second, does_not) = Crossing().run(work)
    assert first == second
    assert captures.backend.replays and not captures.reports
    assert not does_not.backend.replays and does_not.reports


# The parts


def test_trees_are_rebuilt():
    inner = Batch(torch.zeros(1), torch.ones(1), torch.ones(1))
    given = replace(inner, partner=inner, features=(torch.ones(2),), first_row=3)
    made = rebuilt({"a": [given, 1, "x", np.zeros(1)]}, lambda tensor: tensor + 1)
    found, *rest = made["a"]
    assert rest == [1, "x", None]
    assert found.first_row == 3
    assert found.features[0].tolist() == [2, 2]
    assert [t.tolist() for t in tensors_in(found.partner)] == [[1], [2], [2]]


class Piece:
    def __init__(self, capturable=True):
        self.capturable = capturable


@pytest.mark.parametrize(
    ("words", "device", "pieces", "has"),
    [
        ({}, "meta", [Piece(), Piece()], True),
        ({}, "cpu", [Piece()], False),
        ({"graphs": False}, "meta", [Piece()], False),
        ({}, "meta", [Piece(), Piece(capturable=False)], False),
    ],
)
def test_one_place_decides_who_has_graphs(words, device, pieces, has):
    with emulated_graphs() as made:
        assert (graphs_for(EngineConfig(**words), torch.device(device), *pieces) is not None) == has == bool(made)


class TestTheEmulation:
    """It shows what CUDA would do, and what it would not."""

    def capture(self, work):
        graphs = EmulatedGraphs()
        with graphs.apart(), graphs.capturing():
            found = work()
            return found, graphs.end()

    def test_results_have_no_numbers_before_the_first_replay(self, seen):
        x = torch.ones(2, device=DEVICE)
        found, replay = self.capture(lambda: x * 2)
        assert np.isnan(found.tolist()).all()
        replay()
        assert found.tolist() == [2, 2]

    def test_views_and_writes_in_place_reach_the_same_memory(self, seen):
        x = torch.zeros(4, device=DEVICE)

        def work():
            y = x.view(2, 2)[1]
            y += 1
            return (x * 3).view(2, 2).t()

        found, replay = self.capture(work)
        assert x.tolist() == [0, 0, 0, 0]
        replay()
        replay()
        assert x.tolist() == [0, 0, 2, 2]
        assert found.tolist() == [[0, 6], [0, 6]]

    def test_a_number_from_the_host_stays_that_of_the_capture(self, seen):
        x, factor = torch.ones(2, device=DEVICE), torch.tensor(2.0)
        found, replay = self.capture(lambda: x * factor)
        factor.fill_(5.0)
        replay()
        assert found.tolist() == [2, 2]

    def test_a_wait_is_refused_in_a_capture_alone(self, seen):
        x = torch.ones(2, device=DEVICE)
        with pytest.raises(RefusedByDevice, match="stream is capturing"):
            self.capture(lambda: x.sum().item())
        assert x.sum().item() == 2
