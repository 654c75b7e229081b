"""Where workers go: the places that nodes have, where Ray's PACK strategy puts workers, and a drawing of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestration.config.run_config import ClusterConfig, RunConfig
from orchestration.training.mesh import MeshShape, mesh_shape

GIB = 2**30
_MAX_CPUS = 8  # of one worker by default; small images do not use more
_BOXES_PER_ROW = 4

SHORT_WAIT_S, JOB_WAIT_S = 8.0, 24 * 3600.0
"""Seconds that cluster.placement_timeout_s=auto means: of a command that somebody watches, and of a submitted job."""
RESTART_FACTOR = 10  # how many times as long a restart waits: a node that boots, or a switch, takes a minute

Resources = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU, memory (bytes)."""


class NoRoom(ValueError):
    """The cluster has too few places for the workers. It may have more later: a node joins, another run ends."""


@dataclass(frozen=True)
class Placement:
    """The node of each worker of a mesh.

    Attributes:
        nodes: names, in the order in which they are filled; only those that hold a worker.
        node_of: index into `nodes` by rank.
    """

    nodes: tuple[str, ...]
    node_of: tuple[int, ...]

    def seated(self, replicas: int) -> Placement:
        """Return the same places with ranks as a fleet seats them, so many workers per slot; see `seats`."""
        order = seats([self.nodes[index] for index in self.node_of], replicas)
        return replace(self, node_of=tuple(self.node_of[bundle] for bundle in order))

    def on(self, node: str) -> list[int]:
        """Return the ranks on a node."""
        return [rank for rank, index in enumerate(self.node_of) if self.nodes[index] == node]


def shapes_of(num_experts: int, workers: int) -> list[MeshShape]:
    """Return every mesh that lays so many experts on exactly so many workers, the fewest experts per worker first.

    There is always one: all experts in every worker.
    """
    shapes = [MeshShape(num_experts, each) for each in range(1, num_experts + 1) if num_experts % each == 0]
    return [replace(shape, replicas=workers // shape.slots) for shape in shapes if workers % shape.slots == 0]


def shape_of(num_experts: int, cluster: ClusterConfig) -> MeshShape:
    """Return the mesh that a config asks for. While experts_per_worker is auto, the first that fits stands for it.

    Raises:
        ValueError: as `mesh_shape`.
    """
    if cluster.experts_per_worker == "auto":
        return shapes_of(num_experts, cluster.workers)[0]
    return mesh_shape(num_experts, cluster.workers, cluster.experts_per_worker)


def with_shape(config: RunConfig, shape: MeshShape) -> RunConfig:
    """Return the config of the same run on another mesh."""
    update = {"workers": shape.workers, "experts_per_worker": shape.experts_per_worker}
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=update)})


def bundle_of(cluster: ClusterConfig, cpus: float) -> dict[str, float]:
    """Return the resources that Ray is asked for per worker.

    Args:
        cluster: of the config.
        cpus: of a worker, resolved.
    """
    gpus, memory = cluster.gpus_per_worker, cluster.memory_gib_per_worker
    return {"CPU": cpus} | ({"GPU": float(gpus)} if gpus else {}) | ({"memory": memory * GIB} if memory else {})


def placement_wait_s(cluster: ClusterConfig, *, job: bool = False) -> float:
    """Return how many seconds to wait for places that others hold.

    Args:
        cluster: of the config.
        job: whether this is the beginning of a submitted job, which nobody watches. Later waits are short there too:
            a run that trains holds places, and two such runs could wait for each other.
    """
    if cluster.placement_timeout_s == "auto":
        return JOB_WAIT_S if job else SHORT_WAIT_S
    return cluster.placement_timeout_s


def restart_wait_s(cluster: ClusterConfig) -> float:
    """Return how many seconds a restart waits for a node or the network, and a move for places on other nodes."""
    return RESTART_FACTOR * placement_wait_s(cluster)


def places(node: Resources, bundle: Resources) -> int:
    """Count the workers that a node has room for."""
    # 1e-6, because 0.3 / 0.1 is less than 3 in floating point.
    return min(math.floor(node.get(kind, 0.0) / share + 1e-6) for kind, share in bundle.items())


def check_fits(workers: int, bundle: Resources, nodes: Mapping[str, Resources]) -> None:
    """Refuse a placement that these nodes could not hold even if nothing else ran.

    Args:
        workers: how many.
        bundle: resources of each.
        nodes: resources by node.

    Raises:
        NoRoom: says what was wanted and what each node has.
    """
    possible = sum(places(node, bundle) for node in nodes.values())
    if possible >= workers:
        return
    cpus, gpus, memory = bundle["CPU"], bundle.get("GPU", 0), bundle.get("memory")
    wanted = f"{cpus:g} CPUs, {gpus:g} GPUs" + ("" if memory is None else f", {memory / GIB:g} GiB")
    have = ", ".join(
        f"{name}: {n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs"
        + ("" if memory is None else f", {n.get('memory', 0) / GIB:.1f} GiB")
        for name, n in nodes.items()
    )
    raise NoRoom(
        f"cluster.workers = {workers}: wanted {workers} x ({wanted}), the cluster has places for {possible} "
        f"({have or 'no node'}); lower cluster.workers or cluster.cpus_per_worker (fractions are allowed), set "
        f"cluster.gpus_per_worker=0, or add nodes"
    )


def largest_share(workers: int, cpus_of_nodes: Iterable[float]) -> float:
    """Return the most CPUs that each worker can have: whole ones, at most 8, else hundredths of one."""
    nodes = list(cpus_of_nodes)
    shares = [float(whole) for whole in range(_MAX_CPUS, 0, -1)] + [part / 100 for part in range(99, 0, -1)]
    for share in shares:
        if sum(math.floor(cpus / share + 1e-6) for cpus in nodes) >= workers:
            return share
    return shares[-1]  # more than a hundred workers per core: refused by `check_fits`


def pack(workers: int, bundle: Resources, nodes: Mapping[str, Resources]) -> Placement | None:
    """Place workers as Ray packs the bundles of a placement group: on as few nodes as it can.

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
    return Placement(tuple(order), tuple(node_of)) if len(node_of) == workers else None


def seats(node_of_bundle: Sequence[str], replicas: int) -> list[int]:
    """Return the bundle for each rank, so that the replicas of a slot sit on one node as far as possible.

    Ranks of a slot follow each other, and its replicas exchange most: gradients of the experts, and statistics of
    BatchNorm. So every node takes as many whole slots as it has room for. The slots that are left are made of what is
    left on the nodes, node by node, so that neighbours in a ring are on one node.

    Args:
        node_of_bundle: node of each place that Ray reserved.
        replicas: workers per slot.
    """
    bundles: dict[str, list[int]] = {}
    for bundle, node in enumerate(node_of_bundle):
        bundles.setdefault(node, []).append(bundle)
    whole, left = list[int](), list[list[int]]()
    for own in sorted(bundles.values(), key=len, reverse=True):  # stable: of equal nodes the first that Ray filled
        fit = len(own) // replicas * replicas
        whole += own[:fit]
        left.append(own[fit:])
    return whole + [bundle for rest in sorted(left, key=len, reverse=True) for bundle in rest]


def draw(
    placement: Placement,
    nodes: Mapping[str, Resources],
    shape: MeshShape,
    experts: Mapping[int, tuple[str, ...]],
    shown: int,
) -> Iterator[str]:
    """Yield lines that show each node with a box per worker: its rank, experts and replica.

    Args:
        placement: of the workers.
        nodes: resources by node.
        shape: of the mesh.
        experts: names by rank.
        shown: the most workers that are drawn per node.
    """
    for name in placement.nodes:
        ranks, have = placement.on(name), nodes[name]
        gpus = f", {have['GPU']:g} GPUs" if have.get("GPU") else ""
        yield f"{name}  ({have.get('CPU', 0):g} CPUs{gpus}; {len(ranks)} of {shape.workers} workers)"
        cells = []
        for rank in ranks[:shown]:
            _, replica = shape.position(rank)
            cells.append([f"worker {rank}", *experts[rank], f"replica {replica}"])
        for first in range(0, len(cells), _BOXES_PER_ROW):
            yield from _boxes(cells[first : first + _BOXES_PER_ROW])
        if len(ranks) > shown:
            yield f"  ... and {len(ranks) - shown} more"
    idle = [name for name in nodes if name not in placement.nodes]
    if idle:
        yield f"without a worker: {', '.join(idle[:8])}{f' and {len(idle) - 8} more' if len(idle) > 8 else ''}"


def _boxes(cells: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, cell)) for cell in cells]
    edge = "  +" + "+".join("-" * (width + 2) for width in widths) + "+"
    yield edge
    for row in zip(*cells, strict=True):
        yield "  |" + "|".join(f" {text:<{width}} " for text, width in zip(row, widths, strict=True)) + "|"
    yield edge
