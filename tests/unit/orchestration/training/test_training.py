"""Second stages on one worker: what they begin with, what moves, and what a fit keeps in memory."""

from __future__ import annotations

import functools
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from aggregation.metrics import Scores
from experts.data.dataset import open_dataset
from experts.ensemble import part_of
from orchestration.config.compose import load_config
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer
from tests.second_stages import HOST, WITH_STEPS, second_stages

SMALL = ["dataset.image_size=8", "dataset.augment.crop_padding=1", "method.stages.train.batch_size=50"]
ONE_PROCESS = ["engine.name=torch", "engine.threads=1"]


def trainer_of(stage, *words, host=HOST):
    config = load_config([*host, *SMALL, *ONE_PROCESS, *words])
    return StageTrainer(config, stage, opened(config.dataset), Mesh(mesh_shape(config.method.num_experts, 1)))


@functools.cache
def opened(config):
    return open_dataset(config)


def begun(stage, folder, *words, epochs=1, more=""):
    """Build a second stage and give it the weights of the saved host."""
    trainer = trainer_of(stage, *second_stages([stage], epochs, more=more), *words)
    trainer.start_from(str(folder))
    return trainer


def tensors(trainer):
    return {name: value.clone() for name, value in trainer.setup.model.state_dict().items()}


def top1(trainer):
    state, _ = trainer.evaluate("test")
    return Scores.from_state(state).result(trainer.setup.counts_C.tolist(), None)["members"]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Train RIDE with linear heads for an epoch: trainer, and the folder with its weights and momentum."""
    trainer, folder = trainer_of("train"), tmp_path_factory.mktemp("host")
    trainer.train(9)
    trainer.save(str(folder))
    assert len(list(folder.glob("*.momentum.safetensors"))) == 4
    return trainer, folder


@pytest.mark.parametrize("stage", ["crt", "cosine_crt"])
def test_reinit_gives_heads_unlike_any_before_and_keeps_the_rest_bit_for_bit(stage, host):
    """New heads are not the host's first ones either: its features grew from those."""
    trainer, folder = host
    before, now = tensors(trainer), tensors(begun(stage, folder))
    first = tensors(trainer_of("train"))
    for name, value in now.items():
        if part_of(name) != "heads":
            assert torch.equal(value, before[name]), name
        elif stage == "crt":
            assert not torch.isclose(value, before[name], atol=1e-6).any(), name
            assert not value.any() or not torch.isclose(value, first[name], atol=1e-6).any(), name
    heads = [value for name, value in now.items() if name.endswith("head.weight")]
    assert len(heads) == 3
    assert not torch.equal(heads[0], heads[1])
    again = tensors(begun(stage, folder))
    assert all(torch.equal(again[name], value) for name, value in now.items())


@pytest.mark.parametrize("stage", ["lws", "dr"])
def test_what_goes_on_from_a_trained_head_scores_as_the_host_before_its_first_step(stage, host):
    """Scales begin at 1, and 1 x is x: every number of the evaluation is the same, not only the accuracy."""
    trainer, folder = host
    second = begun(stage, folder)
    scales = [value for name, value in tensors(second).items() if part_of(name) == "calibration"]
    assert len(scales) == (3 if stage == "lws" else 0)
    assert all(torch.equal(value, torch.ones(10)) for value in scales)
    assert top1(second) == top1(trainer)


def test_disalign_begins_as_the_host_in_the_papers_form_and_scales_each_image_in_the_published_one(host):
    trainer, folder = host
    expected = top1(trainer)["expert0"]
    for form, equal in (("paper", True), ("published", False)):
        found = top1(begun("disalign", folder, f"method.stages.disalign.calibration.form={form}"))["expert0"]
        assert found["top1"] == expected["top1"]  # (1 + s) z orders the classes of an image as z does
        assert (abs(found["nll"] - expected["nll"]) < 1e-6) == equal


@pytest.mark.parametrize("statistics", ["train", "eval"])
@pytest.mark.parametrize("stage", WITH_STEPS)
def test_frozen_weights_never_move_and_their_statistics_do_as_the_stage_says(stage, statistics, host):
    _, folder = host
    second = begun(stage, folder, f"method.stages.{stage}.frozen_batchnorm={statistics}")
    learns = {"crt": "heads", "cosine_crt": "heads", "dr": "heads", "lws": "calibration", "disalign": "calibration"}
    before, parameters = tensors(second), dict(second.setup.model.named_parameters())
    second.train(3)
    for name, value in tensors(second).items():
        moves = part_of(name) == learns[stage] if name in parameters else statistics == "train"
        assert torch.equal(value, before[name]) != moves, name
    moving = second.training.engine.momentum()
    assert {part_of(name) for name in moving} == {learns[stage]}


@pytest.mark.parametrize("stage", ["dr", "lws"])
def test_no_momentum_of_the_host_reaches_a_second_stage(stage, host, tmp_path):
    """The same steps from a folder with the host's momentum and from one without it."""
    _, folder = host
    for path in folder.glob("*.safetensors"):
        if ".momentum." not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    ours, theirs = begun(stage, folder), begun(stage, tmp_path)
    assert ours.training.engine.momentum() == {}
    assert ours.train(3).losses == theirs.train(3).losses
    expected = tensors(theirs)
    assert all(torch.equal(value, expected[name]) for name, value in tensors(ours).items())


def test_a_stage_that_is_built_from_its_checkpoint_goes_on_bitwise(host, tmp_path):
    """In mid-epoch, for every kind of second stage with steps; statistics and momentum come from the checkpoint."""
    _, folder = host
    for stage in WITH_STEPS:
        whole = begun(stage, folder)
        whole.train(9)
        part, saved = begun(stage, folder), tmp_path / stage
        first = part.train(4).losses
        saved.mkdir()
        part.save(str(saved))
        later = trainer_of(stage, *second_stages([stage]))
        later.load(str(saved), part.state())
        assert len(first + later.train(9).losses) == 9
        expected = tensors(whole)
        assert all(torch.equal(value, expected[name]) for name, value in tensors(later).items()), stage


# Fits

MANY = ["dataset.max_per_class=120", "dataset.imbalance_ratio=1.5", "run.evaluation_batch_size=64"]


class Watch:
    """Counts the images that pass the trunk and those of every expert, and the bytes of features that live at once."""

    def __init__(self, trainer):
        self.images, self.experts, self.most = 0, 0, 0
        self._alive = weakref.WeakSet()
        trainer.setup.model.trunk.register_forward_hook(self._trunk)
        for expert in trainer.setup.model.members():
            expert.features.register_forward_hook(self._features)

    def _trunk(self, module, inputs, output):
        self.images += len(output)

    def _features(self, module, inputs, output):
        self.experts += len(output)
        self._alive.add(output)
        self.most = max(self.most, sum(one.nbytes for one in self._alive))


@pytest.mark.parametrize("stage", ["ncm", "tau"])
def test_a_fit_keeps_features_only_within_resident_mib_and_finds_the_same_either_way(stage, host):
    """Without room the trunk sees every image in every pass: two for each expert's class means, one per candidate.

    Each expert computes no features for the passes of another, but in the first, which tries to keep them all.
    """
    _, folder = host
    found = {}
    for mib in (0, 64):
        # Images stay in memory: they come from an array.
        trainer = begun(stage, folder, f"dataset.resident_mib={mib}", "dataset.val_per_class=20", *MANY)
        watch = Watch(trainer)
        found[mib] = trainer.fit(), tensors(trainer)
        dataset = trainer.setup.dataset
        images, passes = (len(dataset.train.labels), 6) if stage == "ncm" else (len(dataset.val.labels), 21)
        assert images > 3 * 64
        of_batch, of_split = 3 * 48 * 4 * 64, 3 * 48 * 4 * images
        if mib:
            assert (watch.images, watch.experts, watch.most) == (images, 3 * images, of_split)
        else:
            assert watch.images == passes * images
            assert watch.experts == (3 + 5 if stage == "ncm" else 3 * passes) * images
            assert watch.most <= 2 * of_batch  # the new batch comes before the old one goes
    assert found[0][0] == found[64][0]
    assert all(torch.equal(value, found[64][1][name]) for name, value in found[0][1].items())


def test_class_means_are_those_of_the_images_as_evaluation_sees_them(host):
    """The means, by hand from the host's features of all training images."""
    trainer, folder = host
    fitted = begun("ncm", folder)
    assert fitted.fit() == {}
    images = open_dataset(trainer.setup.config.dataset)
    from experts.eval_batches import EvalBatches

    batches = list(EvalBatches(images.train_as_evaluated(), images.config, 1000))
    (pixels, labels), model = batches[0], trainer.setup.model.eval()
    assert len(batches) == 1
    with torch.no_grad():
        for expert, features in zip(fitted.setup.model.members(), model.features(pixels), strict=True):
            rows = features.double().numpy()
            rows = rows - rows.mean(axis=0)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            means = np.stack([rows[labels.numpy() == c].mean(axis=0) for c in range(10)])
            np.testing.assert_allclose(expert.head.mean_CD.numpy(), means, atol=1e-6)


def test_a_number_is_chosen_on_validation_and_without_one_the_published_number_holds(host):
    _, folder = host
    chosen = begun("tau", folder, "dataset.val_per_class=10").fit()
    (choice,) = chosen["choices"]
    best = max(value for _, value in choice["tried"])
    assert choice["split"] == "val"
    assert chosen["values"]["head"]["gamma"] == next(n for n, value in choice["tried"] if value == best)
    assert len(choice["tried"]) == 21
    trainer = begun("tau", folder)
    (choice,) = trainer.fit()["choices"]
    assert (choice["split"], choice["value"], choice["tried"]) == (None, 0.7, ())
    assert choice["origin"]
    assert [expert.head.value for expert in trainer.setup.model.members()] == [0.7] * 3


def test_a_fit_with_a_class_without_an_image_names_it(host, monkeypatch):
    """No data set opens with an empty class; a fit says it all the same."""
    _, folder = host
    trainer = begun("ncm", folder)
    store = trainer.setup.dataset.train_as_evaluated()
    store = replace(store, labels=np.where(store.labels == 9, 8, store.labels))
    monkeypatch.setattr(type(trainer.setup.dataset), "train_as_evaluated", lambda dataset: store)
    with pytest.raises(ValueError, match="stage ncm: head 'ncm': 1 of 10 classes") as error:
        trainer.fit()
    assert "class 9" in str(error.value)


def test_weights_are_the_files_weights(host):
    """`begun` must read the folder, or the tests above compare a host with itself."""
    found = tensors(begun("dr", host[1]))
    assert all(torch.equal(value, found[name]) for name, value in load_file(host[1] / "trunk.safetensors").items())
