"""The plan command: what a run would be, in words and tables, for whoever is about to launch it. Starts nothing.

With a cluster named, its nodes are looked at; with a probe (probe.py), a few steps say what the run will take.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchestration.config.compose import load_config
from orchestration.config.run_config import RunConfig
from orchestration.preflight.plan_text import (
    describe,
    names_cluster,
)


def plan_text(overrides: list[str]) -> str:
    """The plan of a run, on the nodes of its cluster if it names one that answers.

    Args:
        overrides: as for training.

    Raises:
        ValueError: as `describe`, and what a config does wrong.
    """
    config = load_config(overrides)
    return describe(config, _nodes_of(config))


def probe_text(overrides: list[str], begun: float) -> str:
    """The plan of a run with the time it will take, from a few real steps.

    Args:
        overrides: as for training.
        begun: unix seconds at which the command began.

    Raises:
        ValueError, FloatingPointError, WorkerLost: as for training.
    """
    from orchestration.cluster.connection import cluster, node_resources
    from orchestration.preflight.probe import probe, time_lines

    config = load_config(overrides)
    with cluster(config.cluster.address):
        found = probe(config, begun)
        return describe(found.config, node_resources(), time_lines(found))


def _nodes_of(config: RunConfig) -> Mapping[str, Mapping[str, float]] | str | None:
    """Resources by node of the cluster that a run would be on, or why they are not known; None without a cluster."""
    if not names_cluster(config):
        return None
    from orchestration.cluster.connection import cluster, node_resources

    try:
        with cluster(config.cluster.address):
            return node_resources()
    except ValueError as problem:
        return str(problem)
