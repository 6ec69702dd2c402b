"""What a user sees of progress in a terminal, in a Ray job's log, and elsewhere."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from saets.terminal import display as terminal
from saets.terminal.display import LogProgress, Style, TerminalProgress, shown_progress


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


def test_a_ray_jobs_log_gets_lines_with_rate_time_left_and_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    clock = iter([0.0, 1.0, 50.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    screen = console(is_terminal=False)
    with (
        shown_progress(screen) as progress,
        progress.stage("measuring", 1000, 100, "vectors", lambda: "2 of 2 actors alive, 0 failed") as advance,
    ):
        advance(10)
        advance(72)
    assert isinstance(progress, LogProgress)
    assert printed(screen).splitlines() == [
        "measuring: 100 of 1000 vectors, 0.00/s, nothing yet, 2 of 2 actors alive, 0 failed",
        "measuring: 182 of 1000 vectors, 1.64/s, 0:08:19 left, 2 of 2 actors alive, 0 failed",
    ]


@pytest.mark.parametrize(("style", "is_terminal", "seconds"), [("lines", False, "LINE_SECONDS"), ("auto", True, "NOTE_SECONDS")])
def test_what_is_going_on_is_told_while_nothing_gets_done(
    monkeypatch: pytest.MonkeyPatch, style: Style, is_terminal: bool, seconds: str
) -> None:
    monkeypatch.setattr(terminal, seconds, 0.001)
    asked = threading.Semaphore(0)

    def note() -> str:
        asked.release()
        return "1 of 2 actors alive"

    screen = console(is_terminal=is_terminal)
    with shown_progress(screen, style) as progress, progress.stage("measuring", 10, 0, "vectors", note):
        for _ in range(4):
            assert asked.acquire(timeout=30)
    assert "1 of 2 actors alive" in printed(screen)


def test_a_log_file_gets_lines_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    screen = console(is_terminal=False)
    with shown_progress(screen, "lines") as progress, progress.stage("measuring", 10, 4, "vectors") as advance:
        advance(6)
    assert "10 of 10 vectors" in printed(screen)


def test_a_terminal_is_left_alone_where_that_is_asked_for() -> None:
    screen = console(is_terminal=True)
    with shown_progress(screen, "none") as progress, progress.stage("measuring", 10, 4, "vectors") as advance:
        advance(6)
    assert printed(screen).strip() == ""
