"""Print what a command says: results on standard output, messages on standard error. All of it goes through here."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TextIO

from experts.data.names import HANDLER, readable, visible
from orchestration.config.secrets import redact


def show(text: str, stream: TextIO | None = None) -> bool:
    """Print a text, on standard output by default. A reader that has gone, or a closed stream, changes nothing.

    Control characters, which names of files and classes may hold, are shown by their numbers; lines stay lines. Secrets
    in URIs are left out: what is printed is kept in logs.

    Returns:
        False where somebody may miss the text: the file that it goes to has no room. That is said.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None:  # Python was started with it closed
        return True
    text = visible(redact(text), keep="\n\t")
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, HANDLER).decode(encoding), file=stream, flush=True)
    except (OSError, ValueError) as error:
        missed = error if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EBADF) else None
        with contextlib.suppress(OSError, ValueError):  # else Python tries to write the rest when it ends, and fails
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if missed and stream is sys.stdout:
            say(f"standard output cannot be written ({missed.strerror}); text is missing there")
        return missed is None
    return True


def say(text: str) -> None:
    """Print a message of ours on standard error; nothing where Python was started with it closed."""
    if sys.stderr is not None:
        show(f"expertail: {text}", sys.stderr)


def in_one_line(problem: BaseException) -> str:
    """Return the kind of an error and the first line of what it says, without secrets."""
    return visible(readable(redact(f"{type(problem).__name__}: {problem}".strip().splitlines()[0])))[:500]
