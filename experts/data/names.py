"""Names of files in messages: a name is bytes, and not all bytes are text."""

from __future__ import annotations

import codecs
import unicodedata

HANDLER = "expertail.readable"
"""Name of a handler of encoding errors, for streams and files: it writes what cannot be encoded as `readable` does."""


def readable(text: str) -> str:
    r"""Return a text that every terminal, file and process can take, with bytes that are no UTF-8 as \x and two digits.

    Python holds such bytes of a file's name as surrogates of their own, which no encoding takes.
    """
    return text.encode("utf-8", HANDLER).decode()


def visible(text: str, keep: str = "") -> str:
    r"""Return a text without what a terminal would act on: control characters, ends of lines and changes of direction.

    They are shown by their numbers, as \x1b.

    Args:
        text: with bytes that are no UTF-8 or without.
        keep: characters that stay, such as ends of lines between lines of ours.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter in keep or not _acts(letter) else repr(letter)[1:-1] for letter in readable(text))


def _acts(letter: str) -> bool:
    return unicodedata.category(letter) in _CONTROL and letter not in _JOINERS


_CONTROL = ("Cc", "Cf", "Zl", "Zp")
"""Control and format characters, directions among them, and ends of lines and paragraphs; categories of Unicode."""
_JOINERS = "\u200c\u200d"  # some scripts and pictures of several signs need them


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
