"""Pretrained weights in training: what begins with them, what does not, and which files are refused before a start."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from experts.backbones import resnet_imagenet
from experts.backbones.resnet_imagenet import ResNetImageNet
from experts.data.dataset import open_dataset
from orchestration.config.compose import load_config
from orchestration.storage.exports import check_sources
from orchestration.storage.pretrained import import_weights
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

WORDS = ["dataset=digits_lt", "dataset.image_size=16", "backbone=resnet10", "engine.name=torch"]
FULL_WIDTH = "method.reduce_dimension=false"


@pytest.fixture(autouse=True)
def thin_stages(monkeypatch):
    """An eighth of the channels; names and number of blocks are those of the real networks."""
    monkeypatch.setattr(resnet_imagenet, "PLANES", (8, 16, 32, 64))
    monkeypatch.setattr(resnet_imagenet, "THIN_PLANES", (8, 16, 24, 48))


@pytest.fixture
def weights(tmp_path):
    """An imported ResNet-10 whose every number is unlike a fresh network's."""
    config = ResNetImageNet.Config(depth=10, split="whole")
    state = ResNetImageNet(config).late_stages(reduce_dimension=False).state_dict()
    generator = torch.Generator().manual_seed(1)
    torch.save({k: torch.rand(v.shape, generator=generator) + 0.5 for k, v in state.items()}, tmp_path / "net.pth")
    import_weights(tmp_path / "net.pth", tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def trainer_of(*words, stage="train"):
    config = load_config([*WORDS, *words])
    dataset = open_dataset(config.dataset)
    return StageTrainer(config, stage, dataset, Mesh(mesh_shape(config.method.num_experts, 1)))


def state_of(*words, stage="train"):
    trainer = trainer_of(*words, stage=stage)
    return {name: value.clone() for name, value in trainer.setup.model.state_dict().items()}


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_trunk_and_every_expert_begin_with_them_and_heads_do_not(precision, weights):
    words = ["method=ride", FULL_WIDTH, f"engine.precision={precision}"]
    found, fresh = state_of(*words, f"method.backbone_weights={weights}"), state_of(*words)
    pretrained, copied = load_file(weights), set()
    for name, value in found.items():
        words_of_name = name.split(".")
        whole_name = ".".join(words_of_name[1 if words_of_name[0] == "trunk" else 3 :])
        if whole_name in pretrained:
            assert torch.equal(value, pretrained[whole_name].to(value.dtype)), name
            copied.add(whole_name)
        else:
            assert words_of_name[2] == "head"
            assert torch.equal(value, fresh[name]), name
    assert copied == pretrained.keys()


def test_a_stage_that_starts_from_another_does_not_begin_with_them(weights):
    words = ["method=ride_h2t", f"method.backbone_weights={weights}"]
    found, fresh = state_of(*words, stage="h2t"), state_of("method=ride_h2t", stage="h2t")
    assert all(torch.equal(found[name], value) for name, value in fresh.items())


@pytest.mark.parametrize("stage", ["few", "student"])
def test_every_new_network_starts_from_pretrained_weights(stage, weights):
    """LFME's student, too, comes after other stages but not from their weights."""
    config = load_config([*WORDS, "method=lfme", f"method.backbone_weights={weights}"])
    assert config.method.starts_from(stage) is None
    if stage == "few":
        found = state_of("method=lfme", f"method.backbone_weights={weights}", stage=stage)
        conv = found["experts.expert_few.features.layer4.0.conv1.weight"]
        assert torch.equal(conv, load_file(weights)["layer4.0.conv1.weight"])


def test_a_step_with_a_rate_for_each_part_trains_from_them(weights):
    factors = [f"method.stages.train.lr_factors.{part}=0.1" for part in ("trunk", "features")]
    trainer = trainer_of("method=tade", FULL_WIDTH, f"method.backbone_weights={weights}", *factors)
    groups = Counter()
    for leaf in trainer.training.leaves:
        groups[leaf.lr_factor] += len(leaf.places)
    heads = sum(".head." in name for name, _ in trainer.setup.model.named_parameters())
    assert groups == {0.1: len(list(trainer.setup.model.parameters())) - heads, 1.0: heads}
    assert len(trainer.train(1).losses) == 1


def refused(*words):
    with pytest.raises(ValueError, match=r"^method\.backbone_weights: ") as error:
        check_sources(load_config([*WORDS, *words]))
    return str(error.value)


def test_a_file_that_fits_is_accepted_whatever_the_split(weights):
    for method in ("ride", "bbn", "ace", "lfme", "reslt"):
        check_sources(load_config([*WORDS, f"method={method}", FULL_WIDTH, f"method.backbone_weights={weights}"]))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["method=ride", "method.reduce_dimension=true"], "method.reduce_dimension = false"),
        (["method=ride", FULL_WIDTH, "backbone=resnet50"], "set backbone to the same"),
        (["method=ride", FULL_WIDTH, "backbone=resnet8"], "set backbone to the same"),
    ],
    ids=["thinner", "deeper", "of another family"],
)
def test_a_file_for_another_network_is_refused(words, part, weights):
    said = refused(*words, f"method.backbone_weights={weights}")
    assert str(weights) in said
    assert part in said
    assert "depth 10, cardinality 1" in said


def test_a_file_that_is_missing_damaged_or_not_imported_is_refused(weights, tmp_path):
    words = ["method=ride", FULL_WIDTH]
    said = refused(*words, f"method.backbone_weights={tmp_path}/none.safetensors")
    assert "no such file" in said and "expertail import-weights FILE none.safetensors" in said
    assert "not a whole safetensors file" in refused(*words, f"method.backbone_weights={tmp_path}/net.pth")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "not a whole safetensors file" in refused(*words, f"method.backbone_weights={weights}")


def test_weights_are_part_of_what_a_run_is():
    from orchestration.config.identity import difference, identity

    without, with_them = (load_config([*WORDS, *more]) for more in ([], ["method.backbone_weights=/a.safetensors"]))
    assert difference(identity(without), identity(with_them)) == ["method.backbone_weights: None -> /a.safetensors"]
