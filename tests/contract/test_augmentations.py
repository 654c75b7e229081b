"""Every registered augmentation changes an image by the image's own draws, on any device, and nothing waits for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import experts
from experts import registry
from experts.augmentation.augmentation import Move
from experts.augmentation.stack import SHARED, Stack
from experts.cases import cases_of
from experts.data.keyed_random import key, uniforms
from tests.emulated_device import DEVICE, EmulatedDevice

registry.import_pieces(experts)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
CASES = [case.config for name in registry.registered_names("augmentation") for case in cases_of("augmentation", name)]
every_piece = pytest.mark.parametrize(
    "config",
    CASES,
    ids=lambda config: "-".join([config.name, *map(str, config.model_dump(exclude_defaults=True).values())]),
)
IMAGES, SIZE = 24, 20


def pictures(channels=3):
    values = np.random.default_rng(0).integers(0, 256, (IMAGES, channels, SIZE, SIZE), dtype=np.uint8)
    return torch.from_numpy(values)


def draws_of(stack, seed=0, rows=slice(0, IMAGES)):
    return stack.draw(lambda table, width: uniforms(key(seed, table), rows.start, rows.stop - rows.start, width))


def test_the_augmentations_of_the_recipes_are_registered():
    assert {
        "crop", "resized_crop", "flip", "rotation", "color_jitter", "greyscale", "gaussian_blur", "randaugment",
        "autoaugment", "cutout", "quarter_turn",
    } <= set(registry.registered_names("augmentation"))  # fmt: skip


@every_piece
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_are_finite_of_one_shape_and_not_written_to(config, channels, dtype):
    stack, images = Stack([config], MEAN, STD), pictures(channels)
    kept = images.clone()
    found = stack(images, draws_of(stack), dtype)
    assert (found.shape, found.dtype) == ((IMAGES, 3, SIZE, SIZE), dtype)
    assert found.is_contiguous()
    assert torch.isfinite(found).all()
    assert torch.equal(images, kept)
    numbers = stack.changed(images, draws_of(stack), dtype)
    assert numbers.min() >= 0 and numbers.max() <= 1


@every_piece
def test_an_image_depends_on_its_own_row_alone(config):
    stack, images = Stack([config], MEAN, STD), pictures()
    whole = stack(images, draws_of(stack))
    for rows in (slice(0, 1), slice(5, 12), slice(23, 24), slice(7, 7)):
        assert torch.equal(stack(images[rows], draws_of(stack, rows=rows)), whole[rows])
    others = stack(images, draws_of(stack, seed=1))
    assert not torch.equal(others, whole), "nothing random happens"
    assert torch.equal(stack(images, draws_of(stack)), whole), "it has a state"


@every_piece
def test_a_device_gets_the_same_pixels_and_the_host_does_not_wait(config):
    stack, images = Stack([config], MEAN, STD), pictures()
    expected = stack(images, draws_of(stack))
    with EmulatedDevice():
        there = images.to(DEVICE)
        stack(there, draws_of(stack))  # constants
        with EmulatedDevice() as seen:
            found = stack(there, draws_of(stack))
        assert not seen.waits, seen.waits
        assert torch.equal(found.inner, expected)


@every_piece
def test_a_piece_that_is_off_changes_nothing_and_others_do(config):
    assert not config.is_off
    for off in ({"padding": 0}, {"probability": 0.0}, {"degrees": 0.0}, {"size": 0}):
        if set(off) <= set(type(config).model_fields):
            silent = type(config)(**config.model_dump() | off)
            stack = Stack([silent], MEAN, STD)
            assert silent.is_off
            assert torch.equal(stack(pictures(), draws_of(stack)), Stack([], MEAN, STD)(pictures(), {}))


@every_piece
def test_a_piece_that_comes_again_has_other_draws(config):
    if config.name == "resized_crop":
        return
    stack = Stack([config, config], MEAN, STD)
    (first, columns), (second, others) = stack._pieces
    assert len(set(columns + others)) == len(first.columns) + len(second.columns)


@every_piece
def test_what_it_tells_is_a_number_for_each_image_by_its_own_row(config):
    piece, stack = registry.build("augmentation", config), Stack([config], MEAN, STD)

    def told(rows):
        return stack.told(lambda table, width: uniforms(key(0, table), rows.start, rows.stop - rows.start, width))

    whole = told(slice(0, 400))
    assert set(whole) == ({config.name} if piece.told_values else set())
    for values in whole.values():
        assert values.dtype == np.int64
        counts = np.bincount(values, minlength=piece.told_values)
        assert len(counts) == piece.told_values and counts.min() > 0.5 * len(values) / piece.told_values
        assert np.array_equal(told(slice(5, 12))[config.name], values[5:12])


def test_pieces_share_no_column():
    stack = Stack(list({config.name: config for config in CASES}.values()), MEAN, STD)
    columns = [column for _, own in stack._pieces for column in own]
    assert len(set(columns)) == len(columns)
    assert all(place < stack.tables[table] for table, place in columns)
    assert stack.tables["pixels"] == len(SHARED)


def test_moves_in_a_row_are_as_one_after_the_other():
    """Shifts add up and mirrors and turns are undone in turn, so that one gather gives the same pixels."""
    moves = [config for config in CASES if issubclass(registry.piece("augmentation", config.name), Move)]
    order = [moves[i] for i in np.random.default_rng(0).permutation(len(moves))]
    for chain in (moves, order, [*moves, *order]):
        stack, images = Stack(chain, MEAN, STD), pictures()
        draws = draws_of(stack)
        one = images
        for piece, columns in stack._pieces:
            alone = Stack([piece], MEAN, STD, dict(zip(piece.columns, columns, strict=True)))
            one = (alone.changed(one, draws) * 255).round().to(torch.uint8)
        assert torch.equal(stack(images, draws), Stack([], MEAN, STD)(one, {}))


def test_bytes_after_numbers_are_rounded_as_images_of_8_bits_are():
    configs = [config for config in CASES if config.name in ("color_jitter", "randaugment")]
    jitter, randaugment = configs[0], configs[-1]
    stack, images = Stack([jitter, randaugment], MEAN, STD), pictures()
    draws = draws_of(stack)
    first = Stack([jitter], MEAN, STD).changed(images, draws)
    expected = Stack([randaugment], MEAN, STD).changed((first * 255).round().to(torch.uint8), draws)
    assert torch.equal(stack.changed(images, draws), expected)
