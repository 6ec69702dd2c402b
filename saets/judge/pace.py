"""How fast a server is asked: calls and tokens a minute, and less of both for every caller when the server refuses one."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds before a call is tried a second time, and at most before a later time; they double from one to the other."""

SHORTEST_STEP, LONGEST_STEP = 0.01, 5.0
"""Seconds between two calls after a first refusal, and at most after many."""

EASING = 0.98
"""Share of the step between calls that is left after a call that was not refused."""

LATENESS = 0.05
"""Seconds that callers may be behind their turn and still catch up; without it, late wake-ups would add up."""


class Pace:
    """Gives callers their turns, first come first served.

    Without limits and refusals nobody waits. With `requests_per_minute` or `tokens_per_minute`, turns are evenly spaced, so that
    no minute holds more. After a refusal everyone waits as long as the server says, and turns are spaced further apart: twice as
    far with every further refusal, a little less with every answer.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._seconds_a_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_a_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._line = asyncio.Lock()
        self._request_at = self._token_at = self._resume_at = self._slowed_at = -math.inf
        self._step = 0.0

    async def turn(self, tokens: int) -> float:
        """Wait for one's turn to send so many tokens; the time of the turn, which `refused` is told."""
        async with self._line:
            while (wait := max(self._request_at, self._token_at, self._resume_at) - self._clock()) > 0:
                await self._sleep(wait)
            now = self._clock()
            self._request_at = max(self._request_at, now - LATENESS) + max(self._seconds_a_request, self._step)
            self._token_at = max(self._token_at, now - LATENESS) + tokens * self._seconds_a_token
            return now

    def refused(self, turn: float, seconds: float) -> None:
        """The call of that turn was refused: nobody sends for so many seconds, and then more slowly."""
        now = self._clock()
        self._resume_at = max(self._resume_at, now + seconds)
        if turn >= self._slowed_at:  # what was sent before the last slowing down says nothing about it
            self._slowed_at = now
            self._step = min(LONGEST_STEP, max(SHORTEST_STEP, 2 * self._step))

    def answered(self) -> None:
        """A call was not refused."""
        self._step *= EASING
        if self._step < SHORTEST_STEP / 10:
            self._step = 0.0

    def pause(self) -> float:
        """Seconds until anyone may send again; 0 where nobody has to wait."""
        return max(0.0, self._resume_at - self._clock())


def backoff(attempt: int, draw: float) -> float:
    """Seconds to wait after so many failed attempts: doubling up to `LONGEST_PAUSE`; `draw` in 0..1 leaves half to all of it.

    >>> backoff(1, 1.0), backoff(2, 0.0), backoff(20, 1.0)
    (0.5, 0.5, 60.0)
    """
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempt - 1)) * (0.5 + draw / 2)


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that a server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date; None where it says nothing.

    >>> retry_after({"retry-after": "20"}), retry_after({"retry-after": "soon"})
    (20.0, None)
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except KeyError:
            continue
        except ValueError:
            try:
                date = parsedate_to_datetime(headers[name])
            except ValueError:
                continue
            seconds = (date.replace(tzinfo=date.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds()
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
