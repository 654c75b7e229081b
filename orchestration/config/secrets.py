"""Keep passwords out of what is stored and shown."""

from __future__ import annotations

import re


def redact(text: str) -> str:
    """Remove secrets from the URIs in a text: `user:password@`, and values of keys that name a secret."""
    # Database drivers accept a password with / ? # in it. In a web address these end the host: another rule.
    text = re.sub(r"(?i)((?:postgresql|mysql|mssql)[\w+]*://)[^\s/:@'\"]*:[^\s@'\"]*@", r"\1", text)
    text = re.sub(r"(?<=://)[^/?#\s]*@", "", text)  # greedy: a password may contain an @ itself
    return re.sub(r"(?i)([?&](?:[\w-]*(?:password|passwd|pwd|token|secret|key))=)[^&\s'\"]+", r"\1***", text)
