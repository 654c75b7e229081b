"""A Ray on this machine alone, for runs that name no cluster."""

from __future__ import annotations

import logging
import os

import ray

_OBJECT_STORE_BYTES = 256 * 2**20  # only numbers and scores travel through it


def start_own_ray() -> None:
    """Start Ray's processes here, without dashboard, quietly; they end with this process."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
