"""Texts are graded while others are written: the halves of an evaluation overlap, with a bounded number of texts between them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from saets.records import Generation

Batch = TypeVar("Batch")

MOST_WAITING = 4096
"""Texts that wait to be graded; when there are so many, no further batch is begun."""


class Workers(NamedTuple):
    """How much goes on at once."""

    writing: int
    """Batches."""
    grading: int
    """Parts."""
    part: int
    """Most texts that are graded in one call; all of one goal."""


async def written_and_graded(
    batches: Sequence[Batch],
    write: Callable[[Batch], Awaitable[Sequence[Generation]]],
    ready: Sequence[Generation],
    grade: Callable[[Sequence[Generation]], Awaitable[None]],
    workers: Workers,
    *,
    most_waiting: int = MOST_WAITING,
) -> None:
    """Write all batches, and grade their texts and those that are ready; whichever takes longer sets the time.

    When either half raises, the other is cancelled; what was written or graded by then is for `write` and `grade` to keep.
    """
    waiting: asyncio.Queue[Sequence[Generation] | None] = asyncio.Queue(max(1, most_waiting // workers.part))
    left = iter(batches)

    async def hand_over(texts: Sequence[Generation]) -> None:
        for part in _parts(texts, workers.part):
            await waiting.put(part)

    async def write_on() -> None:
        for batch in left:
            await hand_over(await write(batch))

    async def grade_on() -> None:
        while (part := await waiting.get()) is not None:
            await grade(part)

    async with asyncio.TaskGroup() as grading:
        for _ in range(workers.grading):
            grading.create_task(grade_on())
        async with asyncio.TaskGroup() as writing:
            writing.create_task(hand_over(ready))
            for _ in range(workers.writing):
                writing.create_task(write_on())
        for _ in range(workers.grading):
            await waiting.put(None)


def _parts(texts: Sequence[Generation], size: int) -> Iterator[Sequence[Generation]]:
    """The texts by goal, in parts of at most this size."""
    by_goal: dict[str, list[Generation]] = {}
    for text in texts:
        by_goal.setdefault(text.goal, []).append(text)
    for part in by_goal.values():
        yield from (part[start : start + size] for start in range(0, len(part), size))
