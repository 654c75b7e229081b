"""Weights pretrained elsewhere: from a PyTorch file to safetensors, and from there into every expert."""

from __future__ import annotations

import os
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experts.backbones import resnet_imagenet
from experts.backbones.resnet_cifar import ResNetCifar
from experts.backbones.resnet_imagenet import ResNetImageNet
from experts.ensemble import EnsembleConfig, build_ensemble
from experts.heads.linear import LinearHead
from orchestration.storage.pretrained import import_weights, load_pretrained


@pytest.fixture(autouse=True)
def thin_stages(monkeypatch):
    """A quarter of the channels; names and number of blocks are those of the real networks."""
    monkeypatch.setattr(resnet_imagenet, "PLANES", (16, 32, 64, 128))
    monkeypatch.setattr(resnet_imagenet, "THIN_PLANES", (16, 32, 48, 96))


def network(depth=10, cardinality=1):
    """A whole network's state dict as torchvision writes it, every number different from a fresh network's."""
    config = ResNetImageNet.Config(depth=depth, cardinality=cardinality, split="whole")
    generator = torch.Generator().manual_seed(1)
    state = ResNetImageNet(config).late_stages(reduce_dimension=False).state_dict()
    state = {
        name: torch.tensor(77) if name.endswith("tracked") else torch.rand(value.shape, generator=generator) + 0.5
        for name, value in state.items()
    }
    features = state["layer4.0.bn2.weight"].numel() * (1 if depth == 10 else 4)
    return OrderedDict(state | {"fc.weight": torch.rand(7, features), "fc.bias": torch.rand(7)})


def caffe(state):
    """Files converted from Caffe know no counters."""
    return OrderedDict((name, value) for name, value in state.items() if not name.endswith("num_batches_tracked"))


@pytest.fixture
def files(tmp_path):
    return tmp_path / "net.pth", tmp_path / "there" / "net.safetensors"


def imported(files, state):
    source, target = files
    torch.save(state, source)
    return import_weights(source, target)


def ensemble(num_experts=3, only=None, reduce_dimension=False, **options):
    return build_ensemble(
        EnsembleConfig(
            ResNetImageNet.Config(**{"depth": 10} | options),
            LinearHead.Config(),
            num_classes=5,
            expert_names=[f"expert{k}" for k in range(num_experts)],
            reduce_dimension=reduce_dimension,
        ),
        seed=0,
        only=only,
    )


def snapshot(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize(("depth", "cardinality"), [(10, 1), (50, 1), (50, 32), (101, 32), (152, 1)])
def test_depth_and_cardinality_are_read_from_the_file_and_kept(files, depth, cardinality):
    state = network(depth, cardinality)
    found = imported(files, state)
    assert (found.depth, found.cardinality) == (depth, cardinality)
    with safe_open(files[1], framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["depth"], metadata["cardinality"]) == (str(depth), str(cardinality))
    assert metadata["source"] == "net.pth"
    kept = load_file(files[1])
    assert kept.keys() == state.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(kept[name], state[name]) for name in kept)


def test_what_was_imported_is_told(files):
    state = network()
    text = str(imported(files, caffe(state)))
    weights = [v for name, v in state.items() if not name.startswith("fc.") and "running" not in name and v.ndim]
    assert text.startswith(f"ResNet-10, {sum(v.numel() for v in weights):,} parameters")
    assert "fc.weight, fc.bias" in text
    assert "12 BatchNorm counters" in text


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"module." + name: value for name, value in state.items()},
        lambda state: {"epoch": 3, "state_dict": {"module." + name: value for name, value in state.items()}},
        lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {}, "groups": [1]}},
        lambda state: {name: value.half() if value.ndim else value for name, value in state.items()},
    ],
    ids=["plain", "prefix", "state_dict", "model", "half"],
)
def test_usual_wrappings_are_taken_off(files, wrap):
    state = network()
    imported(files, wrap(state))
    kept = load_file(files[1])
    assert kept["conv1.weight"].dtype == torch.float32
    torch.testing.assert_close(kept["layer4.0.conv2.weight"], state["layer4.0.conv2.weight"], atol=1e-3, rtol=0)


def test_the_trunk_and_each_expert_get_their_part(files):
    state = network()
    imported(files, state)
    net = ensemble()
    heads = {name: expert.head.weight.clone() for name, expert in net.experts.items()}
    assert load_pretrained(net, files[1]) == []
    for name, value in net.trunk.state_dict().items():
        assert torch.equal(value, state[name]), name
    for expert, module in net.experts.items():
        for name, value in module.features.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert torch.equal(module.head.weight, heads[expert])
    first, second = (net.experts[name].features.layer4[0].conv1.weight for name in ("expert0", "expert1"))
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("split", ["ride", "last_stage", "last_block", "whole", "branches"])
def test_every_cut_computes_what_the_network_computed(files, split):
    """Compared with the cut "whole" of the same weights; ResLT's branch comes after that."""
    imported(files, network())
    whole, net = ensemble(1, split="whole").eval(), ensemble(2, split=split).eval()
    load_pretrained(whole, files[1])
    left = load_pretrained(net, files[1])
    images = torch.randn(2, 3, 32, 32)
    expected = whole.experts["expert0"].features(images)
    if split == "branches":
        assert {name.rsplit(".", 2)[-2] for name in left} == {"conv", "bn"}
        torch.testing.assert_close(net.trunk(images).mean(dim=(2, 3)), expected)
    else:
        assert left == []
        for expert in net.experts.values():
            torch.testing.assert_close(expert.features(net.trunk(images)), expected)


def test_missing_counters_stay_fresh_and_are_named(files):
    imported(files, caffe(network()))
    net = ensemble(1)
    left = load_pretrained(net, files[1])
    assert len(left) == 12
    assert all(name.endswith("num_batches_tracked") for name in left)
    assert {int(v) for name, v in net.state_dict().items() if name.endswith("tracked")} == {0}


def test_the_extra_layer_and_experts_on_request_stay_as_drawn(files):
    imported(files, network())
    net = ensemble(1, split="whole", extra_layer=True)
    assert load_pretrained(net, files[1]) == [f"experts.expert0.features.fc_add.{name}" for name in ("weight", "bias")]
    net = ensemble(2, split="last_block")
    before = snapshot(net)
    left = load_pretrained(net, files[1], experts=False)
    after = net.state_dict()
    assert {name for name in after if torch.equal(after[name], before[name])} >= set(left)
    assert not torch.equal(after["trunk.conv1.weight"], before["trunk.conv1.weight"])
    assert all(name.startswith("experts.") for name in left)


def test_a_worker_that_holds_one_expert_gets_the_same_weights(files):
    imported(files, network())
    everything, one = ensemble(), ensemble(only=["expert1"])
    for net in (everything, one):
        load_pretrained(net, files[1])
    assert all(torch.equal(value, everything.state_dict()[name]) for name, value in one.state_dict().items())


def test_other_float_types_are_filled(files):
    state = network()
    imported(files, state)
    net = ensemble(1).double()
    load_pretrained(net, files[1])
    assert torch.equal(net.trunk.conv1.weight, state["conv1.weight"].double())


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: without(network(), "layer3.0.bn1.weight"), ["missing: layer3.0.bn1.weight", "depth 10"]),
        (lambda: network() | {"conv1.bias": torch.zeros(16)}, ["unknown: conv1.bias"]),
        (
            lambda: network() | {"conv1.weight": torch.zeros(16, 1, 7, 7)},
            ["of another shape: conv1.weight", "found [16, 1, 7, 7], needed [16, 3, 7, 7]"],
        ),
        (
            lambda: without(network(), "bn1.bias") | {"extra": torch.zeros(1), "bn1.weight": torch.zeros(3)},
            ["missing: bn1.bias", "unknown: extra", "bn1.weight (found [3], needed [16])"],
        ),
        (lambda: network() | {"bn1.bias": torch.full((16,), float("nan"))}, ["not finite: bn1.bias"]),
        (lambda: {"features.0.weight": torch.zeros(2)}, ["0/0/0/0 residual blocks", "ResNet-10, 50, 101 or 152"]),
        (
            lambda: network() | {"layer1.1.conv1.weight": torch.zeros(16, 16, 3, 3)},
            ["2/1/1/1 residual blocks", "ResNet-10, 50, 101 or 152"],
        ),
        (lambda: {"epoch": 3, "lr": 0.1}, ["found epoch, lr", "needed names with tensors"]),
        (lambda: [1, 2], ["found list"]),
        (lambda: {}, ["found nothing"]),
        (lambda: {"a": network(), "b": network()}, ["found a, b", "one such mapping"]),
    ],
    ids=[
        "missing",
        "unknown",
        "shape",
        "three-at-once",
        "nan",
        "other",
        "resnet18",
        "no-tensors",
        "list",
        "empty",
        "two",
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_message(files, state, words):
    with pytest.raises(ValueError, match=r"net\.pth") as refusal:
        imported(files, state())
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not files[1].parent.exists() or not os.listdir(files[1].parent)


def test_many_misfits_are_counted(files):
    state = {name: value for name, value in network().items() if not name.startswith(("layer3", "layer4.0.bn"))}
    with pytest.raises(ValueError, match=r"0/1 residual blocks"):
        imported(files, state)
    state = {name: value for name, value in network().items() if not name.startswith("layer4.0.bn")}
    with pytest.raises(ValueError, match=r"missing: layer4.0.bn1.weight, .* and 3 more"):
        imported(files, state)


class Planted:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_objects_are_never_unpickled(files, tmp_path):
    with pytest.raises(ValueError, match=r"net.pth: not a PyTorch file of tensors alone .* save its state_dict"):
        imported(files, {"state_dict": Planted(tmp_path / "planted")})
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut"])
def test_other_files_are_refused(files, content):
    files[0].write_bytes(content)
    with pytest.raises(ValueError, match=r"net.pth: not a PyTorch file"):
        import_weights(*files)


def test_missing_files_and_other_targets_are_refused(files):
    with pytest.raises(ValueError, match=r"net.pth: no such file"):
        import_weights(*files)
    with pytest.raises(ValueError, match=r"needed a name that ends in .safetensors"):
        import_weights(files[0], files[0])
    with pytest.raises(ValueError, match=r"net.safetensors: no such file"):
        load_pretrained(ensemble(1), files[1])


def test_an_import_replaces_the_old_file_and_leaves_nothing_else(files):
    imported(files, network())
    old = files[1].read_bytes()
    imported(files, network(50))
    assert files[1].read_bytes() != old
    assert os.listdir(files[1].parent) == ["net.safetensors"]


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: ensemble(1, depth=50), ["not in the file: trunk.layer1.0.conv3.weight", "depth 10, cardinality 1"]),
        (
            lambda: ensemble(1, reduce_dimension=True),
            [
                "of another shape: experts.expert0.features.layer3.0.conv1.weight (found [64, 32, 3, 3], needed [48",
                "method.reduce_dimension = false",
            ],
        ),
        (
            lambda: build_ensemble(
                EnsembleConfig(
                    ResNetCifar.Config(depth=8), LinearHead.Config(),
                    num_classes=5, expert_names=["a"], reduce_dimension=False,
                ),
                seed=0,
            ),
            ["not in the ensemble: layer2.0.downsample.0.weight", "trunk.conv1.weight (found [16, 3, 7, 7], needed"],
        ),
    ],
    ids=["depth", "thin", "cifar"],
)  # fmt: skip
def test_ensembles_that_do_not_fit_are_refused_and_stay_as_they_were(files, net, words):
    imported(files, network())
    net = net()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"net\.safetensors: does not fit") as refusal:
        load_pretrained(net, files[1])
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_damaged_and_foreign_safetensors_are_refused(files):
    imported(files, network())
    content = files[1].read_bytes()
    files[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"not a whole safetensors file .* import the weights again"):
        load_pretrained(ensemble(1), files[1])
    save_file({"x": torch.zeros(1)}, files[1])
    with pytest.raises(ValueError, match=r"found model None, format None; needed 'resnet_imagenet'"):
        load_pretrained(ensemble(1), files[1])
