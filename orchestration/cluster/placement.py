"""Workers on nodes: where Ray's PACK strategy would put them, and a drawing of it. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orchestration.config.run_config import ClusterConfig
from orchestration.training.mesh import MeshShape

Resources = Mapping[str, float]
_BOXES_A_ROW = 4


@dataclass(frozen=True)
class Layout:
    """Which node each worker of a mesh is on.

    Attributes:
        nodes: names, in the order in which they are filled; only those that hold a worker.
        node_of: index into `nodes` by rank.
    """

    nodes: tuple[str, ...]
    node_of: tuple[int, ...]

    def on(self, node: str) -> list[int]:
        """Ranks on a node."""
        return [rank for rank, index in enumerate(self.node_of) if self.nodes[index] == node]


def bundle_of(cluster: ClusterConfig, cpus: float) -> dict[str, float]:
    """What Ray is asked for each worker.

    Args:
        cluster: of the config.
        cpus: of a worker, resolved.
    """
    gpus, memory = cluster.gpus_per_worker, cluster.memory_gib_per_worker
    return {"CPU": cpus} | ({"GPU": float(gpus)} if gpus else {}) | ({"memory": memory * 2**30} if memory else {})


def places(node: Resources, bundle: Resources) -> int:
    """Workers that a node has room for, each with what is in the bundle."""
    return min(math.floor(node.get(kind, 0.0) / share + 1e-6) for kind, share in bundle.items())


def packed(workers: int, bundle: Resources, nodes: Mapping[str, Resources]) -> Layout | None:
    """Lay workers out as Ray packs the bundles of a placement group: on as few nodes as it can.

    Ray takes the node that would have the largest share of its resources left, fills it, and goes on with the next.
    Where nodes are equal it may take another than we do.

    Args:
        workers: how many.
        bundle: resources of each, none of them 0.
        nodes: resources by node.

    Returns:
        None where the nodes have too few places.
    """

    def left(name: str) -> float:
        return sum((nodes[name][kind] - share) / nodes[name][kind] for kind, share in bundle.items())

    fitting = [name for name in nodes if places(nodes[name], bundle) > 0]
    order, node_of = list[str](), list[int]()
    for name in sorted(fitting, key=left, reverse=True):
        if len(node_of) == workers:
            break
        node_of += [len(order)] * min(places(nodes[name], bundle), workers - len(node_of))
        order.append(name)
    return Layout(tuple(order), tuple(node_of)) if len(node_of) == workers else None


def draw(
    layout: Layout, nodes: Mapping[str, Resources], shape: MeshShape, experts: Mapping[int, tuple[str, ...]], shown: int
) -> Iterator[str]:
    """Nodes with a box for each worker: its rank, experts and replica.

    Args:
        layout: of the workers.
        nodes: resources by node.
        shape: of the mesh.
        experts: names by rank.
        shown: the most workers that are drawn on a node.
    """
    for name in layout.nodes:
        ranks, have = layout.on(name), nodes[name]
        gpus = f", {have['GPU']:g} GPUs" if have.get("GPU") else ""
        yield f"{name}  ({have.get('CPU', 0):g} CPUs{gpus}; {len(ranks)} of {shape.workers} workers)"
        cells = []
        for rank in ranks[:shown]:
            _, replica = shape.position(rank)
            cells.append([f"worker {rank}", *experts[rank], f"replica {replica}"])
        for first in range(0, len(cells), _BOXES_A_ROW):
            yield from _boxes(cells[first : first + _BOXES_A_ROW])
        if len(ranks) > shown:
            yield f"  ... and {len(ranks) - shown} more"
    idle = [name for name in nodes if name not in layout.nodes]
    if idle:
        yield f"without a worker: {', '.join(idle[:8])}{f' and {len(idle) - 8} more' if len(idle) > 8 else ''}"


def _boxes(cells: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, cell)) for cell in cells]
    edge = "  +" + "+".join("-" * (width + 2) for width in widths) + "+"
    yield edge
    for row in zip(*cells, strict=True):
        yield "  |" + "|".join(f" {text:<{width}} " for text, width in zip(row, widths, strict=True)) + "|"
    yield edge


GIB = 2**30
_MAX_THREADS = 8  # on one worker by default; small images do not use more


def largest_share(workers: int, cpus_of_nodes: list[float]) -> float:
    """The most CPUs that each of some workers can have: whole ones, else hundredths of one; at most 8."""
    shares = [float(whole) for whole in range(_MAX_THREADS, 0, -1)] + [part / 100 for part in range(99, 0, -1)]
    for share in shares:
        if sum(math.floor(cpus / share + 1e-6) for cpus in cpus_of_nodes) >= workers:
            return share
    return shares[-1]  # more than a hundred workers a core: refused by `check_fits`


def check_fits(
    workers: int, cpus: float, gpus: float, nodes: dict[str, dict[str, float]], memory_gib: float | None = None
) -> None:
    """Refuse a placement that can never be met.

    Raises:
        ValueError: wanted and available, by node.
    """

    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {}) | ({"memory": memory_gib * GIB} if memory_gib else {})
    possible = sum(places(node, bundle) for node in nodes.values())
    if possible < workers:
        memory = "" if memory_gib is None else f", {memory_gib:g} GiB"
        have = ", ".join(
            f"{name}: {n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs"
            + (f", {n.get('memory', 0) / GIB:.1f} GiB" if memory else "")
            for name, n in nodes.items()
        )
        raise ValueError(
            f"cluster.workers = {workers}: wanted {workers} x ({cpus:g} CPUs, {gpus:g} GPUs{memory}), the cluster has "
            f"places for {possible} ({have or 'no node'}); lower cluster.workers or cluster.cpus_per_worker (fractions "
            f"are allowed), set cluster.gpus_per_worker=0, or add nodes"
        )
