"""Everything that crosses between workers goes through one file, and a mesh on paper records it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import orchestration.training
from orchestration.training.exchange import NOBODY, Crossing, record_groups
from orchestration.training.mesh import Mesh, MeshShape

TRAINING = Path(orchestration.training.__file__).parent
HARMLESS = {
    "TCPStore", "init_process_group", "is_initialized", "destroy_process_group", "get_world_size", "get_rank",
    "get_process_group_ranks", "group",
}  # fmt: skip


def used_of_torch_distributed(path):
    """Names of torch.distributed that a file uses, under whatever alias it imports the module."""
    tree = ast.parse(path.read_text())
    aliases, names = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {(a.asname or a.name) for a in node.names if a.name.startswith("torch.distributed")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            aliases |= {(a.asname or a.name) for a in node.names if a.name == "distributed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases | {"torch.distributed"}:
            names.add(node.attr)
    return names


def test_nothing_else_in_training_calls_a_collective():
    files = sorted(TRAINING.glob("*.py"))
    used = {path.name: used_of_torch_distributed(path) for path in files}
    assert {"all_gather", "all_reduce", "broadcast", "new_group"} <= used.pop("exchange.py")
    assert used["world.py"]
    assert {name: found - HARMLESS for name, found in used.items() if found - HARMLESS} == {}


@pytest.mark.parametrize(("rank", "data", "experts"), [(0, 0, 0), (1, 1, 0), (4, 0, 2), (5, 1, 2)])
def test_a_worker_on_paper_is_where_the_mesh_has_it(rank, data, experts):
    """3 slots x 2 replicas: rank r has slot r // 2, replica r % 2."""
    groups = record_groups(3, 2, rank, [])
    assert [(g.size, g.rank) for g in (groups.data, groups.experts, groups.everyone)] == [
        (2, data), (3, experts), (6, rank),
    ]  # fmt: skip


def test_what_crosses_is_written_down_and_answered_with_blanks():
    record = []
    mesh = Mesh(MeshShape(3, 1, 2), 2, groups=record_groups(3, 2, 2, record))
    own = torch.ones(1, 4, 10, requires_grad=True)
    everyone = mesh.gather(own)
    assert everyone.shape == (3, 4, 10) and everyone[1].equal(own[0]) and not everyone[[0, 2]].any()
    everyone.sum().backward()
    assert own.grad.eq(1).all()
    assert mesh.sum_over_data(torch.ones(7, dtype=torch.float64), "loss").equal(torch.ones(7, dtype=torch.float64))
    assert record == [Crossing("logits", "all-gather", 3, 160), Crossing("loss", "all-reduce", 2, 56)]


def test_a_group_of_one_exchanges_nothing():
    record = []
    groups = record_groups(1, 2, 0, record)
    for group in (groups.experts, NOBODY.data):
        assert group.size == 1
        (only,) = group.all_gather(torch.ones(3), "nothing")
        assert only.equal(torch.ones(3))
        group.all_reduce(only, "nothing")
        group.broadcast(only, "nothing")
    assert record == []
