"""Ray's private modules are used in one file, where a new version of Ray is checked against them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from orchestration.cluster import ray_internals

ROOT = Path(ray_internals.__file__).parents[2]


def test_one_file_alone_uses_private_modules_of_ray():
    users = {
        str(path.relative_to(ROOT))
        for package in ("experts", "aggregation", "orchestration", "configs", "deploy")
        for path in (ROOT / package).rglob("*.py")
        if "ray._private" in path.read_text()
    }
    assert users == {"orchestration/cluster/ray_internals.py"}


def test_rays_own_functions_are_restored_after_use():
    from ray._private import parameter, utils

    before = utils.set_kill_on_parent_death_linux, parameter.RayParams
    with ray_internals.own_process_groups(), ray_internals.no_fixed_ports():
        assert utils.set_kill_on_parent_death_linux is not before[0]
        assert parameter.RayParams is not before[1]
    assert (utils.set_kill_on_parent_death_linux, parameter.RayParams) == before


def test_workers_get_our_folder_and_not_the_current_one():
    from ray.job_config import JobConfig

    usual = JobConfig.__init__
    with ray_internals.own_code_in_workers():
        config = JobConfig(metadata={"a": "b"})
        config._py_driver_sys_path.extend(["/somewhere/with/experts", os.getcwd()])
    assert list(config._py_driver_sys_path) == [str(ROOT)]
    assert config.metadata == {"a": "b"}
    assert JobConfig.__init__ is usual


def test_a_process_without_a_token_sends_none():
    """In a process of its own: Ray keeps the token that it has once read for the life of a process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH_")}
    code = "from orchestration.cluster.ray_internals import *; assert (token_headers(), token_needed()) == ({}, False)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
