"""A Ray on this machine alone, for runs that name no cluster."""

from __future__ import annotations

import logging
import os
import time

import ray

from experts.data.cpus import usable_cpus
from orchestration.cluster.ray_internals import no_fixed_ports, own_code_in_workers, own_process_groups

_OBJECT_STORE_BYTES = 256 * 2**20  # for numbers and scores; files of checkpoints at a URL may spill to disk
_ATTEMPTS = 3  # on a busy machine Ray's processes may miss each other's time limits


def start_local_ray() -> None:
    """Start Ray's processes here, quietly and without a dashboard. They end with this process.

    Raises:
        ValueError: they did not come up in several attempts. Ray gives its processes half a minute to find each other.
    """
    # Ray's default by now; earlier versions warn if it is unset.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    begun = time.monotonic()
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with own_process_groups(), no_fixed_ports(), own_code_in_workers():
                ray.init(
                    address="local",
                    num_cpus=usable_cpus(),  # by itself Ray counts those of the machine
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            return
        except Exception as error:  # Ray raises no type of its own
            ray.shutdown()  # ends the processes that did come up
            if "timed out" not in str(error):
                raise
            if attempt == _ATTEMPTS:
                raise ValueError(
                    f"Ray's own processes did not come up in {_ATTEMPTS} attempts and {time.monotonic() - begun:.0f} s "
                    f"({str(error).splitlines()[0]}); load is {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores; try "
                    f"again when this machine is quieter, or start a Ray by hand and set RAY_ADDRESS"
                ) from error
