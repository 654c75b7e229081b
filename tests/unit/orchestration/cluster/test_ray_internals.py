"""Ray's private modules are used in one file, where a new version of Ray is checked against them."""

from __future__ import annotations

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


def test_a_process_without_a_token_sends_none(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert ray_internals.token_headers() == {}
    assert ray_internals.token_needed() is False
