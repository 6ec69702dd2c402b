"""Writing and grading go on at once, with a bounded number of texts between them. Time is simulated."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from saets.records import Generation
from saets.stages.stream import Workers, written_and_graded


class InstantSelector(selectors.DefaultSelector):
    """Waits for nothing: the loop's clock jumps to the next timer."""

    skipped = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.skipped += timeout or 0.0
        return super().select(0)


def run(work: Coroutine[Any, Any, None]) -> float:
    """Run it on a loop whose time passes only while everybody waits; gives the seconds it took."""
    selector = InstantSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.skipped  # type: ignore[method-assign]
    try:
        loop.run_until_complete(work)
    finally:
        loop.close()
    return selector.skipped


def batches(count: int, size: int) -> list[list[Generation]]:
    return [
        [Generation(f"{batch}-{i}", "ab"[i % 2], "caa", "v", 4.0, "I think", i, 7, "x") for i in range(size)]
        for batch in range(count)
    ]


class Halves:
    """Two halves that take a set time, and what they did."""

    def __init__(self, writing: float, grading: float) -> None:
        self.writing, self.grading = writing, grading
        self.written: list[str] = []
        self.graded: list[str] = []
        self.most_waiting, self.parts = 0, []

    async def write(self, batch: Sequence[Generation]) -> Sequence[Generation]:
        await asyncio.sleep(self.writing)
        self.written += [text.generation_id for text in batch]
        self.most_waiting = max(self.most_waiting, len(self.written) - len(self.graded))
        return batch

    async def grade(self, part: Sequence[Generation]) -> None:
        await asyncio.sleep(self.grading)
        self.graded += [text.generation_id for text in part]
        self.parts.append(part)


@pytest.mark.parametrize(("writing", "grading"), [(2.0, 0.1), (0.5, 0.4), (1.0, 0.2)])
def test_the_whole_takes_about_as_long_as_its_longer_half(writing: float, grading: float) -> None:
    made = batches(20, 32)
    halves = Halves(writing, grading)
    took = run(written_and_graded(made, halves.write, (), halves.grade, Workers(2, 8, 1)))
    longer = max(20 / 2 * writing, 20 * 32 / 8 * grading)
    assert longer <= took <= 1.15 * longer
    assert sorted(halves.graded) == sorted(halves.written) == sorted(text.generation_id for batch in made for text in batch)


def test_no_more_texts_wait_than_are_allowed_and_writing_goes_on_when_there_is_room() -> None:
    halves = Halves(0.001, 1.0)
    made = batches(40, 10)
    run(written_and_graded(made, halves.write, (), halves.grade, Workers(2, 4, 1), most_waiting=25))
    assert halves.most_waiting <= 25 + 2 * 10 + 4
    assert len(halves.graded) == 400


def test_texts_that_are_ready_are_graded_beside_new_ones_and_parts_hold_one_goal() -> None:
    halves = Halves(0.1, 0.1)
    ready, *made = batches(4, 30)
    run(written_and_graded(made, halves.write, ready, halves.grade, Workers(1, 2, 8)))
    assert sorted(halves.graded) == sorted(text.generation_id for batch in (ready, *made) for text in batch)
    assert all(len(part) <= 8 and len({text.goal for text in part}) == 1 for part in halves.parts)


@pytest.mark.parametrize("half", ["write", "grade"])
def test_what_stops_one_half_stops_the_other_and_is_raised(half: str) -> None:
    halves = Halves(0.1, 0.1)
    original = getattr(halves, half)

    async def fail(texts: Sequence[Generation]) -> Any:
        if any(text.generation_id.startswith("3-") for text in texts):
            raise ValueError("enough")
        return await original(texts)

    setattr(halves, half, fail)
    with pytest.raises(BaseExceptionGroup) as raised:
        run(written_and_graded(batches(400, 4), halves.write, (), halves.grade, Workers(2, 2, 4), most_waiting=8))
    assert raised.group_contains(ValueError, match="enough")
    assert len(halves.written) < 100


def test_nothing_to_do_is_done_at_once() -> None:
    halves = Halves(1.0, 1.0)
    assert run(written_and_graded([], halves.write, (), halves.grade, Workers(3, 5, 1))) == 0.0
