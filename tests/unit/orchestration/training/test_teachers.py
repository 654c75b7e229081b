"""Teachers compute as the network that learns from them."""

from __future__ import annotations

import contextlib

import pytest
import torch

from orchestration.training.mesh import Mesh, mesh_shape
from tests.recipes import Recipe


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("autocast", torch.bfloat16)])
def test_teachers_compute_in_the_precision_of_the_run(precision, dtype, tmp_path):
    recipe = Recipe("ride_distill", tmp_path, f"engine.precision={precision}", mesh=lambda _: Mesh(mesh_shape(3, 1)))
    with contextlib.closing(recipe.trainers()) as trainers:
        teachers = next(trainers).training.teachers
        found = {}
        for name, held in teachers.held.items():
            held.trunk.register_forward_hook(lambda _, images, out, name=name: found.update({name: out.dtype}))
        scores = teachers(torch.zeros(4, 3, 8, 8))
    assert found == {"teacher": dtype}
    assert {values.dtype for values in scores.values()} == {torch.float32}
