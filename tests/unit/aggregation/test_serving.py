import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from aggregation.ace import Ace
from aggregation.aggregator import MeanLogits, MeanProbabilities, Outputs, Weighted
from aggregation.serving import DESCRIPTION, TENSORS, TrainingData, _sha256, export_model, load_model
from experts.augmentation.stack import prepare_eval
from experts.backbones.resnet_cifar import ResNetCifar
from experts.class_groups import GroupRule
from experts.data.config import DatasetConfig
from experts.data.decode import frame
from experts.ensemble import EnsembleConfig, build_ensemble
from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead
from experts.precision import faster_memory_format

NAMES = ("expert0", "expert1")
COUNTS = (500, 50, 20, 5)
GREY = DatasetConfig(name="grey", source="digits", image_size=32, mean=(0.2, 0.2, 0.2), std=(0.3, 0.3, 0.3))
COLOUR = DatasetConfig(name="colour", source="cifar10", image_size=32)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(head=CosineHead, names=NAMES):
    return EnsembleConfig(
        ResNetCifar.Config(depth=8), head.Config(), num_classes=4, expert_names=names, reduce_dimension=True
    )


def ensemble(head=CosineHead):
    torch.manual_seed(0)
    built = build_ensemble(config_of(head), seed=1)
    built(torch.randn(8, 3, 16, 16))  # running statistics that are not those of a new network
    return built.eval()


def export(folder, dataset=GREY, image_shape=(8, 8, 1), aggregator=None, head=CosineHead, names=NAMES, state=None):
    data = TrainingData(dataset=dataset, class_names=("a", "b", "c", "d"), counts=COUNTS, image_shape=image_shape)
    state = state or ensemble().state_dict()
    export_model(folder, state, config_of(head, names), aggregator or MeanLogits.Config(), data)
    return folder


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("aggregator", "config", "head"),
    [
        (MeanLogits, MeanLogits.Config(), CosineHead),
        (MeanProbabilities, MeanProbabilities.Config(), CosineHead),
        (Weighted, Weighted.Config(weights={"expert0": 0.8, "expert1": 0.2}), LinearHead),
        (Ace, Ace.Config(groups=GroupRule(rule="equal")), LinearHead),
    ],
)
def test_served_probabilities_are_those_of_evaluation(tmp_path, aggregator, config, head):
    images, network = pixels(5, 8, 8), ensemble(head)
    folder = export(tmp_path / "m", aggregator=config, head=head, state=network.state_dict())
    network.to(memory_format=faster_memory_format(torch.device("cpu")))
    found = load_model(folder).predict(images)
    prepared = prepare_eval(frame(torch.from_numpy(images)[:, None], 32), GREY)
    rule = aggregator(config, torch.tensor(COUNTS), NAMES)
    numbers_EK = torch.stack([rule.describe(expert) for expert in network.experts.values()])
    with torch.no_grad():
        expected = rule(Outputs(network(prepared), numbers_EK)).softmax(1)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.numpy())
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_colour_images_and_batches(tmp_path):
    model = load_model(export(tmp_path / "m", COLOUR, (32, 32, 3)))
    images = pixels(5, 32, 32, 3)
    whole = model.predict(images)
    np.testing.assert_allclose(model.predict(images, batch_size=2), whole, rtol=1e-5)
    np.testing.assert_allclose(model.predict(images[0]), whole[:1], rtol=1e-5)
    assert model.predict(images[:0]).shape == (0, 4)
    grey = np.repeat(pixels(2, 32, 32)[..., None], 3, axis=-1)
    np.testing.assert_allclose(model.predict(grey[..., 0]), model.predict(grey), rtol=1e-5)


def test_one_grey_image_is_a_batch_of_one(tmp_path):
    model = load_model(export(tmp_path / "m"))
    image = pixels(8, 8)
    expected = model.predict(image[None])
    for form in (image, image[..., None], image[None, ..., None]):
        np.testing.assert_array_equal(model.predict(form), expected)


def test_images_of_any_size_where_the_dataset_has_no_one_size(tmp_path):
    model = load_model(export(tmp_path / "m", COLOUR, None))
    assert model.predict(pixels(2, 40, 60, 3)).shape == (2, 4)
    assert model.predict(pixels(1, 20, 10, 3)).shape == (1, 4)


def test_a_picture_with_its_channels_first_is_not_taken_for_three_grey_ones(tmp_path):
    model = load_model(export(tmp_path / "m", COLOUR, None))
    with pytest.raises(ValueError, match=r"found shape \[3, 40, 60\]: one picture with its channels first, or"):
        model.predict(pixels(3, 40, 60))
    assert model.predict(pixels(3, 40, 60, 1)).shape == (3, 4)


def test_pixels_of_any_size_and_colours_are_those_of_evaluation(tmp_path):
    model = load_model(export(tmp_path / "m"))
    tall = pixels(1, 90, 40)
    squared = frame(torch.from_numpy(tall), 32).numpy()
    np.testing.assert_array_equal(model.predict(tall), model.predict(squared))
    colour = pixels(2, 8, 8, 3)
    luma = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in colour])
    np.testing.assert_allclose(model.predict(colour), model.predict(luma), rtol=1e-3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8), np.float32), "found type float32; needed pixels"),
        (np.full((2, 8, 8), 256), "found numbers of 256 to 256"),
        (np.zeros((2, 8, 8, 5), np.uint8), r"found shape \[2, 8, 8, 5\]"),
        (np.zeros((2, 0, 8), np.uint8), r"found shape \[2, 0, 8\]"),
        (np.zeros((2, 2, 8, 8, 1), np.uint8), r"found shape \[2, 2, 8, 8, 1\]"),
        (np.zeros(5, np.uint8), r"found shape \[5\]"),
    ],
)
def test_other_images_are_refused(tmp_path, images, message):
    with pytest.raises(ValueError, match=message):
        load_model(export(tmp_path / "m")).predict(images)


def test_float64_weights_are_served_in_float32_and_the_folder_is_replaced(tmp_path):
    folder = export(tmp_path / "export" / "best", state=ensemble().double().state_dict())
    assert {t.dtype for t in load_file(folder / TENSORS).values()} == {torch.float32, torch.int64}
    export(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["best"]
    assert sorted(p.name for p in folder.iterdir()) == [DESCRIPTION, TENSORS]


def rewrite(folder, **fields):
    description = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(description | fields))


def retensor(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    rewrite(folder, tensors_sha256=_sha256(folder / TENSORS))


def flip_a_byte(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-100] ^= 1
    (folder / TENSORS).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, r"model\.safetensors: damaged: its SHA-256"),
        (lambda f: (f / TENSORS).unlink(), r"model\.safetensors: missing"),
        (lambda f: (f / DESCRIPTION).unlink(), r"model\.json: cannot be read"),
        (lambda f: (f / DESCRIPTION).write_text("{"), r"model\.json: damaged, not valid JSON"),
        (lambda f: rewrite(f, format=1), r"model\.json: format 1, this version reads 2"),
        (lambda f: rewrite(f, num_classes="x"), r"model\.json: damaged: num_classes"),
        (lambda f: rewrite(f, num_classes=5), "4 class_names and 4 counts for num_classes = 5"),
        (lambda f: rewrite(f, surprise=1), "damaged: surprise"),
        (lambda f: rewrite(f, backbone={"name": "nope"}), "no model is called 'nope'"),
        (lambda f: retensor(f, lambda t: t.pop("trunk.conv1.weight")), "trunk.conv1.weight is missing"),
        (lambda f: retensor(f, lambda t: t.update(extra=torch.zeros(1))), "extra is unknown"),
        (
            lambda f: retensor(f, lambda t: t.update({"trunk.bn1.bias": torch.zeros(3)})),
            r"trunk.bn1.bias is \[3\], needed \[16\]",
        ),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path, damage, message):
    folder = export(tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_an_ensemble_that_could_not_be_served_is_not_exported(tmp_path):
    export(tmp_path / "m")
    before = (tmp_path / "m" / TENSORS).read_bytes()
    with pytest.raises(ValueError, match=r"expert2.* is missing"):
        export(tmp_path / "m", names=(*NAMES, "expert2"))
    assert (tmp_path / "m" / TENSORS).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
