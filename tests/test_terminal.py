"""What a user sees of progress in a terminal, in a Ray job's log, and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from saets import terminal
from saets.terminal import LogProgress, TerminalProgress, shown_progress


def console(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    screen = console(is_terminal=True)
    with shown_progress(screen) as progress, progress.stage("measuring", 10, 4, "vectors") as advance:
        advance(3)
    assert isinstance(progress, TerminalProgress)
    for word in ("measuring", "7/10", "vectors", "/s", "left"):
        assert word in printed(screen)


def test_nothing_is_printed_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    screen = console(is_terminal=False)
    with shown_progress(screen) as progress, progress.stage("measuring", 10, 4, "vectors") as advance:
        advance(3)
    assert printed(screen).strip() == ""


def test_a_ray_jobs_log_gets_lines_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    clock = iter([0.0, 1.0, 11.0, 40.0, 41.0, 41.0, 50.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    screen = console(is_terminal=False)
    with shown_progress(screen) as progress, progress.stage("measuring", 1000, 100, "vectors") as advance:
        advance(10)  # too soon for a line
        advance(72)
    assert isinstance(progress, LogProgress)
    assert printed(screen).splitlines() == [
        "measuring: 100 of 1000 vectors, 0.00/s, starting",
        "measuring: 182 of 1000 vectors, 2.00/s, 0:06:49 left",
        "measuring: 182 of 1000 vectors, 1.64/s, 0:08:19 left",
    ]
