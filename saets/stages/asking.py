"""A judge behind a server, for one command: estimated and checked before it is asked, its calls counted, closed at the end."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from saets.judge.calls import CallLog, read_calls
from saets.judge.cost import Estimate
from saets.judge.openai import OpenAIJudge
from saets.records import content_id
from saets.run_folder.store import RunFolder
from saets.stages.session import Session


class Asking(NamedTuple):
    """How a command asks."""

    max_cost: float | None = None
    """What its calls may cost, in US dollars; None is no limit."""
    retry_failed: bool = False
    """What failed before is asked again."""
    checked: bool = False
    """The server has been seen to answer (`check_server`)."""


FREELY = Asking()
"""Without a ceiling; what failed before stays so."""


@contextlib.asynccontextmanager
async def opened_judge(
    session: Session, asking: Asking, expected: Callable[[OpenAIJudge], Estimate]
) -> AsyncIterator[OpenAIJudge]:
    """The experiment's judge; `expected` is told it, and says what asking is going to take.

    Raises:
        InputError: that is more than the ceiling, or the server does not answer; one call tells, and none is made where none is
            needed.
    """
    with call_log(session.run) as log:
        settings = session.experiment.judge
        judge = OpenAIJudge(settings, ceiling=asking.max_cost, retry_failed=asking.retry_failed, log=log)
        try:
            estimate = expected(judge)
            estimate.check(asking.max_cost)
            if estimate.calls and not asking.checked:
                await judge.check()
            yield judge
        finally:
            await judge.server.close()


def check_server(session: Session, asking: Asking, expected: Callable[[OpenAIJudge], Estimate]) -> Asking:
    """Raise what `opened_judge` would, before anything else is done; gives how to ask then."""

    async def opened() -> bool:
        async with opened_judge(session, asking, expected) as judge:
            return judge.server.spending.calls > 0

    return asking._replace(checked=asyncio.run(opened()))


@contextlib.contextmanager
def call_log(run: RunFolder) -> Iterator[CallLog]:
    """A log of the calls to a judge, whose count goes into the manifest at the end; that of a killed command at the beginning.

    It lies in the run folder, and for one that is no folder of this machine among its temporary files.
    """
    place = run.path.local or Path(tempfile.gettempdir()) / f"saets-{content_id(str(run.path))}"
    path = place / "calls.log"
    _settle_calls(run, path)
    log = CallLog(path)
    try:
        yield log
    finally:
        log.close()
        _settle_calls(run, path)


def _settle_calls(run: RunFolder, path: Path) -> None:
    found = read_calls(path)
    if found.sent:
        before = run.manifest().get("judge_calls", {})
        now = {
            "sent": found.sent,
            "unanswered": found.unanswered,
            "tokens_in": found.tokens.read,
            "tokens_out": found.tokens.written,
        }
        run.update_manifest(judge_calls={name: before.get(name, 0) + number for name, number in now.items()})
    path.unlink(missing_ok=True)
