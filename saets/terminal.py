"""How progress looks: bars in a terminal, a line now and then in the log of a Ray job, nothing elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from saets.progress import Advance

LINE_SECONDS = 30.0
"""Time between two lines of `LogProgress`."""


def shown_progress(console: Console) -> TerminalProgress | LogProgress:
    """Lines where a Ray job's log is all there is to look at, else bars."""
    if not console.is_terminal and "RAY_JOB_ID" in os.environ:
        return LogProgress(console)
    return TerminalProgress(console)


class TerminalProgress:
    """A bar with rate and time left for each stage; nothing at all where stderr is no terminal."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextlib.contextmanager
    def stage(self, title: str, total: int, done: int, unit: str) -> Iterator[Advance]:
        """One bar; the rate counts only what is done now."""
        bar = self._bars.add_task(title, total=total, completed=done, unit=unit, rate="")
        started, count = time.monotonic(), 0

        def advance(n: int) -> None:
            nonlocal count
            count += n
            rate = count / max(time.monotonic() - started, 1e-9)
            self._bars.update(bar, advance=n, rate=f"{rate:.2f}/s")

        yield advance
        self._bars.stop_task(bar)


class LogProgress:
    """A line at a stage's beginning and end and every half minute between: done, rate and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> LogProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextlib.contextmanager
    def stage(self, title: str, total: int, done: int, unit: str) -> Iterator[Advance]:
        """Lines for one stage; the rate counts only what is done now."""
        started = said = time.monotonic()
        count = 0

        def say() -> None:
            rate = count / max(time.monotonic() - started, 1e-9)
            left = f"{_clock((total - done - count) / rate)} left" if count else "starting"
            self._console.print(f"{title}: {done + count} of {total} {unit}, {rate:.2f}/s, {left}", markup=False)

        def advance(n: int) -> None:
            nonlocal count, said
            count += n
            if time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                say()

        say()
        yield advance
        say()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
