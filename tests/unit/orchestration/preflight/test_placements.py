"""Which placements are compared, what auto stands for, and what `plan` says about them."""

from __future__ import annotations

import pytest

from orchestration.config.compose import load_config
from orchestration.preflight import placements as module
from orchestration.preflight.node_speed import Measured
from orchestration.preflight.placements import NODES, ONE_NODE, compare, measure_for, shapes, workers_of
from orchestration.preflight.placements_text import name_of, placement_lines, record
from orchestration.preflight.plan_text import describe
from orchestration.training.mesh import MeshShape

SMALL = ["method=ride", "dataset=digits_lt"]
BOX = {"a": {"CPU": 8.0}}
FAST_LINK = {ONE_NODE: [(1024, 1e-6), (2**22, 1e-4)]}
SLOW_LINK = {ONE_NODE: [(1024, 1.0), (2**22, 2.0)]}


def config(*words):
    return load_config([*SMALL, "cluster.cpus_per_worker=1", *words])


PACKED, SPREAD, REPLICAS = MeshShape(3, 3), MeshShape(3, 1), MeshShape(3, 3, 3)


def measured(links=FAST_LINK, packed=1.0, spread=0.5, replicas=0.4):
    """Seconds that one worker computes in a step."""
    compute_s = {PACKED: packed, SPREAD: spread, REPLICAS: replicas}
    return Measured({shape: {"train": seconds} for shape, seconds in compute_s.items()}, links)


def lines(*words, nodes=BOX, **more):
    return list(placement_lines(compare(config(*words), nodes, measured(**more))))


def test_the_workers_asked_for_are_compared_with_the_packed_run():
    def found(*words, nodes=BOX):
        return [(s.experts_per_worker, s.workers) for s in shapes(config(*words), nodes)]

    assert found("cluster.workers=3") == [(3, 1), (1, 3), (3, 3)]
    assert found("cluster.workers=2") == [(3, 1), (3, 2)]
    six = ["method.num_experts=6", "cluster.workers=6"]
    assert found(*six) == [(6, 1), (1, 6), (2, 6), (3, 6), (6, 6)], "mixtures that divide too"


def test_with_one_worker_asked_for_those_at_hand_are_compared():
    one = config("cluster.gpus_per_worker=1")
    gpus = {"a": {"CPU": 8.0, "GPU": 4.0}, "b": {"CPU": 8.0, "GPU": 4.0}}
    assert [s.workers for s in shapes(one, gpus)] == [1, 3, 3, 8]
    assert [s.workers for s in shapes(config(), {"a": {"CPU": 2.0}})] == [1], "no room for three"
    assert [s.workers for s in shapes(config(), None)] == [1, 3, 3]
    assert [s.workers for s in shapes(load_config(["method=ce"]), None)] == [1], "one expert, one worker"


def test_workers_share_the_cpus_of_their_node():
    """Three workers of one thread on 2 CPUs: half as slow again. On two nodes the link between them counts."""
    free = load_config([*SMALL, "cluster.workers=3"])
    (workers, _) = workers_of(free, MeshShape(3, 1), {"a": {"CPU": 2.0}})
    assert (workers.cpus, workers.threads, workers.link, workers.crowding) == (0.66, 1, ONE_NODE, 1.5)
    (workers, _) = workers_of(free, MeshShape(3, 3), {"a": {"CPU": 2.0}})
    assert (workers.cpus, workers.threads, workers.crowding) == (2, 2, 1.0)
    (workers, _) = workers_of(config("cluster.workers=3"), MeshShape(3, 1), {"a": {"CPU": 2.0}, "b": {"CPU": 1.0}})
    assert (workers.link, workers.crowding) == (NODES, 1.0)
    assert workers_of(config("cluster.workers=3"), MeshShape(3, 1), {"a": {"CPU": 2.0}}) is None


def test_a_step_takes_what_its_worker_computes_and_its_exchanges():
    found = compare(config("cluster.workers=3"), BOX, measured())
    packed, spread, replicas = found.candidates
    assert found.complete
    assert packed.prediction.step_s["train"] == 1.0
    assert packed.prediction.epoch_s["train"] == 7.0, "405 images in batches of 64"
    assert packed.prediction.run_s == 7.0 * 24
    assert spread.prediction.step_s["train"] == pytest.approx(0.5, rel=0.01), "exchanges take next to nothing"
    assert found.gain(replicas) == pytest.approx(2.5, rel=0.01)
    assert found.recommended is replicas
    slower = measured({ONE_NODE: [(1024, 0.02), (2**22, 0.021)]})
    _, spread, replicas = compare(config("cluster.workers=3"), BOX, slower).candidates
    assert 0.5 < spread.prediction.step_s["train"] < 1.0 < replicas.prediction.step_s["train"], "by their exchanges"


def test_of_placements_as_fast_the_one_that_sends_less_is_recommended():
    found = compare(config("cluster.workers=3"), BOX, measured(spread=0.42))
    assert found.recommended.shape == SPREAD


def test_a_slow_link_makes_every_run_better_alone():
    text = "\n".join(lines("cluster.workers=3", links=SLOW_LINK))
    assert "NOTE: spread, 1 expert per worker gains 0." in text
    assert "less than 1.3; give each run one worker (cluster.workers=1), and use the other 2 for more runs" in text
    [row] = [line for line in text.splitlines() if line.startswith("packed")]
    assert row.endswith("1.00 x  recommended")


def test_experts_that_are_almost_the_whole_trunk_gain_nothing_measured_or_not():
    """ResLT's branches differ by a BatchNorm: a spread worker computes as much as the packed one."""
    reslt = load_config(["method=reslt", "dataset=digits_lt", "cluster.cpus_per_worker=1", "cluster.workers=3"])
    unmeasured = "\n".join(placement_lines(compare(reslt, None)))
    assert (
        "NOTE: spreading the experts gains at most 1.00 x, less than 1.3, since every worker runs the trunk"
        in unmeasured
    )
    both = [compare(reslt, BOX), compare(reslt, BOX, measured(spread=1.0))]
    assert ["NOTE: spreading the experts gains" in "\n".join(placement_lines(found)) for found in both] == [True, True]
    six = reslt.model_copy(update={"cluster": reslt.cluster.model_copy(update={"workers": 6})})
    assert "NOTE: spreading" in "\n".join(placement_lines(compare(six, None))), "two replicas gain, spreading does not"


def test_without_measurements_the_shares_and_bytes_remain():
    text = "\n".join(placement_lines(compare(config("cluster.workers=3"), None)))
    [spread] = [line.split() for line in text.splitlines() if line.startswith("spread")]
    assert spread[-2:] == ["1.90", "x"] and "52.7" in spread
    assert "s per step" not in text and "recommended" not in text
    assert "no times: nothing was measured; `expertail plan --probe" in text


def test_what_could_not_be_measured_leaves_its_rows_open_and_says_why():
    half = Measured(measured().compute_s, {}, ["the link inside a node was not measured: no answer in time"])
    found = compare(config("cluster.workers=3"), BOX, half)
    text = "\n".join(placement_lines(found))
    assert found.packed.prediction is not None and found.recommended is None and not found.complete
    [spread] = [line for line in text.splitlines() if line.startswith("spread")]
    assert spread.endswith("n/a")
    assert "was not measured: no answer in time" in text and "recommended" not in text


def test_a_gain_beyond_the_number_of_workers_is_doubted():
    assert "NOTE: gains of more than there are workers" in "\n".join(lines("cluster.workers=3", packed=9.0))
    assert "gains of more" not in "\n".join(lines("cluster.workers=3"))


def test_auto_takes_the_fastest_on_the_workers_asked_for():
    words = ["cluster.workers=3", "cluster.experts_per_worker=auto"]
    found = compare(config(*words), BOX, measured())
    assert found.choice.shape == MeshShape(3, 3, 3)
    assert record(found)["experts_per_worker"] == 3 and record(found)["measured"]
    slow = compare(config(*words), BOX, measured(links=SLOW_LINK))
    assert slow.recommended is slow.packed
    assert slow.choice.shape == MeshShape(3, 1), "three workers were asked for, whatever is recommended"


def test_auto_without_measurements_says_that_it_assumes():
    words = ["cluster.workers=3", "cluster.experts_per_worker=auto"]
    for nodes in (None, BOX):
        found = compare(config(*words), nodes)
        text = "\n".join(placement_lines(found))
        assert f"auto is {found.choice.shape.experts_per_worker} for 3 workers: by orders of magnitude" in text
        assert not record(found)["measured"] and "s per step" not in text
    described = describe(config(*words))
    assert "cluster.experts_per_worker=auto is " in described


def test_auto_keeps_replicas_few_where_they_would_change_results():
    words = ["cluster.workers=3", "cluster.experts_per_worker=auto", "engine.sync_batchnorm=false"]
    found = compare(config(*words), BOX, measured())
    assert found.choice.shape == MeshShape(3, 1)
    assert "engine.sync_batchnorm=false lets each have statistics of its own" in "\n".join(placement_lines(found))


def test_auto_has_an_answer_where_the_data_must_say_the_classes():
    words = [
        "method=ride",
        "dataset=image_list",
        "pace=digits_lt",
        "cluster.workers=3",
        "cluster.experts_per_worker=auto",
    ]
    found = compare(load_config([*words, "dataset.num_classes=null"]), BOX)
    assert found.choice.shape == MeshShape(3, 1)
    assert "set dataset.num_classes" in "\n".join(placement_lines(found))


def test_every_link_and_every_kind_of_worker_is_measured_once(monkeypatch):
    tasks = []
    monkeypatch.setattr(module, "measure", lambda task: tasks.append(task) or Measured())
    two = {"a": {"CPU": 2.0}, "b": {"CPU": 4.0}}
    measure_for(config("cluster.workers=3", "method.num_experts=3"), two)
    measure_for(config("cluster.workers=6", "method.num_experts=3"), two)
    measure_for(load_config([*SMALL, "cluster.workers=3"]), {"a": {"CPU": 2.0}})
    assert [(t.first, dict(t.partners), t.threads) for t in tasks] == [
        ("b", {ONE_NODE: "b"}, {PACKED: 1, SPREAD: 1, REPLICAS: 1}),
        ("b", {NODES: "a"}, {PACKED: 1, MeshShape(3, 1, 2): 1, MeshShape(3, 3, 6): 1}),
        ("a", {ONE_NODE: "a"}, {PACKED: 2, SPREAD: 1, REPLICAS: 1}),
    ]
    assert [set(t.beside) for t in tasks] == [{SPREAD, REPLICAS}, set(), {SPREAD, REPLICAS}], "two at once on a node"
    measure_for(config("cluster.workers=3", "engine.threads=2"), {"a": {"CPU": 3.0}})
    assert not tasks.pop().beside, "four threads on three CPUs would be slower for that alone"
    assert tasks[0].configs[REPLICAS].cluster.experts_per_worker == 3 and list(tasks[0].counts_C) == ["train"]
    measure_for(load_config(["method=ce"]), BOX)
    assert len(tasks) == 3, "with one placement there is nothing to compare"


def test_placements_have_names():
    names = [name_of(MeshShape(*shape)) for shape in ((3, 3), (3, 1), (6, 2, 2), (3, 3, 3))]
    assert names == [
        "packed",
        "spread, 1 expert per worker",
        "spread, 2 experts per worker, 2 replicas",
        "3 replicas of the whole ensemble",
    ]
