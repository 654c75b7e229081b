"""Names of files in messages: a name is bytes, and not all bytes are text."""

from __future__ import annotations

import codecs

HANDLER = "expertail.readable"
"""Name of a handler of encoding errors, for streams and files: it writes what cannot be encoded as `readable` does."""


def readable(text: str) -> str:
    r"""Return a text that every terminal, file and process can take, with bytes that are no UTF-8 as \x and two digits.

    Python holds such bytes of a file's name as surrogates of their own, which no encoding takes.
    """
    return text.encode("utf-8", HANDLER).decode()


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    shown = "".join(
        rf"\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c.encode("ascii", "backslashreplace").decode()
        for c in found
    )
    return shown, error.end


codecs.register_error(HANDLER, _replace)
