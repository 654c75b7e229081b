"""The bytes that workers exchange in one step of a stage, from a rehearsed step of each slot (rehearsal.py)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from experts.batches import share
from orchestration.preflight.rehearsal import Load, Traffic
from orchestration.training.exchange import Kind


@dataclass(frozen=True)
class Exchange:
    """One collective operation that workers carry out in every step, or all of one name.

    Attributes:
        what: in words.
        kind: an all-gather gives every part to everyone, an all-reduce gives everyone the sum.
        among: number of workers that take part.
        payloads: bytes that a worker contributes, by its slot; None where that needs the number of classes. Where it
            grows with the images, the share of the first replica, which is the largest.
        times: how often a worker takes part in one step, in the slot that does so most often.
    """

    what: str
    kind: Kind
    among: int
    payloads: tuple[int | None, ...]
    times: int = 1

    @property
    def payload(self) -> int | None:
        """Bytes of the slot that contributes most."""
        return None if None in self.payloads else max(self.payloads)  # type: ignore[type-var]

    def sent(self, slot: int) -> int | None:
        """Return the bytes that a worker sends if the exchange runs as a ring."""
        payload = self.payloads[slot]
        if payload is None:
            return None
        others = self.among - 1
        return payload * others if self.kind == "all-gather" else round(2 * payload * others / self.among)


def shares_of(images: int, replicas: int) -> tuple[int, ...]:
    """Return the images of each replica; the first ones have one more where they do not divide evenly."""
    bounds = [share(images, replica, replicas) for replica in range(replicas)]
    return tuple(stop - start for start, stop in bounds)


def exchanges(loads: list[Load], images: int, unknown_teachers: Collection[str]) -> tuple[Exchange, ...]:
    """List the exchanges of one step.

    Args:
        loads: of a worker of each slot.
        images: of the first replica.
        unknown_teachers: names of teachers whose size is a guess, so that their bytes stay open.
    """
    # Slots may differ in what they exchange; a slot that takes no part in an exchange contributes 0 bytes.
    found: dict[tuple[str, Kind, int], list[int | None]] = {}
    times: dict[tuple[str, Kind, int], int] = {}
    for slot, load in enumerate(loads):
        for row in load.traffic:
            key = row.what, row.kind, row.among
            payloads = found.setdefault(key, [0] * len(loads))
            times[key] = max(row.times, times.get(key, 0))
            payloads[slot] = None if _is_of(row, unknown_teachers) else row.fixed + images * row.per_image
    return tuple(Exchange(*key, tuple(payloads), times[key]) for key, payloads in found.items())


def _is_of(row: Traffic, teachers: Collection[str]) -> bool:
    return any(row.what.endswith(f"of teacher {name}") for name in teachers)
