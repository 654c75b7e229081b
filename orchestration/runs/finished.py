"""Tell whether a run folder holds the finished run of a config."""

from __future__ import annotations

from orchestration.config.run_config import RunConfig
from orchestration.storage.run_folder import RunFolder


def is_complete(folder: RunFolder, config: RunConfig) -> bool:
    """Return whether a run folder holds the finished run of a config.

    Raises:
        ValueError: it holds the finished run of another config.
    """
    if folder.read_run().get("status") != "finished":
        return False
    folder.check_same_config(with_threads(config, folder.stored_config()))
    return True


def with_threads(config: RunConfig, stored: RunConfig) -> RunConfig:
    """Return the config with the threads of a run's first start, if it leaves them open."""
    threads = config.engine.threads or stored.engine.threads
    return config.model_copy(update={"engine": config.engine.model_copy(update={"threads": threads})})
