"""Every registered calibration, on every registered head, keeps the promises of `Calibration`.

Shapes: B images, D features, C classes, E experts.
"""

from __future__ import annotations

import pytest
import torch

import aggregation
import experts
from experts import registry
from experts.backbones.resnet_cifar import ResNetCifar
from experts.cases import cases_of
from experts.ensemble import EnsembleConfig, build_ensemble, part_of
from experts.registry import piece

registry.import_pieces(experts, aggregation)

CASES = [case.config for name in registry.registered_names("calibration") for case in cases_of("calibration", name)]
every_calibration = pytest.mark.parametrize("config", CASES, ids=lambda config: "-".join(config.model_dump().values()))
HEADS = [cases_of("head", name)[0].config for name in registry.registered_names("head")]
C, IMAGES = 4, torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def ensemble(head, calibration, seed=0, **settings):
    """Two experts, whose calibrations, if they have them, have other values than at the start."""
    config = EnsembleConfig(
        ResNetCifar.Config(depth=8), head, num_classes=C, expert_names=["a", "b"], reduce_dimension=True,
        calibration=calibration, **settings,
    )  # fmt: skip
    built = build_ensemble(config, seed=seed).double().eval()
    with torch.no_grad():
        for k, (name, parameter) in enumerate(built.named_parameters()):
            if part_of(name) == "calibration":
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(k)) + 0.5)
    return built


@every_calibration
@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.name)
def test_it_changes_the_scores_of_any_head_and_none_of_its_tensors(config, head):
    plain, changed = ensemble(head, None), ensemble(head, config)
    own = {name: tensor for name, tensor in changed.state_dict().items() if part_of(name) != "calibration"}
    assert own.keys() == plain.state_dict().keys()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in own.items())
    if piece("head", head.name).fits:  # before it is fitted, all its scores are the same
        return
    before, after = plain(IMAGES.double()), changed(IMAGES.double())
    assert before.shape == after.shape
    assert torch.isfinite(after).all()
    assert (before - after).abs().max() > 1e-3


@every_calibration
def test_it_is_what_learns_where_all_else_is_frozen(config):
    built = ensemble(HEADS[0], config)
    built(IMAGES.double()).square().sum().backward()
    found = {name for name, p in built.named_parameters() if part_of(name) == "calibration"}
    assert {name.split(".")[1] for name in found} == {"a", "b"}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in built.named_parameters() if name in found)


@every_calibration
def test_images_do_not_influence_each_other_and_experts_may_share_a_head(config):
    linear = piece("head", "linear").Config()
    for shared_head in (False, True):
        built = ensemble(linear, config, shared_head=shared_head)
        whole = built(IMAGES.double())
        torch.testing.assert_close(built(IMAGES[2:3].double()), whole[:, 2:3], atol=1e-10, rtol=1e-10)


@every_calibration
def test_its_draws_depend_on_seed_and_expert_alone(config):
    one, other = ensemble(HEADS[0], config).state_dict(), ensemble(HEADS[0], config, seed=1).state_dict()
    again = ensemble(HEADS[0], config).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    drawn = [name for name in one if part_of(name) == "calibration" and not torch.equal(one[name], other[name])]
    assert all(
        not torch.equal(one[name], one[name.replace("experts.a.", "experts.b.")]) for name in drawn if ".a." in name
    )


@every_calibration
def test_under_autocast_it_computes_in_float32(config):
    built = ensemble(piece("head", "linear").Config(), config).float()
    exact = built(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = built(IMAGES)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, atol=0.05 * float(exact.detach().abs().max()), rtol=0)
