"""Networks for tests of flows: all experts together, or one expert per worker with the exchange replayed."""

from __future__ import annotations

from functools import partial

from experts.data.keyed_random import key
from experts.draws import Moment, StepDraws
from experts.ensemble import Ensemble
from experts.progress import Progress


class Unwatched:
    """The part of a `Network` that auxiliaries ask for, where there are none."""

    views = 1

    def made(self, h, batch, progress):
        return ()

    def show(self, features, scores):
        pass


class PlainNetwork(Unwatched):
    """A `Network` that runs an ensemble's modules and nothing else, in one step."""

    def __init__(self, net: Ensemble, progress: Progress) -> None:
        self.net = net
        self.names = net.names
        self.draws = StepDraws(partial(key, 0))
        self.draws.begin(Moment(progress.epoch, progress.step))

    def trunk(self, run):
        return run(self.net.trunk)

    def experts(self, run):
        return run(self.net.experts)

    def shared(self, run):
        return run(self.net.shared)


def run_together(flow, net, batch, progress):
    """Return the outputs [E, B, X] and every tensor that was gathered on the way."""
    gathered = []

    def gather(own, what="logits"):
        gathered.append(own.detach().clone())
        return own

    return flow(PlainNetwork(net, progress), batch, progress, gather), gathered


def run_apart(flow, net, batch, progress, gathered, slot):
    """Return the outputs of a worker that holds one expert; the others' come from `run_together`, detached."""
    name = net.names[slot]
    worker = Ensemble(net.trunk, {name: net.experts[name]}, dict(net.shared.items()))
    played = iter(gathered)

    def gather(own, what="logits"):
        whole = next(played).clone()
        assert own.shape == (1, *whole.shape[1:])
        whole[slot] = own[0]
        return whole

    outputs = flow(PlainNetwork(worker, progress), batch, progress, gather)
    assert next(played, None) is None, "a worker must gather as often as the others"
    return outputs
