"""The plan's numbers, against sums one can do by hand."""

from __future__ import annotations

import pytest
import torch

from experts.data.dataset import open_dataset
from experts.ensemble import build_ensemble
from orchestration.commands.plan import plan_text
from orchestration.config.compose import load_config
from orchestration.preflight.expected_data import expected_data
from orchestration.preflight.plan import plan
from orchestration.preflight.plan_text import describe
from tests.recipes import every_recipe

CIFAR = ["dataset=cifar100_lt"]


def exchanges(found, stage=-1):
    return {
        x.what: (x.among, x.payload, max(map(x.sent, range(len(x.payloads))))) for x in found.stages[stage].exchanges
    }


def test_ride_on_cifar100_packed():
    """RIDE-3 ResNet-32: the counts of 100 classes at ratio 100 sum to 10,847; 84 batches of 128 and one of 95."""
    config = load_config(CIFAR)
    found = plan(config)
    model = build_ensemble(config.ensemble(config.method.final, 100), seed=0)
    (stage,) = found.stages
    assert stage.size.parameters == sum(p.numel() for p in model.parameters())
    assert stage.size.trunk_work == 442_368 + 23_592_960
    assert stage.exchanges == () and stage.repeated == 0
    assert stage.work == 3 * stage.size.work  # forward, and back by weights and by inputs
    assert (sum(found.counts), stage.steps_per_epoch, stage.last_batch) == (10_847, 85, 95)
    assert found.experts_on(0) == ("expert0", "expert1", "expert2")


def test_bytes_and_repeated_work_of_three_slots_and_two_replicas():
    """64 images of 128 on each replica; 64 x 100 logits of 4 bytes to 2 partners. A ring all-reduce over n workers
    sends 2 (n - 1) / n of the buffer. BatchNorm: 2 D + 1 numbers a layer forward, 2 D backward. RIDE's loss has two
    terms for each of 3 experts: 7 float64 numbers with the loss, and 3 that say whether outputs are finite."""
    found = plan(load_config([*CIFAR, "cluster.workers=6", "engine.name=torch"]))
    (stage,) = found.stages
    trunk, expert = 4 * stage.size.trunk, 4 * stage.size.experts[0]
    layers, channels = 11 + 20, 11 * 16 + 10 * 24 + 10 * 48
    forward, backward = 4 * (2 * channels + layers), 4 * 2 * channels
    assert exchanges(found) == {
        "logits": (3, 25_600, 51_200),
        "gradient, trunk": (6, trunk, round(2 * trunk * 5 / 6)),
        "gradient, experts": (2, expert, expert),
        "BatchNorm statistics": (2, forward, forward),
        "BatchNorm gradients": (2, backward, backward),
        "loss, its terms and checks": (2, 80, 80),
        "whether all gradients are finite": (6, 8, 13),
    }
    assert stage.sent() == 51_200 + round(2 * trunk * 5 / 6) + expert + forward + backward + 80 + 13
    assert stage.repeated == pytest.approx(2 * stage.size.trunk_work / stage.size.work)
    assert [found.experts_on(rank) for rank in (0, 1, 2, 5)] == [("expert0",)] * 2 + [("expert1",), ("expert2",)]


def test_zero_fills_up_its_parts_and_workers_agree_that_all_is_finite():
    """23,824 numbers of the trunk over 6 workers: 2 x ceil(23,824 / 12) = 3,972 each; the check is one float64."""
    found = exchanges(plan(load_config([*CIFAR, "cluster.workers=6"])))
    assert found["updated weights, trunk (ZeRO)"] == (6, 4 * 3972, 4 * 3972 * 5)
    assert found["whether all gradients are finite"][:2] == (6, 8)


def test_what_is_not_exchanged_is_not_listed():
    one_replica = exchanges(plan(load_config(["cluster.workers=3", "engine.name=torch"])))
    assert set(one_replica) == {"logits", "gradient, trunk", "whether all gradients are finite"}
    words = ["method=ce", "cluster.workers=2", "engine.name=torch", "engine.sync_batchnorm=false"]
    sums = {"gradient, trunk", "gradient, experts", "loss, its terms and checks"}  # all hold all gradients then
    assert set(exchanges(plan(load_config(words)))) == sums


def shapes_of(num_experts):
    """Packed, spread, replicas of all, spread and replicas with ZeRO 2, and a replica more with the control engine."""
    yield []
    yield [f"cluster.workers={num_experts}"]
    yield ["cluster.workers=2", f"cluster.experts_per_worker={num_experts}"]
    yield [f"cluster.workers={2 * num_experts}", "engine.zero_stage=2"]
    yield [f"cluster.workers={3 * num_experts}", "engine.name=torch", "engine.precision=float64"]


@every_recipe
def test_every_recipe_is_planned_on_every_mesh(method):
    """Parameters, work and memory are those of the packed placement or more; a mesh of several workers exchanges."""
    packed, text = None, ""
    for words in shapes_of(load_config([f"method={method}"]).method.num_experts):
        config = load_config([f"method={method}", *words])
        found = plan(config)
        text = describe(config)
        packed = packed or found
        assert len(found.stages) == len(config.method.stages)
        for stage, alone in zip(found.stages, packed.stages, strict=True):
            assert stage.size == alone.size and stage.size.parameters and stage.size.work
            missing = None in stage.teachers.values()  # another run's, which a plan on this machine does not find
            assert (stage.memory is None, stage.work is None) == (missing, missing)
            if stage.epochs and not missing:
                assert stage.work >= alone.work > 0 and stage.sent() is not None
            assert bool(stage.exchanges) == bool(stage.epochs and found.shape.workers > 1)
        assert f"{packed.final.size.parameters:,}" in text


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ace", "bbn", "lfme", "reslt", "ride_distill", "ride_router", "ride_h2t"])
def test_only_scores_grow_with_the_batch(method):
    """A feature map, or a feature, would grow too."""
    config = load_config([f"method={method}"])
    words = [f"method={method}", f"cluster.workers={2 * config.method.num_experts}"]
    larger = [f"method.stages.{name}.batch_size=200" for name in config.method.stages]
    for small, large in zip(plan(load_config(words)).stages, plan(load_config([*words, *larger])).stages, strict=True):
        assert small.exchanges
        for a, b in zip(small.exchanges, large.exchanges, strict=True):
            assert a == b or a.what in ("logits", "scores of the gates") or a.what.startswith("scores of teacher")


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
    total = 4 * plan(load_config(words)).final.size.parameters
    engines = ("engine.name=torch", "engine.zero_stage=2", "")
    memory = {engine: plan(load_config([*words, *engine.split()])).memory for engine in engines}
    assert memory == {"engine.name=torch": 3 * total, "engine.zero_stage=2": 1.75 * total, "": 2.5 * total}


# The expert systems


def test_a_router_stage_moves_gates_alone():
    """Second stage: logits and a column of scores; 26 + 1 numbers of the shared layer and 2 between them; a gate of
    48 x 16 + 16 in all but the last slot; frozen BatchNorms neither learn nor normalise by the batch."""
    found = plan(load_config(["method=ride_router", "cluster.workers=6", "engine.name=torch"]))
    train, router = found.stages
    assert "gates" not in train.learns and router.learns == ("gates",)
    sent = exchanges(found)
    assert set(sent) == {
        "logits", "scores of the gates", "gradient, shared last layer", "gradient, experts",
        "loss, its terms and checks", "whether all gradients are finite",
    }  # fmt: skip
    assert sent["scores of the gates"][1] == sent["logits"][1] // 10 == 4 * router.shares[0]
    assert sent["gradient, shared last layer"][:2] == (6, 4 * 29)
    gates = next(x for x in router.exchanges if x.what == "gradient, experts")
    assert gates.payloads == (4 * 784, 4 * 784, 0)
    assert router.size.experts == (train.size.experts[2] + 784,) * 2 + (train.size.experts[2],)
    assert train.size == router.size and router.size.shared == 27
    # Frozen: forward alone, but for the gates (48 x 16 multiply-adds) of two experts.
    assert router.work == 3 * router.size.trunk_work + 3 * router.size.expert_work + 2 * 3 * 768


def test_bbn_runs_a_stream_in_each_slot_and_moves_statistics_in_turn():
    """Running means, variances and counters cross as float64, as many numbers as a forward exchange has."""
    config = load_config(["method=bbn", "cluster.workers=2", "engine.name=torch"])
    spread, packed = plan(config), plan(load_config(["method=bbn"]))
    model = build_ensemble(config.ensemble(config.method.final, 10), seed=0)
    assert exchanges(spread)["running statistics of the trunks, in turn"][1] == 8 * sum(
        buffer.numel() for buffer in model.trunk.buffers()
    )
    size = packed.final.size
    assert size.experts[0] == size.experts[1] + 10  # one bias for both halves
    assert spread.final.work == packed.final.work == 3 * (2 * size.trunk_work + 2 * size.expert_work)
    assert spread.final.repeated == packed.final.repeated == 0
    twins = plan(load_config(["method=bbn", "cluster.workers=2", "cluster.experts_per_worker=2"])).final
    halves = plan(load_config(["method=bbn", "cluster.workers=4"])).final

    def statistics(stage):
        return next(x.payload for x in stage.exchanges if x.what == "BatchNorm statistics")

    experts, trunk = (part.numel() for part in (_buffers(model.experts), _buffers(model.trunk)))
    assert statistics(twins) == 4 * (2 * trunk + experts)  # one trunk sees both streams
    assert statistics(halves) == 4 * (trunk + experts // 2)


def _buffers(module):
    """Mean, variance and counter of every BatchNorm: as many numbers as a forward exchange has."""
    return torch.cat([buffer.flatten() for buffer in module.buffers()])


def test_ace_sends_no_gradient_through_the_trunk_of_other_slots():
    found = plan(load_config(["method=ace", "cluster.workers=6", "engine.name=torch"])).final
    back = next(x.payloads for x in found.exchanges if x.what == "BatchNorm gradients")
    trunk = 4 * 2 * (3 * 16 + 2 * 32)
    assert (back[0] - back[1], back[1]) == (trunk, back[2])
    zero2 = plan(load_config(["method=ace", "cluster.workers=6", "engine.zero_stage=2"])).final
    assert next(x.payloads for x in zero2.exchanges if x.what == "BatchNorm gradients") == back
    size = found.size
    assert found.work == (3 + 1 + 1) * size.trunk_work + 9 * size.expert_work
    assert f"at most {found.work:,.0f} multiply-adds" in describe(load_config(["method=ace", "cluster.workers=6"]))


def test_h2t_passes_pairs_and_moves_heads():
    """Receiver and donor: two forward passes of everything that is frozen. Its BatchNorms normalise by the batch, as
    published, so their statistics cross twice and no gradient of them does."""
    found = plan(load_config(["method=ride_h2t", "cluster.workers=6", "engine.name=torch"]))
    train, h2t = found.stages
    first, second = exchanges(found, 0), exchanges(found, 1)
    assert h2t.learns == ("heads",)
    assert second["BatchNorm statistics"][1] == 2 * first["BatchNorm statistics"][1]
    assert "BatchNorm gradients" not in second
    assert second["gradient, experts"][:2] == (2, 4 * 64 * 10) and "gradient, trunk" not in second
    head = 64 * 10
    assert h2t.work == 3 * 2 * train.size.trunk_work + 3 * (2 * (train.size.expert_work - head) + 3 * head)
    text = describe(load_config(["method=ride_h2t"]))
    assert "learns: heads; frozen: trunk, features; frozen BatchNorms use the batch's statistics" in text
    assert "every image comes with a partner, sampler instance_balanced; experts see both" in text
    assert "starts from the weights of stage train, last" in text


def test_a_plan_says_what_images_are_mixed_with():
    assert "images are mixed with others of the same step: mixup" in describe(load_config(["mix=mixup"]))
    said = describe(load_config(["mix=cmo", "method.stages.train.mixing.sampler.name=reversed"]))
    assert "images are mixed with others of a second stream, sampler reversed: cmo" in said


def test_a_shared_head_is_exchanged_by_all():
    words, head = ["method=reslt", "cluster.workers=3"], 4 * (64 * 10 + 10)
    for engine in ("torch", "deepspeed"):
        found = plan(load_config([*words, f"engine.name={engine}"]))
        assert exchanges(found)["gradient, shared last layer"][:2] == (3, head)
        assert exchanges(found)["gradient, trunk"][:2] == (3, 4 * found.final.size.trunk)


def test_lfme_trains_three_stages_side_by_side_and_its_student_holds_the_teachers():
    config = load_config(["method=lfme", "engine.name=torch"])
    found = plan(config)
    many, medium, few, student = found.stages
    assert found.waves == (("many", "medium", "few"), ("student",)) and found.side_by_side == 3
    assert [stage.num_classes for stage in found.stages] == [4, 3, 3, 10]
    assert [stage.images_per_epoch for stage in found.stages] == [120 + 86 + 61 + 44, 31 + 22 + 16, 11 + 8 + 6, 405]
    teachers = sum(stage.size.parameters for stage in (many, medium, few))
    assert found.memory == student.memory == 4 * (3 * student.size.parameters + teachers)
    seen = sum(stage.size.work for stage in (many, medium, few))
    assert student.work == 3 * student.size.work + seen
    assert "3 at a time, each on its own workers, 3 workers in all" in describe(config)
    assert plan(load_config(["method=lfme", "cluster.side_by_side=1"])).side_by_side == 1


def test_a_stage_without_steps_has_sizes_and_no_exchanges():
    """NCM: 64 x 10 means are fitted, none of them a parameter; the joint stage keeps the linear head of 650 numbers."""
    config = load_config(["method=ce", "then=[ncm,crt]", "cluster.workers=2", "engine.name=torch"])
    found = plan(config)
    train, ncm, crt = found.stages
    assert (ncm.epochs, ncm.steps_per_epoch, ncm.exchanges, ncm.learns, ncm.work) == (0, 0, (), (), 0)
    assert ncm.size.parameters == train.size.parameters - 650 and ncm.size.work == train.size.work
    assert ncm.memory == 4 * ncm.size.parameters
    assert crt.learns == ("heads",) and exchanges(found)["gradient, experts"][:2] == (2, 4 * 650)
    text = describe(config)
    assert "stage ncm: no steps; its heads are fitted to all training images" in text
    assert "stage ncm: no steps, head ncm" in text and "images per step, ncm" not in text


def test_a_number_that_a_stage_chooses_is_told_with_its_default():
    text = describe(load_config(["method=ce", "then=[tau_norm,logit_adjusted]"]))
    assert "head.gamma: chosen on validation images; without any, 0.7 (Kang et al. 2020" in text
    assert "aggregator.tau: chosen on validation images; without any, 1 (Menon et al. 2021" in text
    fixed = describe(load_config(["method=ce", "then=tau_norm", "method.stages.tau_norm.head.gamma=1"]))
    assert "chosen on validation images" not in fixed


def test_augmentations_and_views_of_a_stage_are_told():
    words = ["method.stages.train.augment.name=crop_flip", "method.stages.train.views=[standard,moco]"]
    text = describe(load_config(words))
    assert "images are changed by crop_flip (crop)" in text
    assert "every image comes in 3 views; further ones: crop, rotation; moco (resized_crop, color_jitter" in text


def test_images_that_an_auxiliary_makes_are_told_and_not_counted():
    text, plain = (describe(load_config([f"method={method}"])) for method in ("rsg", "ldam"))
    assert "further images are made by rsg" in text and "further images" not in plain


def test_features_that_training_keeps_are_counted_once():
    """405 x 64 x 4 bytes fit into dataset.resident_mib. Each of 2 replicas computes them all; steps run the heads."""
    off = ["dataset.augment.crop_padding=0", "dataset.augment.rotation=0"]
    words = ["method=ce", "then=crt", "cluster.workers=2", "method.stages.crt.frozen_batchnorm=eval", *off]
    train, crt = plan(load_config(words)).stages
    head = 64 * 10
    assert crt.work == 3 * head and crt.work_before == 2 * (train.size.work - head)
    assert train.work == 3 * train.size.work and train.work_before == 0
    assert "trunk and features run once before the first step" in describe(load_config(words))
    moving = plan(load_config([*words, "dataset.resident_mib=0"])).stages[1]
    assert moving.work == train.size.work + 2 * head and moving.work_before == 0
    assert moving.exchanges == crt.exchanges


def test_a_missing_teacher_leaves_only_its_own_numbers_open(tmp_path):
    words = ["method=ride_distill", "cluster.workers=3", f"method.stages.train.teachers.teacher.run={tmp_path}"]
    found = plan(load_config(words))
    sent = {x.what: x.payload for x in found.final.exchanges}
    assert [what for what, payload in sent.items() if payload is None] == ["scores of teacher teacher"]
    assert found.memory is None and found.final.sent() is None and found.final.size.parameters
    assert "which is missing" in describe(load_config(words))


@pytest.mark.parametrize(
    "word", ["seed=0", "dataset.val_per_class=5", "dataset.balanced=true", "dataset.max_per_class=null"]
)
def test_the_counts_of_digits_are_those_that_opening_finds(word):
    config = load_config([word])
    found, opened = expected_data(config), open_dataset(config.dataset)
    assert found.counts_C.tolist() == opened.counts_C.tolist()
    assert found.remarks == opened.remarks
    assert found.test_images == len(opened.test)


def test_steps_follow_the_sampler_and_drop_last():
    longer = ["method.stages.train.sampler={name:class_balanced,epoch:largest_class}"]
    assert plan(load_config(longer)).stages[0].images_per_epoch == 1200
    dropped = plan(load_config(["method.stages.train.drop_last=true"])).stages[0]
    assert (dropped.images_per_epoch, dropped.steps_per_epoch, dropped.last_batch) == (384, 6, 64)


def test_uneven_and_empty_shares_are_shown():
    words = ["cluster.workers=9", "method.stages.train.batch_size=2"]
    found = plan(load_config(words))
    assert found.stages[0].shares == (1, 1, 0)
    assert "1 replica without an image" in describe(load_config(words))


def test_what_only_the_data_can_say_is_left_open():
    words = ["dataset=image_folder_lt", "pace=cifar100_lt", "cluster.workers=3", "dataset.root=/not/there"]
    text = describe(load_config(words))
    assert "dataset.num_classes=..." in text and "n/a" in text and "steps per epoch are known when the data" in text
    told = describe(load_config([*words, "dataset.num_classes=8142"]))
    assert "8,142" in told
    assert [line for line in told.splitlines() if "n/a" in line] == [
        "  n/a: no cluster is named; set cluster.address to see its nodes",
        "  n/a: nothing was run; `expertail plan --probe ...` takes a few steps and estimates the hours from them",
    ]


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["dataset=image_folder_lt", "pace=digits_lt"], "dataset.root is not set (dataset image_folder_lt)"),
        (["dataset=cifar100_lt", "cluster.address=head:6379"], "dataset.root is not set (dataset cifar100_lt); set it"),
        (["dataset=cifar100_lt", "dataset.root=/not/there"], "dataset.root = /not/there: found nothing at /not/there"),
        (["dataset=cifar100_lt", "dataset.root=/not/there", "cluster.address=head:6379"], None),
        (["dataset=cifar100_lt", "dataset.download=true"], None),
        (["dataset=digits_lt"], None),
        (["dataset=digits_lt", "method=ride_distill"], "teachers.teacher.run = "),
        (["dataset=digits_lt", "method.backbone_weights=/not/there"], "method.backbone_weights: /not/there: no such"),
    ],
)
def test_what_training_would_miss_is_listed_last(words, missing, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    _, found, last = describe(load_config(words)).partition("\nmissing, so that `expertail train` would refuse this\n")
    assert bool(found) == (missing is not None)
    assert (missing or "") in " ".join(last.split())


FILES = ["dataset=imagenet_lt", "dataset.root=/not/there", "dataset.image_size=32"]
COUNTED = "{rule:{rule:count}}"


@pytest.mark.parametrize("method", ["ace", "reslt"])
def test_groups_of_classes_of_unknown_size_do_not_stop_a_plan(method):
    found = plan(load_config([*FILES, f"method={method}", "pace=digits_lt", "cluster.workers=3"]))
    assert found.counts is None and found.final.steps_per_epoch is None
    assert found.final.size.parameters and found.final.sent() and found.memory


def test_stages_without_steps_are_planned_where_counts_are_unknown():
    found = plan(load_config([*FILES, "method=ce", "then=[ncm,tau_norm,joint]", "pace=digits_lt"]))
    assert found.counts is None and [stage.epochs for stage in found.stages[1:]] == [0, 0, 0]


def test_an_ensemble_of_a_group_of_unknown_size_is_left_open():
    """LFME's experts have a logit for each class of their group, which only the data can count; the student for all."""
    words = ["method=lfme", "pace=digits_lt", "dataset.val_per_class=0", "cluster.workers=2"]
    words += [f"method.stages.{stage}.classes={COUNTED}" for stage in ("many", "medium", "few")]
    config = load_config([*FILES, *words, "method.stages.student.objective.groups.rule=count"])
    assert "teacher many: stage many, best, known when the data is opened; eval mode" in describe(config)
    found = plan(config)
    assert [stage.num_classes for stage in found.stages] == [None, None, None, 1000]
    assert [stage.size.parameters is None for stage in found.stages] == [True, True, True, False]
    assert found.stages[0].size.trunk == 0
    sent = {x.what: x.payload for x in found.stages[0].exchanges}
    assert "gradient, experts" in sent and set(sent.values()) == {None}
    assert found.memory is None and found.final.sent()


def test_the_text_tells_an_operator_what_will_happen():
    text = describe(
        load_config([*CIFAR, "cluster.workers=6", "run.dir=/data/runs", "tracking.uri=http://me:pw@host:5000"])
    )
    for words in (
        "ride: 3 experts on one trunk, resnet_cifar 32", "100 classes, 10,847 training images, 500 to 5 per class",
        "6 workers = 3 expert slots x 2 replicas", "0.02 to 0.08 over epochs 1-4, 0.1 in epochs 5-160, 0.001 in epochs",
        "85 steps per epoch", "17,000 steps in all", "95 images, 47 to 48 on each replica", "  all-gather  ",
        "445,286,592 multiply-adds for each image, forward and backward", "grow by 47.9 % over packed",
        "published, top-1 in %: all 48.6", "/data/runs/ride-cifar100_lt-s0 (new)", "http://host:5000",
    ):  # fmt: skip
        assert words in text, words
    assert "me:pw" not in text
    assert all(len(line) < 200 and line == line.rstrip() for line in text.splitlines())


def test_a_shortened_stage_lists_what_it_never_reaches():
    drops = "method.stages.train.lr_schedule.milestones=[{after_epoch:160,factor:0.1},{after_epoch:180,factor:0.01}]"
    text = describe(load_config([*CIFAR, "method.stages.train.epochs=170", drops]))
    assert "NOTE: the stage ends before the learning rate's drop after epoch 180\n" in text
    weight = "method.stages.train.objective_weight={ramp: step, start: 0, end: 1, after_epoch: 170}"
    text = describe(load_config([*CIFAR, "method.stages.train.epochs=170", weight]))
    assert "objective_weight.after_epoch = 170" in text
    assert "weight of the objective: step from 0 to 1, which it has after epoch 170" in text


def test_many_workers_are_cut_short():
    assert "... and 14 more" in describe(load_config([*CIFAR, "cluster.workers=30"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster.workers=4"], "cluster.workers = 4 does not fit"),
        (["dataset.num_classes=11"], "dataset.num_classes = 11: digits has 10 classes"),
        (["dataset.max_per_class=150"], "needs 150 images of class"),
        (["method.stages.train.drop_last=true", "method.stages.train.batch_size=500"], "no full batch"),
    ],
)
def test_what_cannot_run_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        plan(load_config(words))


def test_too_few_nodes_are_refused():
    config = load_config(["cluster.workers=3", "cluster.cpus_per_worker=2"])
    plan(config, {"a": {"CPU": 4.0}, "b": {"CPU": 2.0}})
    with pytest.raises(ValueError, match="places for 2"):
        describe(config, {"a": {"CPU": 4.0}})


def test_the_picture_shows_every_worker_on_its_node():
    words = [*CIFAR, "cluster.workers=6", "cluster.cpus_per_worker=1"]
    text = describe(load_config(words), {"10.0.0.1": {"CPU": 4.0}, "10.0.0.2": {"CPU": 2.0}, "10.0.0.3": {"CPU": 1.0}})
    for line in (
        "  10.0.0.1  (4 CPUs; 4 of 6 workers)",
        "    | worker 0  | worker 1  | worker 2  | worker 3  |",
        "    | expert0   | expert0   | expert1   | expert1   |",
        "    | replica 0 | replica 1 | replica 0 | replica 1 |",
        "  10.0.0.2  (2 CPUs; 2 of 6 workers)",
        "  without a worker: 10.0.0.3",
    ):
        assert line in text.splitlines(), line


def test_flops_are_two_a_multiply_add():
    text = describe(load_config(CIFAR))
    size = plan(load_config(CIFAR)).final.size
    (row,) = [line.split() for line in text.splitlines() if line.startswith("  ensemble")]
    assert row[2:] == [f"{size.work:,}", f"{2 * size.work:,}"]
    assert f"({2 * 3 * size.work:,} FLOPs)" in text


def test_a_cluster_that_does_not_answer_is_named_and_hides_nothing(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    text = plan_text(["cluster.address=127.0.0.1:9", "cluster.workers=3"])
    assert "  n/a: cluster.address = 127.0.0.1:9: nobody listens there" in text
    assert "3 workers = 3 expert slots x 1 replica " in text


def test_planning_starts_nothing_and_leaves_the_generator_alone(monkeypatch):
    import ray

    def refuse(*args, **kwargs):
        raise AssertionError("plan started something")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr("orchestration.cluster.local_ray.start_local_ray", refuse)
    before = torch.get_rng_state()
    describe(load_config([]))
    assert torch.equal(before, torch.get_rng_state())
