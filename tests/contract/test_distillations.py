"""Every registered distillation keeps the promises of `Distillation`.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

import pytest
import torch

import aggregation
from experts import registry
from experts.progress import Progress

registry.import_pieces(aggregation)
every = pytest.mark.parametrize("name", registry.registered_names("distillation"))
NOW = Progress(epoch=2, epochs=4)
LABELS = torch.tensor([0, 3, 1, 0, 2])


def distillation(name, **settings):
    return registry.build("distillation", registry.piece("distillation", name).Config(**settings))


def scores(*shape, seed=0, dtype=torch.float64):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4).to(dtype)


def add(piece, logits, teacher, *, loss=0.5, rows=slice(None), whole=LABELS):
    """Return loss and terms of some rows of a batch."""
    share = torch.tensor(loss * len(LABELS[rows]) / len(whole), dtype=torch.float64)
    return piece(share, logits[:, rows], {"big": teacher[rows]}, piece.denominators(whole), NOW)


def test_the_distillations_of_the_recipes_are_registered():
    assert {"mean_logits", "sum_logits", "each_expert"} <= set(registry.registered_names("distillation"))


@every
@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_loss_and_terms_are_finite_in_at_least_float32(name, num_experts, dtype):
    logits, teacher = scores(num_experts, 5, 4, dtype=dtype), scores(5, 4, seed=1, dtype=dtype)
    _, terms = add(distillation(name), logits, teacher)
    for term in terms.values():
        assert term.shape in [(), (num_experts,)]
        assert term.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.isfinite(term).all() and (term > 0).all()
        assert not term.requires_grad


@every
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_equal_and_extreme_scores_stay_finite(name, scale):
    logits = (scores(3, 5, 4, dtype=torch.float32) * scale).requires_grad_()
    loss, _ = add(distillation(name), logits, scores(5, 4, seed=1, dtype=torch.float32) * scale)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@every
def test_pieces_of_a_batch_sum_to_the_whole_and_an_empty_piece_is_zero(name):
    piece, teacher = distillation(name), scores(5, 4, seed=1)
    whole, apart = scores(3, 5, 4).requires_grad_(), scores(3, 5, 4).requires_grad_()
    loss, terms = add(piece, whole, teacher)
    loss.backward()
    results = [add(piece, apart, teacher, rows=rows) for rows in (slice(0, 2), slice(2, 2), slice(2, 5))]
    for result, _ in results:
        result.backward()
    assert results[1][0] == 0
    torch.testing.assert_close(sum(result[0] for result in results), loss, atol=1e-12, rtol=1e-12)
    for key, term in terms.items():
        torch.testing.assert_close(sum(result[1][key] for result in results), term, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(apart.grad, whole.grad, atol=1e-12, rtol=1e-12)


@every
def test_slots_evaluated_apart_give_the_whole_loss_and_their_own_gradient(name):
    """A worker's own expert attached, the others' logits detached. Bitwise."""
    piece, teacher, logits = distillation(name), scores(5, 4, seed=1), scores(3, 5, 4)
    whole = logits.clone().requires_grad_()
    loss, _ = add(piece, whole, teacher)
    loss.backward()
    for own in range(3):
        slot = logits[own].clone().requires_grad_()
        value, _ = add(piece, torch.stack([slot if k == own else z for k, z in enumerate(logits)]), teacher)
        value.backward()
        assert torch.equal(value, loss)
        assert torch.equal(slot.grad, whole.grad[own])


@every
def test_gradient_equals_finite_differences(name):
    piece, teacher = distillation(name), scores(5, 4, seed=1)
    logits = scores(3, 5, 4).requires_grad_()
    add(piece, logits, teacher)[0].backward()
    direction = scores(3, 5, 4, seed=2)
    ahead, behind = (add(piece, logits.detach() + s * 1e-6 * direction, teacher)[0] for s in (1, -1))
    torch.testing.assert_close((ahead - behind) / 2e-6, (logits.grad * direction).sum(), atol=1e-6, rtol=1e-6)


@every
def test_denominators_count_images_and_pairs_once(name):
    piece = distillation(name)
    for labels in (LABELS, torch.stack([LABELS, LABELS])):
        (images,) = piece.denominators(labels).values()
        assert images == 5 and images.dtype == torch.float64 and images.shape == ()


@every
def test_repeat_and_weight_multiply(name):
    logits, teacher = scores(3, 5, 4), scores(5, 4, seed=1)
    once = add(distillation(name, repeat=1), logits, teacher)[0]
    assert add(distillation(name, repeat="num_experts"), logits, teacher)[0] == pytest.approx(3 * once.item())
    alone = add(distillation(name, repeat=1, weight=0), logits, teacher)[0].item()
    assert alone == distillation(name).together(0.5, 0.0)
    double = add(distillation(name, repeat=1, weight=2), logits, teacher)[0]
    assert double.item() - alone == pytest.approx(2 * (once.item() - alone))


@every
def test_the_teacher_is_chosen_by_name_or_the_only_one(name):
    logits, near, far = scores(3, 5, 4), scores(5, 4, seed=1), scores(5, 4, seed=2)
    loss, both = torch.tensor(0.5), {"near": near, "far": far}
    chosen = distillation(name, teacher="far")
    denominators = chosen.denominators(LABELS)
    alone = distillation(name)(loss, logits, {"far": far}, denominators, NOW)[0]
    assert chosen(loss, logits, both, denominators, NOW)[0] == alone
    for piece, teachers in ((distillation(name), both), (distillation(name), {}), (chosen, {"near": near})):
        with pytest.raises(ValueError, match=rf"'{name}'.*distillation.teacher.*teachers\.<name>\.run"):
            piece(loss, logits, teachers, denominators, NOW)


@every
def test_a_teacher_of_other_classes_or_images_is_refused_by_name(name):
    for shape in ((5, 3), (4, 4), (5,)):
        with pytest.raises(ValueError, match=f"distillation '{name}'.*same images and classes"):
            distillation(name)(torch.tensor(0.5), scores(3, 5, 4), {"t": scores(*shape)}, {}, NOW)


@every
@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"weight": -1}, {"repeat": 0}, {"repeat": "thrice"}])
def test_settings_without_sense_are_refused(name, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        distillation(name, **wrong)
