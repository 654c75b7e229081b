"""Translate errors of workers: into a loss that the run survives, or a refusal that an operator can act on."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from orchestration.cluster.sending import WorkerFault

_EXCHANGE_WORDS = ("gloo", "nccl", "torch/distributed", "torch.distributed")
"""Found in the trace of every error of an exchange."""
_PARTNER_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
_PARTNER_WORDS = (
    "gloo/transport", "connectfullmesh", "nccl", "connection", "pair closure", "timed out", "timeout", "broken pipe",
    "0 bytes", "socket",
)  # fmt: skip
"""Types and words of an error that came from the other side, or from the network. gloo raises no type of its own."""
_REFUSED_WORDS = ("invalid usage", "invalid argument")
"""NCCL's, for calls that would fail every time, as of two workers on one GPU."""

_NOT_REPEATABLE = "does not have a deterministic implementation"
"""torch's words after the name of an operation."""
_COMPILER_TYPES = ("BackendCompilerFailed", "InductorError", "InternalTorchDynamoError")


class WorkerLost(RuntimeError):
    """A worker died or hangs; the run can go on from its newest checkpoint.

    Attributes:
        why: "failure"; "hang"; "memory": ended for using too much; "preemption": its node was taken away with notice.
    """

    def __init__(self, text: str, why: str = "failure") -> None:
        super().__init__(text)
        self.why = why


def refusal(error: RayTaskError) -> Exception | None:
    """Return the error that a worker raised for an operator to act on; None if it raised another."""
    cause = error.cause
    kind, said = _kind_and_text(cause)
    # Ray carries the worker's exception along as the cause.
    if isinstance(cause, ValueError | FloatingPointError | OSError):
        return cause
    if isinstance(cause, MemoryError) or "can't allocate memory" in str(error):
        return WorkerLost(f"a worker is out of memory: {_last_line(said)}", "memory")
    if kind == "LoaderLost":
        return WorkerLost(said)
    return _with_remedy(kind, said)


def _with_remedy(kind: str, said: str) -> ValueError | None:
    """Return an error of torch with what an operator can change about it; None if it is another."""
    if kind == "OutOfMemoryError":  # torch's, by name: workers import this file before torch
        return ValueError(
            f"a worker's GPU is out of memory ({_last_line(said)}); use more workers "
            f"(cluster.workers, cluster.experts_per_worker), engine.precision=autocast, or a smaller "
            f"run.evaluation_batch_size if it was scoring images"
        )
    if _NOT_REPEATABLE in said:
        operation = said.partition(_NOT_REPEATABLE)[0].strip()
        return ValueError(
            f"engine.deterministic = true: {operation} has no kernel on a GPU that gives the same bits every time; set "
            f"engine.deterministic=false, with which a resume is equal to rounding"
        )
    if kind in _COMPILER_TYPES:
        return ValueError(
            f"engine.compile = true: torch could not compile the network ({_first_line(said)}); set "
            f"engine.compile=false"
        )
    return None


def failure_of(error: RayError) -> WorkerLost:
    """Translate Ray's error for a dead worker."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OutOfMemoryError):
        text = next((line for line in lines if "memory" in line.lower()), "its node is nearly full")
        return WorkerLost(f"a worker was ended, out of memory: {text}", "memory")
    text = f"a worker died: {lines[0] if lines else type(error).__name__}"
    return WorkerLost(text, "preemption" if getattr(error, "preempted", False) else "failure")


def broken_exchange(error: RayTaskError) -> WorkerLost | None:
    """Translate an error of a broken exchange between workers; None if it is another error.

    A backend that refuses a call, for the device, shape or type of a tensor, is another error: trying again would fail
    again.
    """
    text = str(error).lower()
    if not any(word in text for word in _EXCHANGE_WORDS) or not _from_partner(error.cause):
        return None
    waited_long = "timed out" in text or "timeout" in text
    return WorkerLost(
        f"an exchange between workers failed: {_last_line(str(error))}", "hang" if waited_long else "failure"
    )


def _from_partner(cause: BaseException) -> bool:
    """Say whether an exchange failed for another worker or the network, by the message alone: traces name files."""
    kind, said = _kind_and_text(cause)
    message = said.lower()
    if any(word in message for word in _REFUSED_WORDS):
        return False
    return kind in _PARTNER_TYPES or any(word in message for word in _PARTNER_WORDS)


def _kind_and_text(cause: BaseException) -> tuple[str, str]:
    """Return the name of an error's type and its text, of one that was sent in another's place as well."""
    return (cause.kind, cause.text) if isinstance(cause, WorkerFault) else (type(cause).__name__, str(cause))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no text"])[-1]


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
