"""How progress looks: bars in a terminal, a line now and then in a log, nothing elsewhere."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from saets.terminal.progress import Advance, Note

LINE_SECONDS = 30.0
"""Time between two lines of `LogProgress`."""

NOTE_SECONDS = 5.0
"""Time between two askings for the note beside a bar."""

Style = Literal["auto", "bars", "lines", "none"]


def shown_progress(console: Console, style: Style = "auto") -> TerminalProgress | LogProgress:
    """By `auto` bars in a terminal, lines in the log of a Ray job, which is all there is to look at, and nothing elsewhere."""
    if style == "auto" and not console.is_terminal and "RAY_JOB_ID" in os.environ:
        style = "lines"
    if style == "lines":
        return LogProgress(console)
    return TerminalProgress(console, shown=style == "bars" or (style == "auto" and console.is_terminal))


class TerminalProgress:
    """A bar with rate, time left and a note for each stage."""

    def __init__(self, console: Console, *, shown: bool) -> None:
        self._shown = shown
        self._bars = Bars(
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not shown,
        )

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextlib.contextmanager
    def stage(self, title: str, total: int, done: int, unit: str, note: Note | None = None) -> Iterator[Advance]:
        """One bar; the rate counts only what is done now."""
        bar = self._bars.add_task(title, total=total, completed=done, unit=unit, rate="", note="")
        count = _Count(total, done)

        def advance(n: int) -> None:
            count.add(n)
            self._bars.update(bar, advance=n, rate=f"{count.rate():.2f}/s")

        def update_note() -> None:
            self._bars.update(bar, note=note() if note else "")

        with _every(NOTE_SECONDS, update_note) if self._shown and note else contextlib.nullcontext():
            yield advance
        self._bars.stop_task(bar)


class LogProgress:
    """A line at a stage's beginning and end and every half minute between, also when nothing gets done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> LogProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextlib.contextmanager
    def stage(self, title: str, total: int, done: int, unit: str, note: Note | None = None) -> Iterator[Advance]:
        """Lines for one stage: done, rate, time left and the note; the rate counts only what is done now."""
        count = _Count(total, done)

        def say() -> None:
            self._console.print(f"{title}: {count.line(unit)}{f', {note()}' if note else ''}", markup=False)

        say()
        try:
            with _every(LINE_SECONDS, say):
                yield count.add
        finally:
            say()


class _Count:
    """How much of a stage is done, and how fast."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._before, self._now = total, done, 0
        self._started = time.monotonic()

    def add(self, n: int) -> None:
        self._now += n

    def rate(self) -> float:
        return self._now / max(time.monotonic() - self._started, 1e-9)

    def line(self, unit: str) -> str:
        done, rate = self._before + self._now, self.rate()
        left = f"{_clock((self._total - done) / rate)} left" if self._now else "nothing yet"
        return f"{done} of {self._total} {unit}, {rate:.2f}/s, {left}"


@contextlib.contextmanager
def _every(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Do something now and then in a thread of its own."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
