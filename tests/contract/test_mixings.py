"""Every registered mixing blends the same pairs everywhere, and its labels say what the pixels show.

Images are of one colour, another one for each, so that pixels tell whose they are.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import experts
from experts import registry
from experts.batches import Replica, StreamConfig, TrainBatches
from experts.cases import cases_of
from experts.data.config import Augment, DatasetConfig
from experts.data.images import ResidentImages
from experts.data.keyed_random import key
from experts.mixing.mixing import Step
from experts.progress import Progress
from experts.samplers.instance_balanced import InstanceBalanced
from orchestration.config.words import available
from orchestration.training.mesh import Mesh, MeshShape
from tests.emulated_device import DEVICE, EmulatedDevice
from tests.recipes import Recipe

registry.import_pieces(experts)

CASES = [case.config for name in registry.registered_names("mixing") for case in cases_of("mixing", name)]
every_mixing = pytest.mark.parametrize(
    "config",
    CASES,
    ids=lambda config: "-".join(map(str, config.model_dump(exclude_defaults=True).values())) or config.name,
)
COUNTS = np.array([60, 25, 10, 5])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))
SIZE, BATCH, EPOCHS = 8, 8, 20
WHOLE = Replica()
MIDDLE = EPOCHS // 2


def test_the_mixings_of_the_recipes_are_registered():
    assert {"mixup", "remix", "cutmix", "cmo"} <= set(registry.registered_names("mixing"))


def step_of(config, *, number=0, words=(), epoch=MIDDLE):
    second_B = LABELS[40:60] if config.second_sampler is not None else None
    now = Progress(epoch, EPOCHS, number, 5)
    return Step(LABELS[:20].copy(), second_B, SIZE, now, lambda name: key(*words, epoch, name))


def blends_of(config, count=40, **more):
    piece = registry.build("mixing", config, COUNTS)
    return [piece.blend(step_of(config, number=number, **more)) for number in range(count)]


def same(one, other):
    if one is None or other is None:
        return one is other
    return (
        (one.share, one.box) == (other.share, other.box)
        and np.array_equal(one.first_B, other.first_B)
        and np.array_equal(one.second_B, other.second_B)
        and np.array_equal(one.order_B, other.order_B)
    )


@every_mixing
def test_a_blend_has_a_share_and_two_labels_that_are_the_images_or_the_partners(config):
    blends = [blend for blend in blends_of(config) if blend is not None]
    assert blends
    for number, blend in enumerate(blends):
        step = step_of(config, number=number)
        assert 0 <= blend.share <= 1
        assert (blend.order_B is None) == (config.second_sampler is not None)
        if blend.order_B is not None:
            assert sorted(blend.order_B) == list(range(20))
        partners_B = step.second_B if blend.order_B is None else step.labels_B[blend.order_B]
        for labels_B in (blend.first_B, blend.second_B):
            assert labels_B.dtype == np.int64
            assert ((labels_B == step.labels_B) | (labels_B == partners_B)).all()
        if blend.box is not None:
            left, top, right, bottom = blend.box
            assert 0 <= left <= right <= SIZE and 0 <= top <= bottom <= SIZE
            inside = np.zeros((SIZE, SIZE))
            inside[top:bottom, left:right] = 1
            assert blend.share == pytest.approx(1 - inside.mean(), abs=1e-12)


@every_mixing
def test_a_blend_depends_on_moment_and_key_alone(config):
    piece, first = registry.build("mixing", config, COUNTS), blends_of(config)
    for number in reversed(range(len(first))):
        step = step_of(config, number=number)
        assert same(piece.blend(step), first[number])
        assert np.array_equal(step.labels_B, LABELS[:20]), "labels were written to"
    for others in (blends_of(config, words=["another seed"]), blends_of(config, epoch=MIDDLE + 1), first[::-1]):
        assert not all(map(same, others, first))


@every_mixing
def test_every_step_is_drawn_on_its_own(config):
    """Half of the steps, more or less, where a mixing says so; within 4 standard deviations of 400 draws."""
    blends = blends_of(config, 400)
    probability = getattr(config, "probability", 1)
    mixed = [blend for blend in blends if blend is not None]
    assert abs(len(mixed) - 400 * probability) <= 4 * np.sqrt(400 * probability * (1 - probability))
    assert len({(blend.share, blend.box) for blend in mixed}) > len(mixed) / 4
    shares = [blend.share for blend in mixed]
    if all(blend.box is None for blend in mixed):  # of Beta(1, 1)
        assert np.mean(shares) == pytest.approx(0.5, abs=4 / np.sqrt(12 * len(shares)))


@every_mixing
def test_too_few_epochs_are_refused_with_the_keys_to_set(config):
    problems = [config.length_problem(epochs) for epochs in range(1, 40)]
    refused = [problem is not None for problem in problems]
    assert refused == sorted(refused, reverse=True), "longer stages are refused and shorter ones are not"
    piece = registry.build("mixing", config.model_copy(update={"probability": 1}), COUNTS)
    for epochs, problem in enumerate(problems, 1):
        steps = [replace(step_of(config), now=Progress(epoch, epochs)) for epoch in range(1, epochs + 1)]
        assert any(piece.blend(step) is not None for step in steps) == (problem is None)
        assert problem is None or "mixing." in problem


def loader(config, replica=WHOLE):
    """Batches of images of one colour, none of them augmented: red is the position, green and blue are the label."""
    pixels = np.stack([np.arange(len(LABELS)), 20 * LABELS, 20 * LABELS], axis=1).astype(np.uint8)
    store = ResidentImages(torch.from_numpy(pixels)[:, :, None, None].expand(-1, -1, SIZE, SIZE).clone(), LABELS)
    data = DatasetConfig(
        name="colours", source="cifar10", image_size=SIZE, augment=Augment(), mean=(0, 0, 0), std=(1, 1, 1)
    )
    stream = StreamConfig(seed=3, stage="train", stream="all", epochs=EPOCHS, batch_size=BATCH)
    second = config.second_sampler and registry.build("sampler", config.second_sampler, LABELS, 4)
    mixing = registry.build("mixing", config, COUNTS)
    return TrainBatches(
        store, InstanceBalanced(InstanceBalanced.Config(), LABELS, 4), data, stream, replica, mixing, second
    )


@every_mixing
def test_labels_say_what_the_pixels_show(config):
    """An image shows its own colour with the weight of the first label, and its partner's with the rest.

    The partner is the one that the blend names: of the step, or of the same row of the mixing's own stream.
    """
    mixed_steps = 0
    batches = loader(config, Replica(dtype=torch.float64))
    drawn = batches._drawn(MIDDLE)
    for step, batch in enumerate(batches.iterate(MIDDLE)):
        own = torch.from_numpy(LABELS)[batch.positions_B]
        shown = batch.images_B3HW * 255
        mine = batch.positions_B.double()[:, None, None].expand_as(shown[:, 0])
        if batch.mixed is None:
            assert torch.equal(batch.labels_B, own)
            torch.testing.assert_close(shown[:, 0], mine)
            continue
        mixed_steps += 1
        torch.testing.assert_close(batch.mixed.share + batch.mixed.rest, torch.tensor(1.0, dtype=torch.float64))
        share, first, second = float(batch.mixed.share), batch.labels_B, batch.mixed.labels_B
        partners = torch.where(first == own, second, first)  # where labels differ from the image's own, the partner's
        expected = 20 * (share * own.double() + (1 - share) * partners.double())
        told = (first != own) | (second != own)  # else the partner's label does not show
        torch.testing.assert_close(shown[:, 1].mean((1, 2))[told], expected[told], atol=1e-9, rtol=0)
        blend = drawn.blend(step)
        others = batch.positions_B
        others = drawn.second_N[step * BATCH :][: len(own)] if blend.order_B is None else others[blend.order_B]
        inside = torch.full((SIZE, SIZE), 1 - blend.share, dtype=torch.float64)
        if blend.box is not None:
            left, top, right, bottom = blend.box
            inside = torch.zeros((SIZE, SIZE), dtype=torch.float64)
            inside[top:bottom, left:right] = 1
        positions = mine + (others.double()[:, None, None] - mine) * inside
        torch.testing.assert_close(shown[:, 0], positions, atol=1e-9, rtol=0)
    assert mixed_steps


@every_mixing
@pytest.mark.parametrize("replicas", [2, 3, 5, 9])
def test_replicas_have_the_parts_of_one_batch(config, replicas):
    """Nine replicas share batches of eight, so that one of them has none; the last batch has four."""
    whole = list(loader(config).iterate(MIDDLE))
    parts = [list(loader(config, Replica(index, replicas)).iterate(MIDDLE)) for index in range(replicas)]
    for step, batch in enumerate(whole):
        found = [part[step] for part in parts]
        assert torch.equal(torch.cat([part.images_B3HW for part in found]), batch.images_B3HW)
        assert torch.equal(torch.cat([part.labels_B for part in found]), batch.labels_B)
        assert all(torch.equal(part.global_labels, batch.global_labels) for part in found)
        assert [part.mixed is None for part in found] == [batch.mixed is None] * replicas
        if batch.mixed is not None:
            assert torch.equal(torch.cat([part.mixed.labels_B for part in found]), batch.mixed.labels_B)
            assert all(torch.equal(part.mixed.global_labels, batch.mixed.labels_B) for part in found)
            assert all(torch.equal(part.mixed.share, batch.mixed.share) for part in found)


@every_mixing
def test_an_epoch_goes_on_from_any_step_without_a_wait_for_the_device(config):
    whole = list(loader(config).iterate(MIDDLE))
    assert {batch.mixed is None for batch in whole} == (
        {True, False} if getattr(config, "probability", 1) < 1 else {False}
    )
    with EmulatedDevice() as seen:
        there = loader(config, Replica(device=DEVICE))
        for first in (0, 1, 7):
            there.steps_ahead = 3
            seen.waits.clear()
            found = list(there.iterate(MIDDLE, first))
            assert not seen.waits
            for batch, other in zip(whole[first:], found, strict=True):
                assert torch.equal(other.images_B3HW.inner, batch.images_B3HW)
                assert torch.equal(other.labels_B.inner, batch.labels_B)


@pytest.mark.parametrize("mix", available("mix"))
def test_a_stage_that_stops_within_an_epoch_goes_on_bitwise(mix, tmp_path):
    words = [f"mix={mix}", "method.stages.train.batch_size=50"]
    loud = ["method.stages.train.mixing.quiet_first=0"] if mix == "cmo" else []
    whole, first, second = (
        next(Recipe("ce", tmp_path, *words, *loud, mesh=lambda _: Mesh(MeshShape(1, 1))).trainers()) for _ in range(3)
    )
    losses = whole.train(8).losses
    begun = first.train(3).losses
    first.save(str(tmp_path))
    second.load(str(tmp_path), first.state())
    assert begun + second.train(8).losses == losses
    for name, value in whole.setup.model.state_dict().items():
        assert torch.equal(second.setup.model.state_dict()[name], value), name


@every_mixing
def test_a_stream_of_its_own_is_as_long_as_the_stages(config):
    """A sampler of fewer draws draws again, with other keys; of more draws, the first are used."""
    if config.second_sampler is None:
        return
    for sampler, draws in (({"name": "undersampled"}, 20), ({"name": "class_balanced", "epoch": "largest_class"}, 240)):
        chosen = loader(type(config)(quiet_first=0, quiet_last=0, probability=1, sampler=sampler))
        assert chosen.second_sampler.draws_per_epoch == draws
        second = chosen._second.positions(Progress(1, EPOCHS, 0, chosen.steps_per_epoch))
        assert len(second) == 100 == sum(len(batch.mixed.labels_B) for batch in chosen.iterate(1))
        rounds = [second[at : at + 20].tolist() for at in range(0, 100, 20)]
        assert all(one != other for one, other in itertools.pairwise(rounds))
