"""Libraries that the processes of worlds.py need, loaded once before they are forked."""

from __future__ import annotations

import orchestration.training.trainer  # noqa: F401
from orchestration.training.deepspeed_engine import import_deepspeed

import_deepspeed(gpu=False)
