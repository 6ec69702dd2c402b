"""Callers wait for their turns: by limits that are set, and by what a server that refuses them says. The clock is simulated."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import pytest

from saets.judge.pace import FIRST_PAUSE, LONGEST_PAUSE, SHORTEST_STEP, Pace, backoff, retry_after


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def turns(count: int, tokens: int = 0, *, requests: float | None = None, budget: float | None = None) -> list[float]:
    """When that many callers, all there at once, get their turns; seconds from the first one."""
    clock = Clock()

    async def run() -> list[float]:
        pace = Pace(requests, budget, clock=clock, sleep=clock.sleep)
        return await asyncio.gather(*(pace.turn(tokens) for _ in range(count)))

    return [at - 100 for at in asyncio.run(run())]


def paced(work: Callable[[Pace, Clock], Awaitable[None]]) -> None:
    clock = Clock()

    async def run() -> None:
        await work(Pace(clock=clock, sleep=clock.sleep), clock)

    asyncio.run(run())


def test_without_limits_nobody_waits() -> None:
    assert turns(1000, 500) == [0.0] * 1000


def test_no_minute_holds_more_calls_than_the_limit() -> None:
    found = turns(400, requests=120.0)
    for start in found:
        assert sum(start <= at < start + 60 for at in found) <= 121
    assert found[-1] == pytest.approx(399 * 0.5, abs=0.1)
    assert found == sorted(found), "first come, first served"


def test_no_minute_holds_more_tokens_than_the_limit() -> None:
    found = turns(100, 250, budget=6000.0)
    for start in found:
        assert sum(start <= at < start + 60 for at in found) * 250 <= 6000 + 250
    assert found[-1] == pytest.approx(99 * 2.5, abs=0.1)


def test_the_stricter_of_two_limits_holds() -> None:
    assert turns(61, 100, requests=600.0, budget=6000.0)[-1] == pytest.approx(60, abs=0.1)


def test_a_refusal_makes_everyone_wait_as_long_as_the_server_says_and_then_go_more_slowly() -> None:
    async def work(pace: Pace, clock: Clock) -> None:
        first = await pace.turn(1)
        pace.refused(first, 20.0)
        assert pace.pause() == 20.0
        others = await asyncio.gather(*(pace.turn(1) for _ in range(50)))
        assert min(others) == first + 20
        assert pace.pause() == 0.0
        assert max(others) - min(others) > 40 * SHORTEST_STEP

    paced(work)


def test_refusals_of_calls_that_were_on_their_way_already_slow_down_once() -> None:
    async def work(pace: Pace, clock: Clock) -> None:
        sent = [await pace.turn(1) for _ in range(64)]
        clock.now += 1
        for turn in sent:
            pace.refused(turn, 1.0)
        after = [await pace.turn(1) for _ in range(12)]
        assert after[-1] - after[0] < 1, "64 doublings would be hours"

    paced(work)


def test_a_server_that_takes_ten_calls_a_second_is_found_out_and_hardly_refuses_any_more() -> None:
    """A server with a bucket of ten calls; nothing says how many it takes."""
    seconds, refusals = 120, []

    async def work(pace: Pace, clock: Clock) -> None:
        tokens, filled, taken, refused = 10.0, clock.now, 0, 0
        start = clock.now
        while clock.now < start + seconds:
            turn = await pace.turn(1)
            clock.now += 0.001
            tokens, filled = min(10.0, tokens + 10 * (clock.now - filled)), clock.now
            if tokens >= 1:
                tokens -= 1
                taken += 1
                pace.answered()
            else:
                refused += 1
                pace.refused(turn, backoff(1, 1.0))
        refusals.append(refused / taken)
        assert taken > 0.6 * 10 * seconds

    paced(work)
    assert refusals[0] < 0.1


def test_pauses_double_up_to_the_longest_and_are_scattered() -> None:
    assert [backoff(attempt, 1.0) / FIRST_PAUSE for attempt in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert backoff(50, 1.0) == LONGEST_PAUSE
    assert backoff(3, 0.0) == backoff(3, 1.0) / 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Thu, 26 Nov 2026 12:00:30 GMT"}, 30.0),
        ({"retry-after": "Thu, 26 Nov 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1e9"}, 1e9),
    ],
)
def test_a_server_may_say_how_long_to_wait_in_seconds_or_as_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, datetime(2026, 11, 26, 12, 0, 0, tzinfo=UTC)) == seconds
