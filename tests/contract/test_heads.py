"""Every registered head, in every variant of its config, keeps the promises of `Head`.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import aggregation
import experts
from experts import registry
from experts.cases import cases_of
from experts.ensemble import keyed_draws
from experts.registry import build, piece

registry.import_pieces(experts, aggregation)

HEADS = registry.registered_names("head")
CASES = [case.config for name in HEADS for case in cases_of("head", name)]


def label(config):
    settings = config.model_dump(exclude_unset=True)
    return "-".join([config.name, *(f"{key}={value}" for key, value in settings.items())])


every_head = pytest.mark.parametrize("config", CASES, ids=label)
PAIRS = [(name, other) for name in HEADS for other in piece("head", name).continues]
D, C = 6, 4
# 23 images; class 3 has one. Shares are of unequal size, and one is empty.
LABELS = torch.tensor([0, 1, 0, 0, 2, 0, 1, 0, 0, 1, 1, 0, 2, 0, 1, 0, 3, 0, 1, 2, 0, 0, 1])
SHARES = {
    1: [slice(0, 23)],
    2: [slice(0, 9), slice(9, 23)],
    3: [slice(0, 4), slice(4, 4), slice(4, 23)],
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FEATURES = draw(23, D, seed=5) + draw(C, D, seed=6)[LABELS]


def head(config, seed=0, position=0):
    with keyed_draws(seed, "head"):
        return build("head", config, D, C, position)


def stir(module):
    """Give every parameter and buffer that a head starts with other values than it starts with."""
    for k, tensor in enumerate(module.state_dict().values()):
        tensor.add_(draw(*tensor.shape, seed=k).to(tensor.dtype))
    return module


def fit(config, shares, features=FEATURES, labels=LABELS, dtype=torch.float64, batch=5):
    """Fit one head per share, a thread for each, as replicas do; return them."""
    heads = [head(config).to(dtype) for _ in shares]
    handed: list[torch.Tensor] = [torch.zeros(0)] * len(shares)
    everyone = threading.Barrier(len(shares), timeout=30)  # broken where one asks for a total that others do not

    def replica(k):
        def passes():
            for x, y in zip(features[shares[k]].split(batch), labels[shares[k]].split(batch), strict=True):
                if len(y):
                    yield x.to(dtype), y

        def total(value):
            handed[k] = value
            everyone.wait()
            assert {(tuple(one.shape), one.dtype) for one in handed} == {(tuple(value.shape), value.dtype)}
            summed = torch.stack(handed).sum(dim=0)
            everyone.wait()  # nobody hands in the next before all have read this one
            return summed

        heads[k].fit(passes, total)

    with ThreadPoolExecutor(len(shares)) as threads:
        list(threads.map(replica, range(len(shares))))
    return heads


def ready(config, dtype=torch.float32):
    """A head with other weights than it starts with, or fitted."""
    if piece("head", config.name).fits:
        return fit(config, SHARES[1], dtype=dtype)[0]
    return stir(head(config)).to(dtype)


def test_the_heads_of_the_recipes_are_registered():
    assert {"linear", "cosine", "tau_normalised", "ncm", "bilateral"} <= set(HEADS)


@every_head
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_finite_one_row_per_image_of_the_features_type(config, training, dtype):
    one = ready(config, dtype).train(training)
    scores_BC = one(FEATURES.to(dtype))
    assert scores_BC.shape == (len(LABELS), C)
    assert scores_BC.dtype == dtype
    assert torch.isfinite(scores_BC).all()
    assert one(FEATURES[:0].to(dtype)).shape == (0, C)
    assert scores_BC.std(dim=1).min() > 0  # ready: classes score differently
    assert torch.isfinite(one(torch.zeros(1, D, dtype=dtype))).all()


@every_head
@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_scores_are_those_of_float32_to_a_half_types_rounding(config, training):
    one, features_BD = ready(config).train(training), FEATURES.float()
    exact = one(features_BD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (features_BD, features_BD.bfloat16()):
            scores = one(given)
            assert torch.isfinite(scores).all()
            torch.testing.assert_close(scores.float(), exact, atol=0.03 * float(exact.detach().abs().max()), rtol=0)


@every_head
@pytest.mark.parametrize("training", [True, False])
def test_images_do_not_influence_each_other(config, training):
    one = ready(config, torch.float64).train(training)
    whole = one(FEATURES)
    for images in (slice(3, 4), slice(0, 10), slice(22, 23)):
        torch.testing.assert_close(one(FEATURES[images]), whole[images], atol=1e-12, rtol=1e-12)


@every_head
def test_features_of_several_experts_are_scored_row_by_row_unless_each_has_its_own_head(config):
    """A head that all experts share gets [e, B, D]."""
    if piece("head", config.name).own_per_expert:
        return
    one = ready(config, torch.float64).eval()
    together = one(torch.stack([FEATURES, 2 * FEATURES.flip(0)]))
    torch.testing.assert_close(together[0], one(FEATURES), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(together[1], one(2 * FEATURES.flip(0)), atol=1e-12, rtol=1e-12)


@every_head
def test_the_same_key_builds_the_same_head_and_leaves_the_generator_alone(config):
    before = torch.get_rng_state()
    one, same, other = head(config), head(config), head(config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    drawn = [not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    assert any(drawn) or not list(one.parameters())


@every_head
def test_state_makes_the_round_trip_and_inputs_are_unchanged(config):
    one, other = ready(config).eval(), head(config, seed=1).eval()
    features_BD = FEATURES.float()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(features_BD), other(features_BD))
    assert torch.equal(features_BD, FEATURES.float())
    for name, tensor in one.to("meta").state_dict().items():
        assert tensor.is_meta, name


@every_head
def test_every_parameter_gets_a_gradient(config):
    one = ready(config).train()
    if not list(one.parameters()):
        return
    (one(FEATURES.float()) ** 2).sum().backward()
    for name, p in one.named_parameters():
        if name.startswith("memory."):  # an auxiliary trains it
            assert one.has_memory and p.grad is None
            continue
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize(("name", "other"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_a_head_takes_over_the_tensors_of_those_it_continues(name, other):
    """Every tensor of theirs has its place, and none is left but what the head says that it adds."""
    theirs = stir(head(cases_of("head", other)[0].config))
    one = head(cases_of("head", name)[0].config)
    left, unknown = one.load_state_dict(theirs.state_dict(), strict=False)
    assert not unknown and {key.split(".")[0] for key in left} == set(piece("head", name).adds)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, one.state_dict()[key]), key


def test_heads_continue_registered_heads_and_never_themselves():
    assert {name for _, name in PAIRS} <= set(HEADS)
    assert all(name != other for name, other in PAIRS)


# Heads that fit

FITTED = [config for config in CASES if piece("head", config.name).fits]
every_fitted = pytest.mark.parametrize("config", FITTED, ids=label)
FITTING = FITTED + [config for config in CASES if piece("head", config.name).fits_first]
every_fitting = pytest.mark.parametrize("config", FITTING, ids=label)


def test_only_heads_that_fit_override_it():
    for name in HEADS:
        head_is = piece("head", name)
        assert (head_is.fit is not piece("head", "linear").fit) == (head_is.fits or head_is.fits_first), name


@every_fitting
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_shares_of_replicas_fit_what_the_whole_fits(config, replicas):
    """1e-12: sums in another order. All replicas end with the same bits, whatever their share, also an empty one."""
    whole = fit(config, SHARES[1], batch=23)[0]
    heads = fit(config, SHARES[replicas])
    for one in heads:
        for (name, tensor), expected in zip(one.state_dict().items(), whole.state_dict().values(), strict=True):
            torch.testing.assert_close(tensor, expected, atol=1e-12, rtol=1e-12, msg=name)
            assert torch.equal(tensor, heads[0].state_dict()[name]), name
    torch.testing.assert_close(heads[0].eval()(FEATURES), whole.eval()(FEATURES), atol=1e-12, rtol=1e-12)


@every_fitting
def test_the_order_of_images_and_what_was_fitted_before_change_nothing(config):
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    expected = fit(config, SHARES[1])[0].state_dict()
    again = fit(config, SHARES[1], FEATURES[order], LABELS[order])[0]
    again.fit(lambda: [(FEATURES, LABELS)], lambda value: value)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-12, rtol=1e-12, msg=name)


@every_fitting
def test_features_in_float32_fit_what_float64_fits_to_their_rounding(config):
    exact = fit(config, SHARES[1])[0]
    for name, tensor in fit(config, SHARES[3], dtype=torch.float32)[0].state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), exact.state_dict()[name], atol=1e-6, rtol=1e-6, msg=name)


@every_fitted
def test_renamed_classes_are_fitted_alike(config):
    order = torch.tensor([2, 0, 3, 1])
    renamed = fit(config, SHARES[1], labels=order.argsort()[LABELS])[0].eval()
    expected = fit(config, SHARES[1])[0].eval()(FEATURES)[:, order]
    torch.testing.assert_close(renamed(FEATURES), expected, atol=1e-12, rtol=1e-12)


@every_fitting
@pytest.mark.parametrize("replicas", [1, 3])
def test_a_class_without_an_image_is_refused_by_its_id_and_nothing_is_changed(config, replicas):
    kept = (LABELS != 1) & (LABELS != 3)
    shares = {1: [slice(0, 15)], 3: [slice(0, 4), slice(4, 4), slice(4, 15)]}[replicas]
    with pytest.raises(ValueError, match=rf"head '{config.name}'.*2 of 4 classes.*class 1, 3\b"):
        fit(config, shares, FEATURES[kept], LABELS[kept])
    one = ready(config)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    with pytest.raises(ValueError, match="no training image"):
        one.fit(lambda: [(FEATURES[kept].float(), LABELS[kept])], lambda value: value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


@every_fitted
def test_a_fit_has_no_gradient_and_keeps_none_of_the_images(config):
    features = FEATURES.clone().requires_grad_()
    one = fit(config, SHARES[1], features)[0]
    assert not any(tensor.requires_grad for tensor in one.state_dict().values())
    assert isinstance(one, nn.Module)
    assert sum(tensor.numel() for tensor in one.state_dict().values()) <= (C + 1) * (D + 1)
