"""The lines of `expertail plan` that compare placements: a table, a recommendation, a warning, what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from orchestration.cluster.placement import shape_of
from orchestration.preflight.placements import Candidate, Comparison
from orchestration.preflight.prediction import WORTH, fit_link
from orchestration.preflight.probe import Probe
from orchestration.results.text import bytes_, duration, number, plural, text_table
from orchestration.training.mesh import MeshShape

_NOISE = 1.2  # a gain beyond the number of workers by more than this is no gain: caches make a few percent


def placement_lines(found: Comparison) -> Iterator[str]:
    """Describe the placements of a run."""
    if found.auto:
        yield choice_line(found)
    yield from text_table([_heading(found), *(_row(found, c) for c in found.candidates)], left=(0,))
    yield "multiply-adds, calls of torch and exchanges are the busiest worker's, per step; at most: without exchanges"
    if len(found.candidates) == 1:
        yield "one placement only: there is nothing to choose; set cluster.workers to compare others"
        return
    if any(c.workers is None for c in found.candidates) and any(c.workers for c in found.candidates):
        yield "rows without a time have no room on the cluster"
    yield from _advice(found)
    yield from _origin(found)


def name_of(shape: MeshShape) -> str:
    """Return a placement in words."""
    if shape.workers == 1:
        return "packed"
    replicas = "" if shape.replicas == 1 else f", {shape.replicas} replicas"
    if shape.slots == 1:
        return f"{shape.replicas} replicas of the whole ensemble"
    return f"spread, {plural(shape.experts_per_worker, 'expert')} per worker{replicas}"


def _heading(found: Comparison) -> list[str]:
    heading = ["", "workers", "multiply-adds", "calls", "exchanges", "sent", "at most"]
    if _timed(found):
        stages = [stage.name for stage in found.packed.stages if stage.epochs]
        heading += [f"{name}: s per step" for name in stages]
        heading += ["per epoch"] if len(stages) == 1 else []
        heading += ["all steps", "gain", ""]
    return heading


def _timed(found: Comparison) -> bool:
    return any(c.prediction is not None and not c.assumed for c in found.candidates)


def _row(found: Comparison, candidate: Candidate) -> list[str]:
    stages = [stage for stage in candidate.stages if stage.epochs]
    packed, work, bound = found.packed.work, candidate.work, found.bound(candidate)
    share = "n/a" if not packed or work is None else f"{100 * work / packed:.1f} %"
    calls = sum(max(stage.slot_calls, default=0) for stage in stages)
    exchanges = sum(exchange.times for stage in stages for exchange in stage.exchanges)
    row = [
        name_of(candidate.shape), str(candidate.shape.workers), share, number(calls), number(exchanges),
        bytes_(candidate.sent), _times(bound),
    ]  # fmt: skip
    if not _timed(found):
        return row
    prediction = None if candidate.assumed else candidate.prediction
    if prediction is None:
        return [*row, *["n/a"] * (len(_heading(found)) - len(row) - 1), ""]
    row += [f"{seconds:.3g}" for seconds in prediction.step_s.values()]
    if len(stages) == 1:
        epoch_s = prediction.epoch_s[stages[0].name]
        row += ["n/a" if epoch_s is None else duration(epoch_s)]
    whole = None not in prediction.epoch_s.values()
    recommended = "recommended" if candidate is found.recommended else ""
    return [*row, duration(prediction.run_s) if whole else "n/a", _times(found.gain(candidate)), recommended]


def _times(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f} x"


def _advice(found: Comparison) -> Iterator[str]:
    """Say which placement to take, and where more workers are not worth it."""
    more = [c for c in found.candidates if c.shape.workers > 1]
    spread = [c for c in more if c.shape.slots > 1]
    if found.complete:
        if any((found.gain(c) or 0.0) > _NOISE * c.shape.workers for c in more):
            yield "NOTE: gains of more than there are workers: other load disturbed the measurement; measure again"
        best = max((c for c in more if c.prediction), key=lambda c: found.gain(c) or 0.0, default=None)
        gain = None if best is None else found.gain(best)
        if best is not None and gain is not None and gain < WORTH:
            yield f"NOTE: {name_of(best.shape)} gains {gain:.2f} x, less than {WORTH:g}; {_instead(best)}"
            return
        spread = [c for c in spread if c.prediction is not None]
    # Without times, the work that spreading leaves on a worker still bounds what it can gain. Replicas gain beside it.
    whole = [(found.gain(c) if found.complete else found.bound(c), c.shape.replicas) for c in spread]
    gains = [gain / replicas for gain, replicas in whole if gain is not None]
    if gains and max(gains) < WORTH:
        most = "" if found.complete else "at most "
        yield (
            f"NOTE: spreading the experts gains {most}{max(gains):.2f} x, less than {WORTH:g}, since every worker runs "
            f"the trunk again; use replicas (cluster.experts_per_worker={found.packed.shape.num_experts}), or one "
            f"worker per run and the others for more runs at once"
        )


def _instead(best: Candidate) -> str:
    others = best.shape.workers - 1
    return f"give each run one worker (cluster.workers=1), and use the other {others} for more runs at once"


def _origin(found: Comparison) -> Iterator[str]:
    """Say what the times are made of, or why there are none."""
    measured = found.measured
    if measured is None:
        yield "no times: nothing was measured; `expertail plan --probe ...` measures workers and links"
        return
    if measured.compute_s:
        threads = sorted({c.workers.threads for c in found.candidates if c.workers})
        many = plural(threads[0], "thread") if len(threads) == 1 else f"{threads[0]} to {threads[-1]} threads"
        yield f"measured: what a worker of each placement computes in a step, on blank images, {many}"
    for name, times_ in measured.links.items():
        link = fit_link(2, *times_)
        rate = f"{link.bytes_per_s / 1e9:.3g} GB/s"
        yield f"measured: an all-reduce of two workers {name}: {1e6 * link.latency_s:.3g} us per round, {rate}"
    yield from measured.problems
    crowded = max((c.workers.crowding for c in found.candidates if c.workers), default=1.0)
    if crowded > 1:
        yield f"threads outnumber the CPUs of a node up to {crowded:.2g} times, and steps take as many times as long"
    yield "times are of steps alone, without start, evaluations, checkpoints, reading of files and ZeRO's own work"


def choice_line(found: Comparison) -> str:
    """Say what `cluster.experts_per_worker=auto` stands for, and why."""
    choice = found.choice
    each, workers = choice.shape.experts_per_worker, plural(found.asked, "worker")
    fitting = [c for c in found.candidates if c.shape.workers == found.asked]
    if len(fitting) == 1:
        why = "the only number that fits"
    elif not found.one_statistic:
        why = "the fewest replicas, since engine.sync_batchnorm=false lets each have statistics of its own"
    elif choice.prediction is None:
        why = "the first that fits: what a step costs is known when the data is opened; set dataset.num_classes"
    elif choice.assumed:
        why = "by orders of magnitude, since nothing was measured"
    else:
        why = f"the fastest by measurement, {_times(found.gain(choice))} the packed run"
    return f"cluster.experts_per_worker=auto is {each} for {workers}: {why}"


def record(found: Comparison) -> dict[str, object]:
    """Return what run.json keeps of a choice."""
    choice = found.choice
    return {
        "experts_per_worker": choice.shape.experts_per_worker,
        "why": choice_line(found),
        "measured": found.complete,
        "predicted_step_s": {
            name_of(c.shape): dict(c.prediction.step_s) for c in found.candidates if c.prediction is not None
        },
    }


def prediction_lines(found: Comparison, probed: Probe) -> Iterator[str]:
    """Compare predicted steps with those that a probe took in one of the placements."""
    shape = shape_of(probed.config.method.num_experts, probed.config.cluster)
    prediction = next((c.prediction for c in found.candidates if c.shape == shape and not c.assumed), None)
    for stage in probed.stages:
        if prediction is not None:
            said, took = prediction.step_s[stage.name], stage.spread()[0]
            yield f"stage {stage.name}: {said:.3g} s per step were predicted, {said / took:.2f} times what was measured"
