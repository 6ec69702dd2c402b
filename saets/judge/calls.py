"""Every call to a judge as it is sent and answered, so that after a kill it is known how many were on their way."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from saets.judge.cost import Tokens


class CallCount(NamedTuple):
    """Calls of one or more sessions."""

    sent: int = 0
    unanswered: int = 0
    """Sent, and cut off by a kill, a time-out or a lost connection: they may have been paid for, and may be sent again."""
    tokens: Tokens = Tokens(0, 0)
    """Of the calls that were answered."""


class CallLog:
    """A line a call sent, answered or lost, on disk before anything else is done; without a path nothing is kept."""

    def __init__(self, path: Path | None = None) -> None:
        self._file: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def sent(self) -> None:
        """A call is about to be sent."""
        self._write("sent")

    def unsent(self) -> None:
        """The last one was not, since there was no connection."""
        self._write("unsent")

    def answered(self, tokens: Tokens) -> None:
        """An answer arrived."""
        self._write(f"answered {tokens.read} {tokens.written}")

    def lost(self) -> None:
        """No answer will arrive."""
        self._write("lost")

    def close(self) -> None:
        """Write no more."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: str) -> None:
        if self._file is not None:
            os.write(self._file, f"{line}\n".encode())


def read_calls(path: Path) -> CallCount:
    """What a log says; calls that were neither answered nor lost when it ended count as unanswered."""
    sent, answered, tokens = 0, 0, Tokens(0, 0)
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            word, *numbers = line.split()
            sent += {"sent": 1, "unsent": -1}.get(word, 0)
            if word == "answered" and len(numbers) == 2:
                answered += 1
                tokens = tokens.plus(Tokens(*map(int, numbers)))
    return CallCount(sent, sent - answered, tokens)
