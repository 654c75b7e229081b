"""Facts of the data that a stage's workers opened: the same on all, images left out, the content of data.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aggregation.metrics import groups_by_count, groups_by_index
from experts.data.config import DatasetConfig
from experts.data.fingerprints import replaced, touched
from orchestration.results.text import plural


def check_same_files(dataset: DatasetConfig, digests: Sequence[str], hosts: Sequence[Mapping[str, Any]]) -> None:
    """Refuse workers that see different files.

    Args:
        dataset: of the run.
        digests: of the data, by rank.
        hosts: of the workers, by rank.

    Raises:
        ValueError: names the first two workers that differ, and their nodes.
    """
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        workers = [f"worker {rank} on {hosts[rank]['node']}" for rank in (0, other)]
        raise ValueError(
            f"dataset.root = {dataset.root}: {' and '.join(workers)} see other files there (digests "
            f"{digests[0][:12]} and {digests[other][:12]}); needed the same on every node; copy them, or put them on "
            f"storage that all nodes share"
        )


def check_not_replaced(dataset: DatasetConfig, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Refuse files that hold other data than when the run began, under the same names.

    Args:
        dataset: of the run.
        old: `files` of data.json; empty for a run that is new, or of an older version.
        new: the same, as the files are now.

    Returns:
        Sentences about files that may be others.

    Raises:
        ValueError: they are others.
    """
    splits = [split for split in new if split in old]
    for split in splits:
        if problem := replaced(split, old[split], new[split]):
            raise ValueError(
                f"dataset.root = {dataset.root}: {problem}; put the old files back, or start a run with another "
                f"run.name"
            )
    return [line for split in splits if (line := touched(split, old[split], new[split])) is not None]


def carried_forward(data: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """Return data.json with what an earlier start found and this one did not look for.

    A start whose first worker does not decode a split (a resume with dataset.quarantine, or a worker that was replaced)
    knows neither its contents nor what they told.

    Args:
        data: found by this start.
        old: of an earlier start of the run that saw the same files; empty where there was none.
    """
    before, now = old.get("files", {}), data["files"]
    files = {split: {**before.get(split, {}), **now.get(split, {})} for split in {**before, **now}}
    unread = any("contents" in found and "contents" not in now.get(split, {}) for split, found in before.items())
    kinds = {remark["kind"] for remark in data["remarks"]}
    kept = [remark for remark in old.get("remarks", []) if unread and remark["kind"] not in kinds]
    return {**data, "files": files, "remarks": [*data["remarks"], *kept]}


def left_out_message(dataset: DatasetConfig, left_out: Sequence[Mapping[str, Any]]) -> str:
    """Say which training images are left out because they cannot be read."""
    first, count = left_out[0], len(left_out)
    return (
        f"dataset.quarantine = {dataset.quarantine}: {plural(count, 'training image')} cannot be read and "
        f"{'is' if count == 1 else 'are'} left out, first {first['path']} ({first['reason']}); data.json has all"
    )


def describe_data(dataset: DatasetConfig, facts: Mapping[str, Any], left_out: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of data.json.

    Args:
        dataset: of the run.
        facts: of the data, as `Worker.build` returns them.
        left_out: training images that cannot be read.
    """
    counts, cuts = facts["counts"], dataset.index_groups

    def plain(groups: dict[str, Any]) -> dict[str, list[int]]:
        return {name: ids.tolist() for name, ids in groups.items()}

    return {
        "dataset": dataset.name,
        "class_names": facts["class_names"],
        "counts": counts,
        "total": sum(counts),
        "digest": facts["digest"],
        "image_shape": facts["image_shape"],
        "left_out": left_out,
        "remarks": facts["remarks"],
        "files": facts["files"],
        "groups": {
            "by_count": plain(groups_by_count(counts)),
            "by_index": plain(groups_by_index(counts, cuts)) if cuts else None,
        },
    }
