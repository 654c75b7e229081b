"""Keep passwords out of what is stored and shown."""

from __future__ import annotations

import re


def redact(text: str) -> str:
    """The text without what is secret in its URIs: `user:password@`, and values of keys that name a secret."""
    # Of a database's URI drivers take a password with / ? # in it; a web address ends its host there.
    text = re.sub(r"(?i)((?:postgresql|mysql|mssql)[\w+]*://)[^\s/:@'\"]*:[^\s@'\"]*@", r"\1", text)
    text = re.sub(r"(?<=://)[^/?#\s]*@", "", text)
    return re.sub(r"(?i)([?&](?:[\w-]*(?:password|passwd|pwd|token|secret|key))=)[^&\s'\"]+", r"\1***", text)
