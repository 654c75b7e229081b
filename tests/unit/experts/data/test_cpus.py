"""The CPUs that a CPU set and the quotas of control groups leave to a process."""

from __future__ import annotations

import os

import pytest

from experts.data import cpus
from experts.data.cpus import quota, usable_cpus


@pytest.fixture
def process(tmp_path):
    """Make the files of a process: its groups, the places that they are mounted at, and their quotas."""

    def make(groups, mounts, files):
        lines = [
            f"32 31 0:29 {root} {tmp_path / place} rw,relatime shared:9 - {kind} {kind} {options}"
            for root, place, kind, options in mounts
        ]
        (tmp_path / "mountinfo").write_text("\n".join(["23 1 0:2 / / rw - ext4 /dev/vda rw", *lines]) + "\n")
        (tmp_path / "cgroup").write_text("\n".join(groups) + "\n")
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        return tmp_path

    return make


V2 = ("/", "cg", "cgroup2", "rw")
V1 = ("/", "cpu", "cgroup", "rw,cpu,cpuacct")
JOB = "system.slice/slurmstepd.scope/job_7/step_0"


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        (["0::/"], [V2], {"cg/cpu.max": "150000 100000"}, 1.5),  # a container with a view of its own
        ([f"0::/{JOB}"], [V2], {f"cg/{JOB}/cpu.max": "max 100000", "cg/system.slice/cpu.max": "400000 100000"}, 4),
        ([f"0::/{JOB}"], [V2], {f"cg/{JOB}/cpu.max": "200000 100000", "cg/system.slice/cpu.max": "900000 100000"}, 2),
        (["4:cpu,cpuacct:/docker/a1", "0::/"], [("/docker/a1", *V1[1:])],
         {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),  # bound into the container
        (["4:cpu,cpuacct:/job"], [V1], {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None),
        (["4:memory:/job"], [V1], {"cpu/job/cpu.cfs_quota_us": "100", "cpu/job/cpu.cfs_period_us": "100"}, None),
        (["0::/"], [V2], {"cg/cpu.max": "nonsense"}, None),
        (["4:cpu,cpuacct:/job"], [V1], {"cpu/job/cpu.cfs_quota_us": "100"}, None),  # without its period
        (["0::/../.."], [V2], {}, None),
        ([], [], {}, None),
    ],
)  # fmt: skip
def test_the_least_quota_of_a_group_and_those_above_it_counts(process, groups, mounts, files, expected):
    assert quota(process(groups, mounts, files)) == (float("inf") if expected is None else expected)


def test_where_there_is_no_proc_there_is_no_quota(tmp_path):
    assert quota(tmp_path / "nowhere") == float("inf")


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1), (1.9, 1), (3, 3), (7.99999999, 8), (99, 8), (1e400, 8)])
def test_of_a_quota_whole_cpus_count_and_the_cpu_set_is_the_most(monkeypatch, share, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(cpus, "quota", lambda: share)
    assert usable_cpus() == expected
