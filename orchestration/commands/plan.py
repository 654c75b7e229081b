"""`expertail plan`: show what a run would be and cost, without starting it.

If the config names a cluster, its nodes are shown. With `--probe`, a few real steps tell how long the run will take.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from orchestration.config.compose import Composed, compose
from orchestration.config.run_config import RunConfig
from orchestration.preflight.expected_data import forget
from orchestration.preflight.plan_text import describe


def plan_text(overrides: list[str]) -> str:
    """Plan a run, on the nodes of its cluster if it names one that answers.

    Args:
        overrides: as for training.

    Raises:
        ValueError: the config is not valid, or as `describe`.
    """
    forget()
    composed = compose(overrides)
    text = describe(composed.config, _nodes_of(composed.config))
    return _noted(composed, "\n\n".join([text, *_autocast(composed.config)]))


def probe_text(overrides: list[str], begun: float) -> str:
    """Plan a run and measure the time it will take on a few real steps.

    Args:
        overrides: as for training.
        begun: unix seconds at which the command began.

    Raises:
        ValueError, FloatingPointError, WorkerLost: as for training.
    """
    from orchestration.cluster.connection import cluster, node_resources
    from orchestration.cluster.placement import with_shape
    from orchestration.preflight.placements import Comparison, compare, measure_for
    from orchestration.preflight.placements_text import prediction_lines
    from orchestration.preflight.probe import probe, time_lines

    forget()
    composed = compose(overrides)
    config, placements = composed.config, None

    def measured() -> Comparison:
        return compare(config, nodes, measure_for(config, nodes))

    with cluster(config.cluster.address):  # one connection for the steps and for the nodes that are shown
        nodes = node_resources()
        probed = config
        if config.cluster.experts_per_worker == "auto":
            since = time.time()
            placements = measured()
            probed = with_shape(config, placements.choice.shape)
            begun += time.time() - since  # a start that is not the run's first measures nothing
        found = probe(probed, begun)
        placements = placements or measured()  # afterwards: what training refuses is refused first
        lines = [*time_lines(found), *prediction_lines(placements, found)]
        return _noted(composed, describe(found.config, nodes, lines, placements))


def _autocast(config: RunConfig) -> Iterator[str]:
    """Yield a section about autocast if the run computes on this machine's CPU, and that has a unit for bfloat16."""
    if config.cluster.named_address is None and not config.cluster.gpus_per_worker:
        from orchestration.preflight.autocast import autocast_line

        if (line := autocast_line()) is not None:
            yield f"autocast\n  {line}"


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
