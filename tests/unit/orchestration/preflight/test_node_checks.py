"""The doctor's judgement of the answers of nodes, and a node's report about itself and its files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from orchestration.cluster.placement import pack
from orchestration.config.compose import load_config
from orchestration.preflight import node_checks, node_report
from orchestration.preflight.checks import Finding, run_check
from orchestration.preflight.node_checks import Needs, Survey, worker_gib

GIB = 2**30


@pytest.fixture(scope="module")
def report():
    """Report this machine, with shared memory as outside a container."""
    room = node_report.room() | {"shm": GIB, "shm_free": GIB}
    found = {"room": room, "data": {}, "listening": [("raylet", "10.0.0.1", 700)], "token": True}
    return node_report.software() | found


@pytest.fixture
def survey(report):
    """Make a survey of two equal nodes."""
    nodes = {name: {"CPU": 2.0, "object_store_memory": 1e8} for name in ("a", "b")}
    equal = Survey(reports={name: copy.deepcopy(report) for name in nodes}, resources=nodes)
    equal.before = report
    return equal


def needs(survey, *words, weights=0, decoded=()):
    config = load_config(["cluster.workers=3", *words])
    return Needs(config, pack(3, {"CPU": 1.0}, survey.resources), Path("/runs"), weights, decoded)


def software(survey, asked):
    """Compare versions; the driver's are those of the nodes before a test changed anything."""
    return list(node_checks._software(survey, asked, survey.before))


def found(findings, state):
    return [f.text for f in findings if f.state == state]


def test_equal_nodes_are_one_line_each(survey):
    asked = needs(survey)
    findings = [*software(survey, asked), *node_checks._exposure(survey)]
    assert {f.state for f in findings} == {"ok"} and [f.what for f in findings] == ["versions", "torch", "auth"]


@pytest.mark.parametrize("library", ["ray", "torch", "deepspeed", "numpy", "expertail"])
def test_another_version_is_named_with_its_node(survey, library):
    right = survey.reports["b"]["versions"][library]
    survey.reports["b"]["versions"][library] = "0.0.1"
    (text,) = found(software(survey, needs(survey)), "FAIL")
    assert text.startswith(f"{library}: {right} on the driver, a; 0.0.1 on b; needed one version")


def test_another_checkout_of_one_version_is_found(survey):
    survey.reports["a"]["code"] = "0" * 12
    (text,) = found(software(survey, needs(survey)), "FAIL")
    assert "the code of expertail differs" in text and "000000000000 on a" in text


def test_other_processors_and_pythons_are_warned_of(survey):
    survey.reports["a"]["machine"] = "aarch64"
    survey.reports["b"]["versions"]["python"] = "3.11.0"
    processors, python = sorted(found(software(survey, needs(survey)), "warn"), reverse=True)
    assert "aarch64" in processors and "last bits" in processors and "3.11.0 on b" in python


def test_a_cpu_build_on_a_node_with_gpus_is_a_failure(survey):
    survey.resources["a"]["GPU"] = 1.0
    survey.reports["a"]["torch"]["cuda"] = None
    words = ("cluster.gpus_per_worker=1",)
    (text,) = found(software(survey, needs(survey, *words)), "FAIL")
    assert text.startswith("a: has GPUs but a CPU build")


def test_a_torch_that_does_not_load_is_a_failure(survey):
    survey.reports["a"]["torch"] = "OSError: libgomp"
    assert "libgomp" in found(software(survey, needs(survey)), "FAIL")[0]


def test_memory_is_counted_for_the_workers_that_land_on_a_node(survey):
    """Three workers on two nodes of two places: two on a, one on b; 0.8 to 1.5 GiB each."""
    for report in survey.reports.values():
        report["room"].update(memory=4 * GIB, memory_free=4 * GIB)
    assert not found(node_checks._memory(survey, needs(survey)), "FAIL")
    survey.reports["a"]["room"]["memory_free"] = 2.9 * GIB
    (text,) = found(node_checks._memory(survey, needs(survey)), "warn")
    assert text.startswith("a: 2 workers of 0.8 to 1.5 GiB; 2.9 of 4.0 GiB free")
    survey.reports["a"]["room"]["memory"] = 1.5 * GIB
    assert found(node_checks._memory(survey, needs(survey)), "FAIL")[0].startswith("a: 2 workers")
    assert "0.8" in found(node_checks._memory(survey, needs(survey, weights=None)), "FAIL")[0]


def test_a_workers_memory_grows_with_its_weights_and_its_files():
    digits = load_config([])
    assert worker_gib(digits, GIB) == (1.8, 2.5)
    words = ["dataset=image_folder_lt", "pace=cifar10_lt", "dataset.resident_mib=1024"]
    assert worker_gib(load_config(words), 0) == (0.8, 3.5)
    assert worker_gib(load_config(["cluster.memory_gib_per_worker=2"]), 0)[1] == 2


def test_a_small_dev_shm_is_warned_of(survey):
    """64 MiB is what containers get; 2 workers have 5 batches of 600 images of 64 x 64 on their way each, 70 MiB."""
    survey.reports["a"]["room"].update(shm=64 * 2**20, shm_free=64 * 2**20)
    (text,) = found(node_checks._shared_memory(survey, needs(survey)), "warn")
    assert text.startswith("a: ") and "the size of the object store" in text
    survey.resources["a"]["object_store_memory"] = 1e6
    assert not found(node_checks._shared_memory(survey, needs(survey)), "warn")
    words = ("dataset=image_folder_lt", "dataset.image_size=64", "dataset.loader_processes=2")
    (text,) = found(node_checks._shared_memory(survey, needs(survey, *words, decoded=[600])), "FAIL")
    assert text.startswith("a: /dev/shm: 64.0 of 64.0 MiB are free; loader processes hand over up to 70.3 MiB")


def test_data_that_differ_are_named_with_file_and_nodes(survey):
    words = ("dataset=fashion_mnist_lt",)
    for name in ("a", "b"):
        survey.reports[name]["data"] = {"x.gz": "10 aa", "y.gz": "10 bb"}
    config = needs(survey, *words).config
    assert "2 files compared, the same on 2 nodes" in found(node_checks._data(survey, config), "ok")[0]
    survey.reports["b"]["data"] = {"x.gz": "11 cc"}
    (text,) = found(node_checks._data(survey, config), "FAIL")
    assert text.startswith("x.gz (size, digest): 10 aa on a; 11 cc on b; and 1 more file;")
    survey.reports["a"]["data"] = "dataset.root = /x: found nothing"
    assert found(node_checks._data(survey, config), "FAIL") == ["a: dataset.root = /x: found nothing"]


def test_an_open_ray_without_a_token_is_warned_of(survey):
    survey.reports["b"]["token"] = False
    (text,) = found(node_checks._exposure(survey), "warn")
    assert text.startswith("Ray on b asks for no token, and raylet can be reached")
    for name in ("a", "b"):
        survey.reports[name]["listening"] = [("raylet", "127.0.0.1", 700)]
    assert "loopback" in found(node_checks._exposure(survey), "ok")[0]
    survey.reports["a"]["listening"] = [("dashboard", "0.0.0.0", 8265)]
    assert "dashboard listens on every address of a port 8265" in found(node_checks._exposure(survey), "warn")[1]


def test_what_a_node_cannot_find_out_is_reported_and_the_rest_is_compared(survey):
    for what in ("room", "token", "listening", "torch", "data", "code"):
        survey.reports["a"][what] = f"OSError: no {what}"
    checks = [node_checks._memory, node_checks._shared_memory]
    findings = [f for check in checks for f in check(survey, needs(survey, weights=0))]
    findings += [*node_checks._unknowns(survey), *node_checks._exposure(survey), *software(survey, needs(survey))]
    told = "\n".join(found(findings, "warn") + found(findings, "FAIL"))
    assert "a: memory and /dev/shm could not be determined (OSError: no room)" in told
    assert "a: Ray's authentication could not be determined (OSError: no token)" in told
    assert "OSError: no code on a" in told and "OSError: no torch" in told
    assert [text for text in found(findings, "ok") if text.startswith("b: ")], "memory of the other node"
    assert "token authentication is on, on 1 node" in found(findings, "ok")


def test_a_node_that_fails_to_find_out_one_thing_reports_the_others(monkeypatch):
    def fails(*args):
        raise PermissionError(13, "Permission denied", "/dev/shm")

    for name in ("room", "listening", "token_needed", "code_digest"):
        monkeypatch.setattr(node_report, name, fails)
    digits = load_config([]).dataset.model_dump(mode="json")
    report = node_report.report(digits)
    assert all("Permission denied" in report[name] for name in ("room", "listening", "token", "code"))
    assert report["data"] == {} and report["versions"]["torch"] != "none"


def test_a_comparison_that_breaks_is_a_finding_of_its_own():
    def broken():
        yield Finding("ok", "memory", "first")
        raise KeyError("memory")

    assert [(f.state, f.text) for f in run_check("memory", broken)] == [("ok", "first"), ("FAIL", "KeyError: 'memory'")]


def test_clocks_apart_are_warned_of():
    assert found(node_checks._clock_findings({"a": 0.1, "b": -2.0}), "ok") == [
        "2 nodes at most 2.00 s off this machine's clock"
    ]
    ahead, behind = found(node_checks._clock_findings({"a": 7.0, "b": -61.5}), "warn")
    assert ahead.startswith("a: 7.0 s ahead of this machine") and behind.startswith("b: 61.5 s behind this machine")


# What a node sees


def seen(root, *words):
    config = load_config([f"dataset.root={root}", *words])
    return node_report.data_digests(config.dataset.model_dump(mode="json"))


def test_a_changed_byte_of_an_array_file_is_seen(tmp_path):
    for name in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / name).write_bytes(b"some bytes")
    before = seen(tmp_path, "dataset=fashion_mnist_lt")
    assert len(before) == 2 and all(value.startswith("10 ") for value in before.values())
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"other byte")
    after = seen(tmp_path, "dataset=fashion_mnist_lt")
    assert {name for name in before if before[name] != after[name]} == {"t10k-labels-idx1-ubyte.gz"}


def test_a_root_that_is_empty_or_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found no file of cifar10_lt"):
        seen(tmp_path, "dataset=cifar10_lt")
    with pytest.raises(ValueError, match="no class folder"):
        seen(tmp_path, "dataset=image_folder_lt", "pace=cifar10_lt")
    with pytest.raises(ValueError, match="found nothing"):
        seen(tmp_path / "none", "dataset=cifar10_lt")


def test_class_folders_and_lists_are_seen(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    folder = ("dataset=image_folder_lt", "pace=cifar10_lt")
    before = seen(tmp_path, *folder)
    assert before["class folders of train"].startswith("2 ") and "test/dog/2.png" in before
    (tmp_path / "train/eel").mkdir()
    assert seen(tmp_path, *folder)["class folders of train"] != before["class folders of train"]
    (tmp_path / "all.txt").write_text("train/cat/1.png 0\ntrain/dog/1.png 1\n")
    lists = (
        "dataset=image_list",
        "pace=cifar10_lt",
        "dataset.train_list=all.txt",
        "dataset.test_list=all.txt",
    )
    assert set(seen(tmp_path, *lists)) == {
        "dataset.train_list", "dataset.test_list", "train/cat/1.png", "train/dog/1.png",
    }  # fmt: skip
    (tmp_path / "train/dog/1.png").unlink()
    with pytest.raises(ValueError, match=r"train/dog/1\.png, listed in .*all\.txt, is missing"):
        seen(tmp_path, *lists)


def test_a_port_answers_its_nonce_and_nothing_else():
    import socket
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:
        serving = threading.Thread(target=node_report.serve_nonce, args=(server, b"right"), daemon=True)
        serving.start()
        assert node_report._connect(server.getsockname(), b"right") is None
        assert node_report._connect(server.getsockname(), b"wrong") == "something else answers there"
        server.shutdown(socket.SHUT_RDWR)
        serving.join(5)
        assert not serving.is_alive()
        free = ("127.0.0.1", 9)
        assert "refused" in node_report._connect(free, b"right")


def test_nodes_that_stay_silent_are_not_all_waited_for(monkeypatch):
    """Two callers and 40 nodes that accept and say nothing: after 0.1 s no other node is called."""
    import socket
    import time

    monkeypatch.setattr(node_report, "_THREADS", 2)
    monkeypatch.setattr(node_report, "_CONNECT_S", 0.06)
    monkeypatch.setattr(node_report, "_CONNECTING_S", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        others = {f"node{i:02d}": silent.getsockname() for i in range(40)}
        begun = time.monotonic()
        problems, left = node_report.connect_all(others, b"nonce")
        assert time.monotonic() - begun < 1.0
    assert set(problems.values()) == {"timed out"} and 2 <= len(problems) <= 4
    assert sorted([*problems, *left]) == list(others)


def test_nodes_that_were_not_asked_are_named(survey, monkeypatch):
    survey.reporters = dict.fromkeys("ab")
    answers = iter([({"a": ("h", 1), "b": ("h", 2)}, {}), ({"a": ({"b": "timed out"}, ["c", "d"]), "b": ({}, [])}, {})])
    monkeypatch.setattr(survey, "ask", lambda call: next(answers))
    (text,) = found(node_checks._ports(survey), "FAIL")
    assert text.splitlines()[:2] == ["a to b: timed out", "a: no time was left to connect to c, d"]
