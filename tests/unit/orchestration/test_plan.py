"""The plan's numbers, against sums one can do by hand."""

from __future__ import annotations

import pytest
import torch

from experts.data.dataset import open_dataset
from experts.ensemble import build_ensemble
from orchestration.compose import load_config
from orchestration.placement import expected_counts, plan
from orchestration.plan import describe

CIFAR = ["dataset=cifar100_lt"]


def exchanges(found):
    return {x.what.split(",")[0]: (x.among, x.payload, x.sent) for x in found.exchanges}


def test_ride_on_cifar100_packed():
    """RIDE-3 ResNet-32: the counts of 100 classes at ratio 100 sum to 10,847; 84 batches of 128 and one of 95."""
    config = load_config(CIFAR)
    found = plan(config)
    model = build_ensemble(
        config.backbone, config.method.head, num_classes=100, expert_names=config.method.expert_names,
        reduce_dimension=True, seed=0,
    )  # fmt: skip
    assert found.whole("parameters") == sum(p.numel() for p in model.parameters())
    assert found.trunk.multiply_adds == 442_368 + 23_592_960
    assert found.exchanges == () and found.repeated == 0
    (stage,) = found.stages
    assert (sum(found.counts), stage.steps_per_epoch, stage.last_batch) == (10_847, 85, 95)
    assert found.experts_on(0) == ("expert0", "expert1", "expert2")


def test_bytes_and_repeated_work_of_three_slots_and_two_replicas():
    """64 images of 128 on each replica; 64 x 100 logits of 4 bytes to 2 partners. A ring all-reduce over n workers
    sends 2 (n - 1) / n of the buffer. BatchNorm: 2 D + 1 numbers a layer forward, 2 D backward."""
    found = plan(load_config([*CIFAR, "cluster.workers=6", "engine.name=torch"]))
    trunk, expert = 4 * found.trunk.parameters, 4 * found.expert.parameters
    sent = exchanges(found)
    assert sent["logits"] == (3, 25_600, 51_200)
    assert sent["trunk gradient"] == (6, trunk, round(2 * trunk * 5 / 6))
    assert sent["expert gradients"] == (2, expert, expert)
    layers, channels = 11 + 20, 11 * 16 + 10 * 24 + 10 * 48
    forward, backward = 4 * (2 * channels + layers), 4 * 2 * channels
    assert sent[f"BatchNorm statistics of {layers} layers"] == (2, forward + backward, forward + backward)
    packed = found.trunk.multiply_adds + 3 * found.expert.multiply_adds
    assert found.repeated == pytest.approx(2 * found.trunk.multiply_adds / packed)
    assert [found.experts_on(rank) for rank in (0, 1, 2, 5)] == [("expert0",)] * 2 + [("expert1",), ("expert2",)]


def test_what_is_not_exchanged_is_not_listed():
    assert set(exchanges(plan(load_config(["cluster.workers=3", "engine.name=torch"])))) == {"logits", "trunk gradient"}
    words = ["method=ce", "cluster.workers=2", "engine.name=torch", "engine.sync_batchnorm=false"]
    assert set(exchanges(plan(load_config(words)))) == {"trunk gradient", "expert gradients"}


def test_precision_decides_the_bytes():
    def logits(*words):
        return exchanges(plan(load_config(["cluster.workers=3", *words])))["logits"][1]

    assert logits("engine.precision=float64") == 2 * logits()
    assert logits("engine.precision=autocast") == logits()  # a cosine head leaves autocast
    linear = ["method=ce", "method.num_experts=3"]
    assert logits("engine.precision=autocast", *linear) == logits(*linear) // 2


def test_momentum_and_master_weights_are_shared_out_by_zero():
    """torch: weights, gradients, momentum. ZeRO over n: weights, gradients (all, or 1 / n), 2 / n."""
    words = ["method=ce", "cluster.workers=4"]
    total = 4 * plan(load_config(words)).whole("parameters")
    engines = ("engine.name=torch", "engine.zero_stage=2", "")
    memory = {engine: plan(load_config([*words, *engine.split()])).memory for engine in engines}
    assert memory == {"engine.name=torch": 3 * total, "engine.zero_stage=2": 1.75 * total, "": 2.5 * total}


@pytest.mark.parametrize(
    "word", ["seed=0", "dataset.val_per_class=5", "dataset.balanced=true", "dataset.max_per_class=null"]
)
def test_the_counts_of_digits_are_those_that_opening_finds(word):
    config = load_config([word])
    assert expected_counts(config, 10).tolist() == open_dataset(config.dataset).counts_C.tolist()


def test_steps_follow_the_sampler_and_drop_last():
    longer = ["method.stages.train.sampler={name:class_balanced,epoch:largest_class}"]
    assert plan(load_config(longer)).stages[0].images_per_epoch == 1200
    dropped = plan(load_config(["method.stages.train.drop_last=true"])).stages[0]
    assert (dropped.images_per_epoch, dropped.steps_per_epoch, dropped.last_batch) == (384, 6, 64)


def test_uneven_and_empty_shares_are_shown():
    words = ["cluster.workers=9", "method.stages.train.batch_size=2"]
    found = plan(load_config(words))
    assert found.stages[0].shares == (1, 1, 0)
    assert "1 replicas have no image" in describe(load_config(words))


def test_what_only_the_data_can_say_is_left_open():
    words = ["dataset=image_folder_lt", "schedule=ride_cifar100_lt", "cluster.workers=3", "dataset.root=/not/there"]
    text = describe(load_config(words))
    assert "dataset.num_classes=..." in text and "n/a" in text and "steps per epoch are known when the data" in text
    told = describe(load_config([*words, "dataset.num_classes=8142"]))
    assert "n/a" not in told and "8,142" in told


def test_the_text_tells_an_operator_what_will_happen():
    text = describe(
        load_config([*CIFAR, "cluster.workers=6", "run.dir=/data/runs", "tracking.uri=http://me:pw@host:5000"])
    )
    for words in (
        "ride: 3 experts on one trunk, resnet_cifar 32", "100 classes, 10,847 training images, 500 to 5 a class",
        "6 workers = 3 expert slots x 2 replicas", "0.02 to 0.08 over epochs 1-4, 0.1 in epochs 5-160, 0.001 in epochs",
        "85 steps an epoch", "17,000 steps in all", "95 images, 47 to 48 on each replica", "logits, all-gather",
        "published, top-1 in %: all 48.6", "/data/runs/ride-cifar100_lt-s0 (new)", "http://host:5000",
    ):  # fmt: skip
        assert words in text, words
    assert "me:pw" not in text
    assert all(len(line) < 200 and line == line.rstrip() for line in text.splitlines())


def test_a_shortened_stage_is_told_what_it_never_reaches():
    text = describe(load_config([*CIFAR, "method.stages.train.epochs=170"]))
    assert "NOTE: the stage ends before the learning rate's drop after epoch 180\n" in text


def test_many_workers_are_cut_short():
    assert "... and 14 more" in describe(load_config([*CIFAR, "cluster.workers=30"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster.workers=4"], "cluster.workers = 4 does not fit"),
        (["dataset.num_classes=11"], "dataset.num_classes = 11: digits has 10 classes"),
        (["dataset.max_per_class=150"], "needs 150 images of class"),
        (["method.stages.train.drop_last=true", "method.stages.train.batch_size=500"], "no whole batch"),
    ],
)
def test_what_cannot_run_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        plan(load_config(words))


def test_nodes_that_are_too_few_are_refused():
    config = load_config(["cluster.workers=3", "cluster.cpus_per_worker=2"])
    plan(config, {"a": {"CPU": 4.0}, "b": {"CPU": 2.0}})
    with pytest.raises(ValueError, match="places for 2"):
        describe(config, {"a": {"CPU": 4.0}})


def test_planning_starts_nothing_and_leaves_the_generator_alone(monkeypatch):
    import ray

    def refuse(*args, **kwargs):
        raise AssertionError("plan started something")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("orchestration.own_ray.start_own_ray", refuse)
    before = torch.get_rng_state()
    describe(load_config([]))
    assert torch.equal(before, torch.get_rng_state())
