"""Errors of exchanges: those a run survives, because a partner is gone, and those that would come again."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError

from experts.data.prefetch import LoaderLost
from orchestration.cluster.failures import WorkerLost, broken_exchange, refusal
from orchestration.training.world import Rendezvous, leave_world

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] "
TRACE = 'Traceback:\n  File "torch/distributed/distributed_c10d.py", line 4079, in all_gather\n'


def raised(cause):
    """Return what Ray hands on for an error that an exchange raised."""
    return RayTaskError("evaluate", f"{TRACE}{type(cause).__name__}: {cause}", cause)


@pytest.mark.parametrize(
    ("cause", "why"),
    [
        (RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:40672."), "failure"),
        (RuntimeError(f"{GLOO}Read error [127.0.0.1]:1234: Connection reset by peer"), "failure"),
        (RuntimeError("Application timeout caused pair closure"), "hang"),
        (RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"), "hang"),
        (RuntimeError("NCCL communicator was aborted on rank 1"), "failure"),
        (dist.DistBackendError("ncclRemoteError: a remote process exited or there was a network error"), "failure"),
        (dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0/0"), "hang"),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), "failure"),
    ],
    ids=str,
)
def test_a_partner_that_is_gone_is_a_lost_worker(cause, why):
    found = broken_exchange(raised(cause))
    assert found is not None
    assert found.why == why


@pytest.mark.parametrize(
    "cause",
    [
        RuntimeError("No backend type associated with device type cpu"),
        RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 1 (expected (3), got (2))"),
        NotImplementedError("Could not run 'c10d::allgather_' with arguments from the 'SparseCPU' backend."),
        RuntimeError("Tensors must be contiguous"),
        dist.DistBackendError("ncclInvalidUsage: invalid usage. Duplicate GPU detected : rank 0 and rank 1"),
    ],
    ids=str,
)
def test_a_refused_exchange_is_not(cause):
    """Trying it again five times would fail five times."""
    error = raised(cause)
    assert refusal(error) is None
    assert broken_exchange(error) is None


def test_words_of_a_trace_do_not_make_an_error_an_exchange():
    cause = RuntimeError("division by zero")
    assert broken_exchange(RayTaskError("train", f"{TRACE}{cause}\n  nccl timeout connection", cause)) is None


def test_the_backend_refuses_what_it_says_it_refuses():
    """The words above are those of the installed torch."""
    Rendezvous("127.0.0.1", 1, host_here=True).join(0, 1, gpu=False, timeout_s=10)
    try:
        with pytest.raises(RuntimeError, match="invalid tensor size") as caught:
            dist.all_gather([torch.zeros(2)], torch.zeros(3))
    finally:
        leave_world()
    assert broken_exchange(raised(caught.value)) is None


def test_a_loader_process_that_ended_is_a_lost_worker():
    cause = LoaderLost("a loader process (7) has ended: SIGTERM")
    assert isinstance(refusal(raised(cause)), WorkerLost)


def test_an_operation_that_cannot_repeat_its_bits_is_refused_with_its_name():
    """In the installed torch's words; one of the few operations that a CPU refuses as well."""
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
    found = refusal(RayTaskError("train", TRACE, caught.value))
    assert isinstance(found, ValueError)
    assert "engine.deterministic = true: put_ has no kernel" in str(found)


@pytest.mark.parametrize("name", ["BackendCompilerFailed", "InductorError", "InternalTorchDynamoError"])
def test_code_that_cannot_be_made_is_refused_with_the_reason(name):
    import torch._dynamo.exc as tracing
    import torch._inductor.exc as generating

    assert hasattr(tracing, name) or hasattr(generating, name), "the installed torch has it"
    cause = type(name, (RuntimeError,), {})("CppCompileError: C++ compile error\nmuch more")
    found = refusal(RayTaskError("train", TRACE, cause))
    assert isinstance(found, ValueError)
    assert "engine.compile = true: torch could not compile the network (CppCompileError: C++ compile err" in str(found)
