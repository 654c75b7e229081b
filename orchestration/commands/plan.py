"""`expertail plan`: show what a run would be and cost, without starting it.

If the config names a cluster, its nodes are shown. With `--probe`, a few real steps tell how long the run will take.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestration.config.compose import Composed, compose
from orchestration.config.run_config import RunConfig
from orchestration.preflight.plan_text import describe


def plan_text(overrides: list[str]) -> str:
    """Plan a run, on the nodes of its cluster if it names one that answers.

    Args:
        overrides: as for training.

    Raises:
        ValueError: the config is not valid, or as `describe`.
    """
    composed = compose(overrides)
    return _noted(composed, describe(composed.config, _nodes_of(composed.config)))


def probe_text(overrides: list[str], begun: float) -> str:
    """Plan a run and measure the time it will take on a few real steps.

    Args:
        overrides: as for training.
        begun: unix seconds at which the command began.

    Raises:
        ValueError, FloatingPointError, WorkerLost: as for training.
    """
    from orchestration.cluster.connection import cluster, node_resources
    from orchestration.preflight.probe import probe, time_lines

    composed = compose(overrides)
    with cluster(composed.config.cluster.address):  # one connection for the steps and for the nodes that are shown
        found = probe(composed.config, begun)
        return _noted(composed, describe(found.config, node_resources(), time_lines(found)))


def _noted(composed: Composed, text: str) -> str:
    """Put what the command line scaled at the head of a plan."""
    return "\n".join([*composed.notes, *([""] if composed.notes else []), text])


def _nodes_of(config: RunConfig) -> Mapping[str, Mapping[str, float]] | str | None:
    """Return the resources by node of a run's cluster, or a text that says why they are unknown; None without one."""
    if config.cluster.named_address is None:
        return None
    from orchestration.cluster.connection import cluster, node_resources

    try:
        with cluster(config.cluster.address):
            return node_resources()
    except ValueError as problem:
        return str(problem)
