"""What calls cost: prices, estimates, and a ceiling that holds."""

from __future__ import annotations

import asyncio
import functools
import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from saets.errors import InputError
from saets.experiment.config import JudgeSettings

BYTES_A_TOKEN = 4
"""Of English, by which tokens are estimated where a server does not count them."""

FORMAT_TOKENS = 40
"""About what the JSON schema and the message's frame take."""

SCORE_TOKENS = 8
"""About what one score takes in an answer."""

_SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")


class Tokens(NamedTuple):
    """Tokens of a call, or of many."""

    read: int
    """By the model: the message."""
    written: int
    """By the model: the answer."""

    @classmethod
    def expected(cls, message: str, scores: int) -> Tokens:
        """About what a message and an answer with so many scores take."""
        return cls(-(-len(message.encode()) // BYTES_A_TOKEN) + FORMAT_TOKENS, SCORE_TOKENS * scores)

    @classmethod
    def most(cls, message: str, answer: int) -> Tokens:
        """No call takes more: a token is a byte at least, and an answer ends at its limit."""
        return cls(len(message.encode()) + BYTES_A_TOKEN * FORMAT_TOKENS, answer)

    def plus(self, other: Tokens) -> Tokens:
        """Both together."""
        return Tokens(self.read + other.read, self.written + other.written)


class Prices(NamedTuple):
    """US dollars for a million tokens."""

    read: float
    written: float

    def of(self, tokens: Tokens) -> float:
        """US dollars."""
        return (self.read * tokens.read + self.written * tokens.written) / 1e6


def prices_of(settings: JudgeSettings, address: str) -> Prices | None:
    """The settings' prices, else those of the table for a model of the server that the table is about; None where unknown."""
    if settings.price_in is not None and settings.price_out is not None:
        return Prices(settings.price_in, settings.price_out)
    table = _price_list()
    if urlsplit(address).hostname != table["server"]:
        return None
    found = table["models"].get(settings.model) or table["models"].get(_SNAPSHOT.sub("", settings.model))
    return Prices(found["input"], found["output"]) if found else None


@functools.cache
def _price_list() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "prices.toml").read_text())


class Estimate(NamedTuple):
    """What asking a judge is expected to take."""

    calls: int
    tokens: Tokens
    usd: float | None
    """None where no price is known."""

    def plus(self, other: Estimate) -> Estimate:
        """The estimate for both together."""
        usd = None if self.usd is None or other.usd is None else self.usd + other.usd
        return Estimate(self.calls + other.calls, self.tokens.plus(other.tokens), usd)

    def times(self, factor: float) -> Estimate:
        """The estimate for so many times as much."""
        tokens = Tokens(round(self.tokens.read * factor), round(self.tokens.written * factor))
        return Estimate(round(self.calls * factor), tokens, None if self.usd is None else self.usd * factor)

    def check(self, ceiling: float | None) -> None:
        """Raise `InputError` where the ceiling lies below this."""
        if ceiling is not None and self.usd is not None and self.usd > ceiling:
            raise InputError(
                f"this would take about {self.calls:,} calls of {self.tokens.read / max(1, self.calls):.0f} tokens, "
                f"{dollars(self.usd)} in all, and --max-cost is {dollars(ceiling)}; raise it, or ask for fewer samples, scales, "
                'goals or methods; judge.calls = "together" grades with half the calls'
            )


class Spending:
    """What has been spent, what calls in flight may cost at most, and the ceiling over both."""

    def __init__(self, prices: Prices | None, ceiling: float | None) -> None:
        """Raises `InputError` where there is a ceiling and no price."""
        if ceiling is not None and prices is None:
            raise InputError(
                "--max-cost needs the prices of the judge's model, and none are known for this model at this server; set "
                "judge.price_in and judge.price_out, US dollars for a million tokens (0 for a server of your own)"
            )
        self.prices, self.ceiling = prices, ceiling
        self.usd, self.tokens, self.calls = 0.0, Tokens(0, 0), 0
        self._held, self._flying = 0.0, 0
        self._settled = asyncio.Event()

    async def hold(self, most: Tokens) -> float:
        """Set aside what a call costs at most, waiting for calls in flight where that does not fit; gives what `settle` takes.

        Raises:
            InputError: it does not fit, and nothing is in flight that could turn out cheaper.
        """
        cost = self.prices.of(most) if self.prices else 0.0
        while self.ceiling is not None and self.usd + self._held + cost > self.ceiling:
            if not self._flying:
                raise InputError(
                    f"--max-cost {dollars(self.ceiling)} is reached: {dollars(self.usd)} spent on {self.calls:,} calls. Every "
                    "reply so far is kept, and the rest is left undone; run the same command with a higher --max-cost to go on"
                )
            await self._settled.wait()
        self._held += cost
        self._flying += 1
        return cost

    def settle(self, held: float, tokens: Tokens | None) -> None:
        """A call is over and took these tokens; None where nobody knows, which counts as the most that it may have cost."""
        self._held -= held
        self._flying -= 1
        self.calls += 1
        if tokens is not None:
            self.tokens = self.tokens.plus(tokens)
        self.usd += held if tokens is None else self.prices.of(tokens) if self.prices else 0.0
        self._settled.set()
        self._settled = asyncio.Event()

    def line(self) -> str:
        """Calls and cost so far in a few words."""
        cost = f", {dollars(self.usd)}" if self.prices else f", {self.tokens.read + self.tokens.written:,} tokens"
        return f"{self.calls:,} calls{cost}{'' if self.ceiling is None else f' of at most {dollars(self.ceiling)}'}"


def dollars(usd: float) -> str:
    """An amount to read: cents, or four significant digits where it is less than ten dollars.

    >>> dollars(1234.5), dollars(0.012345)
    ('$1,234.50', '$0.01235')
    """
    return f"${usd:,.2f}" if usd >= 10 or usd == 0 else f"${usd:.4g}"
