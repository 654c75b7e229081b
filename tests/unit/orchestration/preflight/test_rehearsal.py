"""A rehearsal takes the step that trains: whatever the step exchanges or runs is in the plan."""

from __future__ import annotations

import pytest
import torch

from experts.flows.plain import Plain
from orchestration.config.compose import load_config
from orchestration.preflight.blanks import NoArithmetic
from orchestration.preflight.plan import plan
from orchestration.training.step import TrainingStep


def planned(*words):
    (stage,) = plan(load_config(["method=ride", "cluster.workers=6", *words])).stages
    return {x.what: (x.kind, x.among, x.payload) for x in stage.exchanges}


def test_a_new_exchange_of_a_flow_is_in_the_plan(monkeypatch):
    """A number for each of 32 images of a replica, 4 bytes each, to the workers of the other two slots."""
    usual = Plain.__call__

    def and_more(self, network, batch, progress, gather):
        outputs_EBX = usual(self, network, batch, progress, gather)
        gather(outputs_EBX[:1, :, :1].detach(), "something new")
        return outputs_EBX

    before = planned()
    monkeypatch.setattr(Plain, "__call__", and_more)
    assert planned() == before | {"something new": ("all-gather", 3, 4 * 32)}


def test_a_new_exchange_of_the_step_is_in_the_plan(monkeypatch):
    usual = TrainingStep._global_values

    def and_more(self, *found):
        self._setup.mesh.sum_over_data(torch.zeros(5), "five numbers")
        return usual(self, *found)

    before = planned()
    monkeypatch.setattr(TrainingStep, "_global_values", and_more)
    assert planned() == before | {"five numbers": ("all-reduce", 2, 20)}


def test_images_of_imagenets_size_exchange_what_small_ones_do():
    words = ["dataset=imagenet_lt", "dataset.root=/not/there"]
    assert planned(*words) == planned(*words, "dataset.image_size=32")


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_convolution_without_arithmetic_has_shape_type_and_gradients_of_a_real_one(precision):
    conv = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    image = torch.rand(2, 4, 9, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        real = conv(image)
        with NoArithmetic():
            blank = conv(image)
    assert (blank.shape, blank.dtype) == (real.shape, real.dtype) == (torch.Size([2, 6, 5, 4]), precision)
    assert real.any() and not blank.any()
    blank.float().sum().backward()
    for tensor in (image, conv.weight, conv.bias):
        assert tensor.grad.shape == tensor.shape and not tensor.grad.any()


def test_initial_weights_without_arithmetic_leave_the_generator_alone():
    before = torch.get_rng_state()
    with NoArithmetic():
        weights = torch.nn.Linear(5, 3).weight
    assert weights.min() == weights.max() > 0
    assert torch.equal(before, torch.get_rng_state())
