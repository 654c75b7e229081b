"""Keep passwords out of what is stored and shown."""

from __future__ import annotations

import re
from typing import Any


def redact(text: str) -> str:
    """Remove secrets from the URIs in a text: `user:password@`, and values of keys that name a secret."""
    # Database drivers accept a password with / ? # in it. In a web address these end the host: another rule.
    text = re.sub(r"(?i)((?:postgresql|mysql|mssql)[\w+]*://)[^\s/:@'\"]*:[^\s@'\"]*@", r"\1", text)
    text = re.sub(r"(?<=://)[^/?#\s]*@", "", text)  # greedy: a password may contain an @ itself
    # The key of a view that MLflow's page shares is no secret: the link needs it.
    named = r"(?!viewStateShareKey=)[\w-]*(?:password|passwd|pwd|token|secret|key)"
    return re.sub(rf"(?i)([?&](?:{named})=)[^&\s'\"]+", r"\1***", text)


def redact_all(value: Any) -> Any:
    """Return a value of JSON with secrets removed from every text in it, keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_all(key): redact_all(item) for key, item in value.items()}
    return [redact_all(item) for item in value] if isinstance(value, list | tuple) else value
