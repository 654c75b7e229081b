"""Refuse a config that cannot work before anything heavy starts, each check once, and derive what its run needs.

A command calls `admit`, and hands on what it returns. Once the nodes are known, `Admission.on` fills in what depends
on them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestration.cluster.connection import resolve_resources
from orchestration.cluster.placement import shape_of
from orchestration.config.run_config import RunConfig
from orchestration.storage.exports import check_sources
from orchestration.storage.location import check_run_dir
from orchestration.training.mesh import MeshShape


@dataclass(frozen=True)
class Admission:
    """A run that may start.

    Attributes:
        config: of the run.
        shape: of its mesh.
        placement: how `cluster.experts_per_worker=auto` was decided, for run.json; empty where a number was given.
    """

    config: RunConfig
    shape: MeshShape
    placement: Mapping[str, Any] = field(default_factory=dict)

    def on(self, nodes: Mapping[str, Mapping[str, float]], threads: int | None = None) -> Admission:
        """Return the same with CPUs and threads filled in.

        Args:
            nodes: resources by node, as `node_resources`.
            threads: of a worker, if an earlier start of the run has fixed them; a number in the config goes first.

        Raises:
            ValueError: run.dir is relative, and there are several nodes.
        """
        check_run_dir(self.config, len(nodes))  # again, now that the number of nodes is known
        cluster, engine = self.config.cluster, self.config.engine
        engine = engine.model_copy(update={"threads": engine.threads or threads})
        cpus, resolved = resolve_resources(cluster, engine, self.shape.workers * self.config.side_by_side)
        config = self.config.model_copy(
            update={
                "cluster": cluster.model_copy(update={"cpus_per_worker": cpus}),
                "engine": engine.model_copy(update={"threads": resolved}),
            }
        )
        return replace(self, config=config)


def admit(config: RunConfig, promised: Collection[str] = ()) -> Admission:
    """Refuse a run that cannot work, before anything is started.

    Args:
        config: of the run.
        promised: siblings that are trained before it begins.

    Raises:
        ValueError: experts and workers do not fit; another run or a file that is named is missing or does not fit; or
            run.dir would vanish with a submitted job, or is a URL that cannot be used.
    """
    shape = shape_of(config.method.num_experts, config.cluster)
    check_sources(config, promised)
    check_run_dir(config)
    return Admission(config, shape)
