"""Errors and values of any type, text and size, sent from an actor as they are or as what means the same."""

from __future__ import annotations

import errno

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayTaskError

from experts.data.decode import UnreadableImage
from orchestration.cluster.failures import WorkerLost, broken_exchange, refusal
from orchestration.cluster.sending import LONGEST, WorkerFault, arrives, call, plain
from orchestration.storage.checkpoint import DamagedCheckpoint
from tests.raiser import NAME, Choosy, HoldsALock, PickleRaises, Raiser, Silent, TwoArguments

ERRORS = [
    (UnreadableImage(NAME, "an empty file", "restore it"), ValueError, r"caf\xe9.jpg: an empty file; restore it"),
    (DamagedCheckpoint(f"{NAME}: changed"), DamagedCheckpoint, r"caf\xe9.jpg: changed"),
    (ValueError("a lone \ud800 half"), ValueError, r"a lone \ud800 half"),
    (TwoArguments("list.txt", 3), ValueError, "list.txt:3"),
    (HoldsALock("no class folder"), ValueError, "no class folder"),
    (PickleRaises("no image"), ValueError, "no image"),
    (Silent(), ValueError, "Silent without a text"),
    (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid"), ValueError, "can't decode byte 0xe9"),
    (OSError(errno.ENOSPC, "No space left on device", NAME), OSError, "No space left on device: 'caf"),
    (FileNotFoundError(errno.ENOENT, "No such file", b"caf\xe9.jpg"), FileNotFoundError, r"caf\xe9.jpg"),
    (MemoryError(NAME), WorkerLost, r"caf\xe9.jpg"),
    (FloatingPointError(NAME), FloatingPointError, r"caf\xe9.jpg"),
]


def sent(error):
    """Return an error as the driver gets it from Ray, without Ray: raised, pickled, made text and built again."""
    try:
        try:
            raise error
        except Exception as raised:
            if not arrives(raised):
                raise plain(raised) from None
            raise
    except Exception as raised:
        cause = cloudpickle.loads(cloudpickle.dumps(raised))
        return RayTaskError("train", f"Traceback:\n{cause}".encode().decode(), cause)


@pytest.mark.parametrize(("error", "kind", "text"), ERRORS, ids=lambda value: type(value).__name__)
def test_a_refusal_stays_a_refusal_whatever_it_says_and_however_it_is_made(error, kind, text):
    refused = refusal(sent(error))
    assert isinstance(refused, kind)
    assert text in str(refused)
    assert str(refused).encode()
    if isinstance(error, OSError):  # the driver looks at the number: a full disk is explained
        assert refused.errno == error.errno


def test_what_can_be_sent_goes_as_it_is():
    for error in (DamagedCheckpoint("x: changed"), UnreadableImage("a.jpg", "empty", "restore it"), KeyError("a")):
        assert arrives(error)
    assert arrives(WorkerFault("A", "b", "c"))


def test_an_unexpected_error_keeps_kind_text_and_place():
    fault = sent(Choosy(this=NAME, that="that")).cause
    assert isinstance(fault, WorkerFault)
    assert (fault.kind, fault.text) == ("Choosy", r"caf\xe9.jpg and that")
    assert "test_sending.py" in fault.trace and fault.trace.endswith(r"Choosy: caf\xe9.jpg and that")
    assert refusal(sent(Choosy(this="a", that="b"))) is None


def test_an_exchange_that_breaks_with_a_name_in_it_is_still_a_lost_partner():
    class Unsendable(RuntimeError):
        def __reduce__(self):
            raise AttributeError

    broken = sent(Unsendable(f"gloo/transport/tcp/pair.cc: Connection closed by peer {NAME}"))
    assert isinstance(broken_exchange(broken), WorkerLost)


def test_a_message_of_any_size_arrives_with_its_beginning_and_end():
    text = str(plain(ValueError(f"begins{'x' * 10**6}ends")))
    assert text.startswith("begins") and text.endswith("ends")
    assert "983,626 characters left out" in text
    assert len(text) < LONGEST + 100


@pytest.mark.ray
def test_ray_brings_all_of_them_and_any_text(local_ray):
    actor = ray.remote(num_cpus=0)(Raiser).remote()
    try:
        value = {"class_names": [NAME, "\ud800"], NAME: (NAME, [b"\xe9"])}
        assert ray.get(call(actor.give_back, value)) == value
        for name, text in (
            ("bytes", r"caf\xe9.jpg"),
            ("two", "list.txt:3"),
            ("lock", "no class folder"),
            ("pickle", "no image"),
            ("silent", "Silent without a text"),
            ("large", "characters left out"),
        ):
            with pytest.raises(RayTaskError) as caught:
                ray.get(actor.fail.remote(name))
            assert isinstance(refused := refusal(caught.value), ValueError)
            assert text in str(refused)
        with pytest.raises(RayTaskError, match="SystemExit: 3"):
            ray.get(actor.fail.remote("exit"))
        assert ray.get(call(actor.give_back, NAME)) == NAME  # the same process, after all of them
    finally:
        ray.kill(actor)
