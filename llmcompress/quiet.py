"""Keeps other people's chatter off standard error.

transformers, datasets and lm-eval draw their own bars, log at warning level on every run and start `git`. None of it
is about the user's model, and it tears up the one progress bar that the command line draws. Loggers, bars and child
processes have only file descriptor 2 in common, so that is where they are cut off. Exceptions still travel as always,
and `LLMCOMPRESS_VERBOSE=1` leaves everything on.
"""

import contextlib
import os
import sys
from collections.abc import Iterator


class Quiet:
    """Standard error switched off; `loud()` switches it on again for a stretch, for our own progress."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._saved = os.dup(2)
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115 - closed by `close`

    def hush(self) -> None:
        """Both levels: under a notebook or a test runner, `sys.stderr` does not write to descriptor 2."""
        self._stream.flush()
        os.dup2(self._nowhere.fileno(), 2)
        sys.stderr = self._nowhere

    def restore(self) -> None:
        os.dup2(self._saved, 2)
        sys.stderr = self._stream

    @contextlib.contextmanager
    def loud(self) -> Iterator[None]:
        """Standard error as it was, until the end of the block."""
        self.restore()
        try:
            yield
        finally:
            self.hush()

    def close(self) -> None:
        self.restore()
        os.close(self._saved)
        self._nowhere.close()


class Verbose(Quiet):
    """What `quiet` hands out when the user asked to see everything: the same calls, with nothing switched off."""

    def hush(self) -> None:
        """Leave standard error on."""


@contextlib.contextmanager
def quiet() -> Iterator[Quiet]:
    """Switch standard error off for the block, whatever is written there and by whom."""
    switch = Verbose() if os.environ.get("LLMCOMPRESS_VERBOSE") else Quiet()
    switch.hush()
    try:
        yield switch
    finally:
        switch.close()
