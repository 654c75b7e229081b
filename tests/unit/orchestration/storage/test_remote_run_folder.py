"""Run folders at a URL: what is there after every possible end of a put, and who may write it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading

import pytest
from fsspec.implementations.local import LocalFileSystem

from orchestration.config.compose import load_config
from orchestration.storage import remote_run_folder as storage
from orchestration.storage import url_lock
from orchestration.storage import url_store as store
from orchestration.storage.checkpoint import Checkpoints, verify, write_file
from orchestration.storage.location import check_run_dir, local_run, run_path
from orchestration.storage.remote_run_folder import RemoteRunFolder
from orchestration.storage.url_store import StorageProblem, UrlStore, check_access


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(url_lock, "_SETTLE_S", 0.0)
    monkeypatch.setattr(url_lock, "BEAT_S", 0.1)
    monkeypatch.setattr(url_lock, "STALE_S", 1.0)
    monkeypatch.setattr(storage, "_RETRY_S", 0.05)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no test here switches the machine off


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/bucket/runs/one"


def train(folder, step, keep=2):
    """What training to a step leaves: its lines, then its checkpoint, one older kept. Multiples of 8 are the best."""
    done = steps(folder)[1]
    with open(folder.path / "metrics.jsonl", "a") as journal:
        journal.writelines(json.dumps({"step": s}) + "\n" for s in range(done + 1, step + 1))
    kept = Checkpoints(folder.path, ["train"])
    writing = kept.begin()
    entries = [write_file(writing, "trunk.safetensors", b"%08d" % step)]
    best = {"step": step - step % 8, "checkpoint": f"best-{kept.name('train', step - step % 8)}"} if step >= 8 else None
    complete = kept.complete(writing, kept.name("train", step), entries, {"step": step, "best": best})
    if step % 8 == 0:
        kept.copy_weights(complete, best["checkpoint"])
    kept.prune("train", complete, keep)


def finish(folder):
    (folder.path / "export").mkdir(exist_ok=True)
    (folder.path / "export" / "model").write_text("trained")
    folder.update_run(status="finished")


def steps(folder):
    """Steps of the newest checkpoint that is whole, and of the journal."""
    newest = Checkpoints(folder.path, ["train"]).newest_verified("train", lambda _: None)
    if newest and newest.state["best"] and newest.state["best"]["step"] != newest.state["step"]:  # else made again
        verify(folder.path / "checkpoints" / newest.state["best"]["checkpoint"])
    journal = folder.path / "metrics.jsonl"
    return (newest.state["step"] if newest else 0), len(journal.read_text().splitlines()) if journal.exists() else 0


def elsewhere(url, tmp_path, name="elsewhere"):
    """The run as another node gets it."""
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    return RemoteRunFolder(tmp_path / name, url)


def put(url, tmp_path):
    """A run that was trained to step 4 here, and put."""
    folder = RemoteRunFolder(tmp_path / "here", url)
    train(folder, 4)
    folder.wait_until_stored(10)
    folder.close()


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name[0] != "."}


def test_what_is_put_is_what_another_node_gets(url, tmp_path):
    folder = RemoteRunFolder(tmp_path / "here", url)
    for step in (4, 8, 12):
        train(folder, step)
        folder.announce_checkpoint()
    finish(folder)
    folder.wait_until_stored(10)
    folder.close()
    other = elsewhere(url, tmp_path)
    assert contents(other.path) == contents(folder.path)
    kept = sorted(p.name for p in (other.path / "checkpoints").iterdir())
    assert kept == ["00-train-00000008", "00-train-00000012", "best-00-train-00000008"]
    other.close()
    assert not (tmp_path / "bucket/runs/one/lock.json").exists()
    there = tmp_path / "bucket/runs/one/checkpoints"
    assert sorted(p.name for p in there.iterdir()) == kept, "folders of what was tidied away"


class Budget:
    """Counts what the sender asks of the storage, does something at one request and cuts it off at another."""

    def __init__(self, monkeypatch):
        self.asked, self.at, self.do, self.limit = 0, None, None, 10**6
        self.cut = threading.Event()
        remove = UrlStore.remove
        for name in ("write", "put"):
            monkeypatch.setattr(UrlStore, name, self._counted(getattr(UrlStore, name)))
        one = self._counted(lambda store, name: remove(store, [name]))
        monkeypatch.setattr(UrlStore, "remove", lambda store, names: [one(store, name) for name in names])

    def _counted(self, method):
        def call(store, name, *rest):
            if threading.current_thread().name == "storage":  # not the lock's
                self.asked += 1
                if self.asked == self.at:
                    self.do()
                if self.asked > self.limit:
                    self.cut.set()
                    raise StorageProblem("cut off")
            return method(store, name, *rest)

        return call

    def begin(self, limit, at=None, do=None):
        self.asked, self.limit, self.at, self.do = 0, limit, at, do
        self.cut.clear()

    def settled(self, folder):
        """Whether all was put before it was cut off."""
        while not self.cut.is_set():
            with contextlib.suppress(StorageProblem):
                folder.wait_until_stored(0.02)
                return True
        return False


def lost_and_found(folder, url, tmp_path, budget):
    """The node is lost with its copy. What another one has: steps of the newest checkpoint, and whether it is told
    finished. Its journal reaches there, its best weights are whole, and so is what finished means."""
    budget.begin(0)  # it tries again for as long as it lives
    folder.close()
    shutil.rmtree(folder.path)
    budget.begin(10**6)
    other = elsewhere(url, tmp_path)
    step, journal = steps(other)
    assert journal >= step
    finished = other.read_run().get("status") == "finished"
    if finished:
        assert (other.path / "export" / "model").read_text() == "trained"
    other.wait_until_stored(10)
    other.close()
    return step, finished


@pytest.mark.parametrize("scheme", ["file", "memory"])
@pytest.mark.slow
def test_cut_off_at_any_moment_the_newest_checkpoint_has_its_journal(scheme, tmp_path, monkeypatch):
    """Every write and removal in turn is the last that reaches the storage; memory:// stands for object stores, which
    write whole files."""
    monkeypatch.setattr(store, "_WHOLE", {"memory"})
    budget, last = Budget(monkeypatch), 0
    for moment in range(100):
        url = f"{scheme}://{tmp_path}/bucket/runs/{moment}"
        folder = RemoteRunFolder(tmp_path / "here", url)
        train(folder, 4)
        folder.wait_until_stored(10)
        budget.begin(moment)
        for step in (8, 12, 16, 20):
            train(folder, step)
        finish(folder)
        ended = budget.settled(folder)
        step, finished = lost_and_found(folder, url, tmp_path, budget)
        assert step >= max(4, last), "what was there is gone"
        assert step == 20 or not finished
        last = step
        if ended:
            break
    assert moment > 12 and last == 20


@pytest.mark.parametrize("further", [0, 1, 2, 4, 7, 9, 11, 13])
@pytest.mark.slow
def test_what_training_does_meanwhile_breaks_no_promise(further, tmp_path, monkeypatch):
    """While anything is put, training writes checkpoints, tidies away the one on its way, and ends; then, at once or so
    many writes later, the storage is cut off."""
    monkeypatch.setattr(store, "_WHOLE", {"memory"})
    budget = Budget(monkeypatch)
    for moment in range(1, 12):
        url = f"memory://{tmp_path}/bucket/runs/{moment}"
        folder = RemoteRunFolder(tmp_path / "here", url)
        folder.update_run(status="running")
        (folder.path / "a").write_text("first")
        train(folder, 4, keep=1)
        folder.wait_until_stored(10)
        (folder.path / "a").write_text("second")

        def meanwhile(folder=folder):
            for step in (12, 16, 20):
                train(folder, step, keep=1)
            finish(folder)

        budget.begin(moment + further, at=moment, do=meanwhile)
        train(folder, 8, keep=1)
        budget.settled(folder)
        step, finished = lost_and_found(folder, url, tmp_path, budget)
        assert step >= 4, "what was there is gone"
        assert step == 20 or not finished


def test_the_copy_that_goes_on_from_what_is_there_is_kept(url, tmp_path):
    """Killed before its last checkpoint was put: on the same node nothing is lost."""
    folder = RemoteRunFolder(tmp_path / "here", url)
    train(folder, 4)
    folder.wait_until_stored(10)
    train(folder, 8)
    folder.close()
    again = RemoteRunFolder(tmp_path / "here", url)
    assert steps(again) == (8, 8)
    again.wait_until_stored(10)
    again.close()
    other = elsewhere(url, tmp_path)
    assert steps(other) == (8, 8)
    other.close()


def test_a_copy_that_is_older_than_what_is_there_is_made_new(url, tmp_path, capsys):
    folder = RemoteRunFolder(tmp_path / "here", url)
    train(folder, 4)
    folder.wait_until_stored(10)
    train(folder, 8)  # never put
    folder.close()
    other = elsewhere(url, tmp_path)
    train(other, 6)
    other.wait_until_stored(10)
    other.close()
    back = RemoteRunFolder(tmp_path / "here", url)
    assert steps(back) == (6, 6)
    assert not list((back.path / "checkpoints").glob("*8"))
    back.close()
    assert (tmp_path / ".here.replaced" / "checkpoints" / "00-train-00000008").is_dir()
    assert "another start has gone on with the run" in capsys.readouterr().err


def test_looking_at_a_run_makes_no_copy_old(url, tmp_path):
    """Killed before its last checkpoint was put; somebody reads the run elsewhere meanwhile."""
    folder = RemoteRunFolder(tmp_path / "here", url)
    train(folder, 4)
    folder.wait_until_stored(10)
    train(folder, 8)
    folder.close()
    other = elsewhere(url, tmp_path)
    other.wait_until_stored(10)
    other.close()
    again = RemoteRunFolder(tmp_path / "here", url)
    assert steps(again) == (8, 8)
    again.close()


def test_storage_that_has_lost_its_checkpoints_is_refused(url, tmp_path):
    put(url, tmp_path)
    shutil.rmtree(tmp_path / "bucket/runs/one/checkpoints")
    with pytest.raises(ValueError, match=r"storage.json: lists 1 checkpoints, and none is whole there"):
        elsewhere(url, tmp_path)


def test_half_sent_files_are_removed(url, tmp_path):
    RemoteRunFolder(tmp_path / "here", url).close()
    part = tmp_path / "bucket/runs/one/run.json.part-12345678"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("{")
    RemoteRunFolder(tmp_path / "here", url).close()
    assert not part.exists()


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(url, tmp_path, monkeypatch):
    put(url, tmp_path)
    listed = LocalFileSystem.ls

    def ls(self, path, *rest, **more):
        if str(path).endswith("checkpoints"):
            raise PermissionError("not yours")
        return listed(self, path, *rest, **more)

    monkeypatch.setattr(LocalFileSystem, "ls", ls)
    with pytest.raises(ValueError, match=r"cannot be listed \(PermissionError: not yours"):
        elsewhere(url, tmp_path)


def test_a_failed_connection_is_opened_again(url, tmp_path, monkeypatch):
    """As of sftp, whose connection does not come back by itself."""
    kept, opened = UrlStore(url), []
    connect = UrlStore._connect
    monkeypatch.setattr(UrlStore, "_connect", lambda self: (opened.append(1), connect(self))[1])
    kept.write("a", b"1")
    monkeypatch.setattr(LocalFileSystem, "cat_file", lambda *_, **__: (_ for _ in ()).throw(EOFError("closed")))
    with pytest.raises(StorageProblem, match="EOFError: closed"):
        kept.read("a")
    monkeypatch.undo()
    assert kept.read("a") == b"1"


def test_a_copy_whose_making_was_cut_off_is_made_again(url, tmp_path, monkeypatch):
    put(url, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(UrlStore, "get", lambda *_: (_ for _ in ()).throw(StorageProblem("cut off")))
        with pytest.raises(StorageProblem, match="cut off"):
            elsewhere(url, tmp_path)
    other = RemoteRunFolder(tmp_path / "elsewhere", url)
    assert steps(other) == (4, 4)
    other.close()


def test_a_run_that_was_removed_there_starts_from_nothing(url, tmp_path):
    put(url, tmp_path)
    shutil.rmtree(tmp_path / "bucket")
    again = RemoteRunFolder(tmp_path / "here", url)
    assert steps(again) == (0, 0)
    again.close()


def test_files_of_others_beside_the_run_are_left_alone(url, tmp_path):
    folder = RemoteRunFolder(tmp_path / "here", url)
    (tmp_path / "bucket/runs/one/notes.txt").write_text("ours")
    train(folder, 4)
    folder.wait_until_stored(10)
    folder.close()
    assert (tmp_path / "bucket/runs/one/notes.txt").read_text() == "ours"


@pytest.mark.slow
def test_a_run_that_is_carried_out_elsewhere_is_refused(url, tmp_path):
    holder = RemoteRunFolder(tmp_path / "here", url)
    with pytest.raises(ValueError, match=r"already being carried out by process \d+ on .*run\.name"):
        RemoteRunFolder(tmp_path / "elsewhere", url)
    holder.close()
    RemoteRunFolder(tmp_path / "elsewhere", url).close()


@pytest.mark.parametrize("place", ["gone machine", None])
@pytest.mark.slow
def test_a_lock_without_a_sign_of_life_is_taken(url, tmp_path, place):
    """At once if its holder had the same copy on this machine, which is locked; else after a while."""
    holder = RemoteRunFolder(tmp_path / "here", url)
    path = tmp_path / "bucket/runs/one/lock.json"
    content = json.loads(path.read_text())
    holder.close()
    path.write_text(json.dumps(content | ({"place": place} if place else {})))
    RemoteRunFolder(tmp_path / "here", url).close()


def test_a_holder_that_lost_the_lock_writes_nothing_more(url, tmp_path):
    holder = RemoteRunFolder(tmp_path / "here", url)
    train(holder, 4)
    holder.wait_until_stored(10)
    lock = tmp_path / "bucket/runs/one/lock.json"
    lock.write_text(json.dumps({"token": "another", "holder": "process 1 on elsewhere"}))
    before = contents(tmp_path / "bucket")
    train(holder, 8)
    with pytest.raises(ValueError, match=r"taken over by process 1 on elsewhere|not there yet"):
        holder.wait_until_stored(1)
    with pytest.raises(ValueError, match="taken over by process 1 on elsewhere"):
        holder.announce_checkpoint()
    holder.close()
    assert contents(tmp_path / "bucket") == before


def test_storage_that_fails_for_a_while_stops_nothing(url, tmp_path, monkeypatch, capsys):
    folder = RemoteRunFolder(tmp_path / "here", url)
    write, fails = UrlStore.write, [3]

    def failing(self, name, data):
        if name == "metrics.jsonl" and fails[0]:
            fails[0] -= 1
            raise StorageProblem("away")
        write(self, name, data)

    monkeypatch.setattr(UrlStore, "write", failing)
    train(folder, 4)
    folder.announce_checkpoint()
    folder.wait_until_stored(10)
    folder.close()
    assert capsys.readouterr().err.count("away; training goes on") == 1
    other = elsewhere(url, tmp_path)
    assert steps(other) == (4, 4)
    other.close()


def test_files_that_could_not_be_sent_are_reported_with_their_place(url, tmp_path, monkeypatch):
    folder = RemoteRunFolder(tmp_path / "here", url)
    monkeypatch.setattr(UrlStore, "write", lambda *_: (_ for _ in ()).throw(StorageProblem("no credentials")))
    train(folder, 4)
    with pytest.raises(ValueError, match=rf"not there yet \(no credentials\); it is in {folder.path}"):
        folder.wait_until_stored(0.3)
    folder.close()


def test_a_checkpoint_that_is_damaged_there_is_found(url, tmp_path):
    folder = RemoteRunFolder(tmp_path / "here", url)
    for step in (4, 8):
        train(folder, step)
        folder.wait_until_stored(10)
    folder.close()
    (tmp_path / "bucket/runs/one/checkpoints/00-train-00000008/trunk.safetensors").write_bytes(b"00000009")
    other = elsewhere(url, tmp_path)
    assert steps(other)[0] == 4
    assert verify(other.path / "checkpoints/00-train-00000004")["step"] == 4
    other.close()


WORDS = ["method=ce", "dataset=digits_lt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run.dir=nosuch://bucket/runs"], r"run.dir = nosuch://bucket/runs: .*needed a library for nosuch://"),
        (["run.dir=sftp://me:secret@host/runs"], r"with a password in it.*needed a URL without one"),
        (["run.dir=file:///tmp/runs"], r"tracking.uri is not set.*set tracking.uri"),
    ],
)
def test_urls_that_cannot_serve_are_refused(words, message):
    with pytest.raises(ValueError, match=message) as refused:
        check_run_dir(load_config([*WORDS, *words]))
    assert "secret" not in str(refused.value)


def test_runs_of_different_urls_have_different_copies():
    one, two = (load_config([*WORDS, f"run.dir=s3://bucket/{name}", "run.local_dir=/scratch"]) for name in "ab")
    assert run_path(one).parent != run_path(two).parent
    assert run_path(one).parent.parent == run_path(two).parent.parent
    assert str(run_path(one)).startswith("/scratch/")


def test_storage_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be read .*needed storage that this node can read and write"):
        RemoteRunFolder(tmp_path / "here", f"file://{tmp_path}/file/runs/one")
    with pytest.raises(ValueError, match="cannot be opened"):
        UrlStore("nosuch://bucket")


def test_commands_take_the_url_of_a_run_and_put_back_what_they_write(url, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = RemoteRunFolder(tmp_path / "here", url)
    (folder.path / "config.yaml").write_text("a run's")
    folder.wait_until_stored(10)
    folder.close()
    with local_run(url) as copy:
        assert copy.startswith(str(tmp_path / ".cache"))
        with open(f"{copy}/found.json", "w") as file:
            file.write("{}")
    assert (tmp_path / "bucket/runs/one/found.json").read_text() == "{}"
    with (
        pytest.raises(ValueError, match=r"no run there \(no config.yaml\); needed the URL of one"),
        local_run(f"{url}x"),
    ):
        pass
    assert not (tmp_path / "bucket/runs/onex").exists()
    with local_run("runs/of/a/path") as same:
        assert same == "runs/of/a/path"


def test_the_doctor_leaves_nothing_behind(tmp_path):
    check_access(f"file://{tmp_path}/bucket")
    assert list((tmp_path / "bucket").iterdir()) == []
