"""A batch is a pure function of where training stands: replicas, loader processes and history do not change it."""

import numpy as np
import pytest
import torch
from PIL import Image

import experts
from experts.batches import Replica, StreamConfig, TrainBatches
from experts.data.config import Augment, DatasetConfig
from experts.data.dataset import open_dataset
from experts.eval_batches import EvalBatches
from experts.mixing.cmo import CMO
from experts.mixing.cutmix import CutMix
from experts.progress import Progress
from experts.registry import build, import_pieces
from experts.samplers.class_balanced import ClassBalanced
from experts.samplers.effective_number import EffectiveNumber
from experts.samplers.instance_balanced import InstanceBalanced
from experts.samplers.progressively_balanced import ProgressivelyBalanced
from experts.samplers.reversed import Reversed
from experts.samplers.square_root import SquareRoot

import_pieces(experts)  # CMO's config takes any sampler

SAMPLERS = [
    InstanceBalanced.Config(),
    ClassBalanced.Config(),
    ClassBalanced.Config(form="per_draw_cycle"),
    ClassBalanced.Config(form="multinomial"),
    ClassBalanced.Config(epoch="largest_class"),
    SquareRoot.Config(),
    ProgressivelyBalanced.Config(),
    Reversed.Config(),
    EffectiveNumber.Config(),
]
COUNTS = [7, 4, 2]
WHOLE = Replica()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Write thirteen training and six test pictures of different sizes, in three classes."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split, counts in (("train", COUNTS), ("test", [2, 2, 2])):
        for c, count in enumerate(counts):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + 9 * i, 40 + 5 * c, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


def settings(tree, **more):
    steps = {"augment": Augment(crop_padding=2, horizontal_flip=0.5, rotation=10), "image_size": 16} | more
    return DatasetConfig(name="tree", source="image_folder", root=str(tree), **steps)


STREAMED = {"resident": "never", "augment": Augment(random_resized_crop=(0.2, 1.0), horizontal_flip=0.5)}


def batches(config, sampler=None, replica=WHOLE, mixing=None, **more):
    store = open_dataset(config).train
    made = build("sampler", sampler or InstanceBalanced.Config(), store.labels, 3)
    arguments = {"batch_size": 5, "seed": 0, "stage": "train", "stream": "main", "epochs": 3} | more
    mixings = []
    if mixing is not None:
        second = mixing.second_sampler and build("sampler", mixing.second_sampler, store.labels, 3)
        mixings = [build("mixing", mixing, np.array(COUNTS)), second]
    return TrainBatches(store, made, config, StreamConfig(**arguments), replica, *mixings)


def same(a, b):
    return (
        torch.equal(a.images_B3HW, b.images_B3HW)
        and torch.equal(a.labels_B, b.labels_B)
        and torch.equal(a.global_labels, b.global_labels)
    )


@pytest.mark.parametrize("more", [{}, STREAMED, {**STREAMED, "resident": "always"}], ids=["frames", "streamed", "kept"])
def test_a_batch_does_not_depend_on_what_came_before(tree, more):
    config = settings(tree, **more)
    history = {
        (epoch, step): batch
        for loader in [batches(config)]
        for epoch in (1, 2)
        for step, batch in enumerate(loader.iterate(epoch))
    }
    assert len(history) == 2 * 3
    for (epoch, step), batch in reversed(history.items()):
        assert same(batches(config).batch(epoch, step), batch)
        assert same(next(batches(config).iterate(epoch, step, step + 1)), batch)
    assert not torch.equal(history[1, 0].images_B3HW, history[2, 0].images_B3HW)


@pytest.mark.parametrize("num_replicas", [2, 3, 4])
@pytest.mark.parametrize("more", [{}, STREAMED], ids=["frames", "streamed"])
def test_replicas_side_by_side_are_the_whole_batch(tree, more, num_replicas):
    """13 images in batches of 5: the last batch has 3, so a fourth replica gets none of it."""
    config = settings(tree, **more)
    whole = batches(config)
    parts = [batches(config, replica=Replica(d, num_replicas)) for d in range(num_replicas)]
    for step in range(whole.steps_per_epoch):
        batch, shares = whole.batch(1, step), [p.batch(1, step) for p in parts]
        assert torch.equal(torch.cat([s.images_B3HW for s in shares]), batch.images_B3HW)
        assert torch.equal(torch.cat([s.labels_B for s in shares]), batch.labels_B)
        assert all(torch.equal(s.global_labels, batch.labels_B) for s in shares)
        expected = [len(a) for a in np.array_split(np.arange(len(batch.labels_B)), num_replicas)]
        assert [len(s.labels_B) for s in shares] == expected
        assert whole.labels(1, step).tolist() == batch.labels_B.tolist()


@pytest.mark.parametrize("processes", [1, 2])
def test_loader_processes_change_nothing_even_when_left_early(tree, processes):
    here = batches(settings(tree, **STREAMED))
    there = batches(settings(tree, **STREAMED, loader_processes=processes))
    try:
        next(there.iterate(3))  # stopped early, while batches are being decoded
        for epoch in (1, 2):
            for a, b in zip(here.iterate(epoch), there.iterate(epoch), strict=True):
                assert same(a, b)
    finally:
        there.close()


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(
    "mixing", [CutMix.Config(probability=0.5), CMO.Config(quiet_first=0, quiet_last=0)], ids=lambda mixing: mixing.name
)
def test_mixed_images_are_read_from_files_ahead_of_time(tree, mixing, replicas):
    """Partners of a second stream too, in mixed steps alone; outside the box images are what they would be."""
    config, kinds, changed = settings(tree, **STREAMED), set(), False
    for index in range(replicas):
        replica = Replica(index, replicas)
        plain, here = batches(config, replica=replica), batches(config, replica=replica, mixing=mixing)
        there = batches(settings(tree, **STREAMED, loader_processes=1), replica=replica, mixing=mixing)
        try:
            next(there.iterate(3))  # stopped early
            for epoch in (1, 2, 3):
                steps = [list(loader.iterate(epoch)) for loader in (plain, here, there)]
                for step, (alone, batch, found) in enumerate(zip(*steps, strict=True)):
                    assert same(found, batch) and same(here.batch(epoch, step), batch)
                    kinds.add(batch.mixed is None)
                    share = 1.0 if batch.mixed is None else float(batch.mixed.share)
                    pixels = (batch.images_B3HW != alone.images_B3HW).any(1).float().mean((1, 2))
                    assert (pixels <= 1 - share + 1e-6).all()
                    changed = changed or bool(pixels.any())
        finally:
            there.close()
    assert changed and kinds == {True, False}


def test_loading_leaves_the_global_generators_alone(tree):
    loader = batches(settings(tree, **STREAMED, loader_processes=1))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader.iterate(1))
    loader.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_seed_stage_stream_and_view_each_change_the_draws(tree):
    config = settings(tree)
    base = batches(config).batch(1, 0)
    for change in ({"seed": 1}, {"stage": "other"}, {"stream": "other"}, {"view": 1}):
        assert not torch.equal(batches(config, **change).batch(1, 0).images_B3HW, base.images_B3HW), change
    assert torch.equal(batches(config, view=1).batch(1, 0).labels_B, base.labels_B), "a view has the same images"


def test_an_image_drawn_twice_gets_two_crops(tree):
    """Two images of class 2, drawn four or more times each in one class-aware batch."""
    loader = batches(settings(tree), ClassBalanced.Config(epoch="largest_class"), batch_size=21)
    batch, drawn = loader.batch(1, 0), loader.positions(1)
    twice = [i for i in range(21) if drawn[i] == 12]
    assert len(twice) > 1
    assert not torch.equal(batch.images_B3HW[twice[0]], batch.images_B3HW[twice[1]])


def test_a_partial_last_batch_is_kept_or_dropped(tree):
    config = settings(tree)
    assert [len(b.labels_B) for b in batches(config).iterate(1)] == [5, 5, 3]
    assert [len(b.labels_B) for b in batches(config, drop_last=True).iterate(1)] == [5, 5]
    with pytest.raises(ValueError, match="batch_size = 64 with drop_last: an epoch has 13 images"):
        batches(config, drop_last=True, batch_size=64)


def test_resident_and_streamed_evaluation_agree_and_shares_make_the_whole(tree):
    kept, streamed = (open_dataset(settings(tree, resident=r)) for r in ("always", "never"))
    whole = list(EvalBatches(kept.test, kept.config, 4))
    assert [len(y) for _, y in whole] == [4, 2]
    for replicas in (1, 2, 4):
        parts = [EvalBatches(streamed.test, streamed.config, 4, Replica(d, replicas)) for d in range(replicas)]
        images, labels = zip(*(pair for part in parts for pair in part), strict=True)
        assert torch.equal(torch.cat(images), torch.cat([x for x, _ in whole]))
        assert torch.equal(torch.cat(labels), torch.cat([y for _, y in whole]))
        assert [len(p) for p in parts] == [len(list(p)) for p in parts]


@pytest.mark.parametrize("config", SAMPLERS, ids=str)
def test_a_samplers_epoch_is_pure_complete_and_in_range(config):
    labels = np.repeat([2, 0, 1], [2, 7, 4])
    first, again = (build("sampler", config, labels, 3) for _ in range(2))
    again.draw(Progress(1, 4), 99)
    drawn = first.draw(Progress(2, 4), 7)
    assert drawn.dtype == np.int64
    assert len(drawn) == first.draws_per_epoch
    assert set(drawn.tolist()) <= set(range(13))
    assert np.array_equal(again.draw(Progress(2, 4), 7), drawn)
    assert not np.array_equal(first.draw(Progress(2, 4), 8), drawn)


@pytest.mark.parametrize("config", SAMPLERS, ids=str)
def test_draws_have_the_promised_class_probabilities(config):
    """15,400 draws: a share has a standard error below 0.0041, and 5 of these are allowed."""
    labels = np.repeat(np.arange(4), [10000, 4000, 1000, 400])
    sampler = build("sampler", config, labels, 4)
    progress = Progress(3, 5)
    share = np.bincount(labels[sampler.draw(progress, 1)], minlength=4) / sampler.draws_per_epoch
    assert np.abs(share - sampler.class_probabilities(progress)).max() < 0.02


def test_an_instance_balanced_epoch_is_a_permutation():
    labels = np.repeat(np.arange(3), COUNTS)
    sampler = build("sampler", InstanceBalanced.Config(), labels, 3)
    assert sorted(sampler.draw(Progress(1, 1), 5)) == list(range(13))


@pytest.mark.parametrize("form", ["class_aware", "per_draw_cycle"])
def test_cycles_show_every_image_of_a_class_before_any_again(form):
    labels = np.repeat(np.arange(3), COUNTS)
    sampler = build("sampler", ClassBalanced.Config(form=form, epoch="largest_class"), labels, 3)
    drawn = sampler.draw(Progress(1, 1), 5)
    for c, count in enumerate(COUNTS):
        of_class = drawn[labels[drawn] == c].tolist()
        for start in range(0, len(of_class) - count + 1, count):
            assert len(set(of_class[start : start + count])) == count


def test_a_sampler_refuses_an_empty_class():
    with pytest.raises(ValueError, match="at least 1 image of every class"):
        build("sampler", SquareRoot.Config(), np.array([0, 0, 2]), 3)
