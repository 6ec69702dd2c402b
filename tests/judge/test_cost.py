"""What calls cost, and a ceiling that holds while calls are in flight."""

from __future__ import annotations

import asyncio

import pytest

from saets.errors import InputError
from saets.experiment.config import JudgeSettings
from saets.judge.cost import Estimate, Prices, Spending, Tokens, prices_of

OPENAI = "https://api.openai.com/v1/"
PRICES = Prices(1.0, 10.0)
MOST, ACTUAL = Tokens(1000, 100), Tokens(500, 10)
"""What a call may cost, $0.002, and what it does, $0.0006."""


def test_tokens_cost_what_the_list_says() -> None:
    prices = prices_of(JudgeSettings(model="gpt-4o-mini"), OPENAI)
    assert prices == Prices(0.15, 0.60)
    assert prices.of(Tokens(2_000_000, 500_000)) == pytest.approx(2 * 0.15 + 0.5 * 0.60)


def test_a_dated_model_has_the_price_of_its_name() -> None:
    dated = prices_of(JudgeSettings(model="gpt-4o-mini-2024-07-18"), OPENAI)
    assert dated == prices_of(JudgeSettings(model="gpt-4o-mini"), OPENAI)


def test_no_price_is_known_of_another_model_or_server_unless_it_is_set() -> None:
    assert prices_of(JudgeSettings(model="mine"), OPENAI) is None
    assert prices_of(JudgeSettings(model="gpt-4o-mini"), "http://localhost:8000/v1/") is None
    assert prices_of(JudgeSettings(model="mine", price_in=1, price_out=2), "http://localhost:8000/v1/") == Prices(1.0, 2.0)


def test_a_message_never_takes_more_tokens_than_the_most() -> None:
    for message in ("short", "a longer message " * 40, "日本語の文章 " * 30):
        expected, most = Tokens.expected(message, 1), Tokens.most(message, 256)
        assert expected.read < most.read and expected.written < most.written


def test_an_estimate_above_the_ceiling_is_refused_with_both_numbers() -> None:
    estimate = Estimate(1000, Tokens(300_000, 8000), 0.38)
    estimate.check(0.4)
    estimate.check(None)
    with pytest.raises(InputError, match=r"about 1,000 calls of 300 tokens, \$0\.38 in all, and --max-cost is \$0\.2"):
        estimate.check(0.2)
    assert estimate.times(2.5) == Estimate(2500, Tokens(750_000, 20_000), pytest.approx(0.95))


def test_a_ceiling_without_a_price_is_refused() -> None:
    with pytest.raises(InputError, match=r"set judge\.price_in and judge\.price_out"):
        Spending(None, 1.0)


@pytest.mark.parametrize("ceiling", [0.0021, 0.004, 0.0101])
def test_what_is_spent_and_in_flight_never_exceeds_the_ceiling_and_comes_close_to_it(ceiling: float) -> None:
    async def run() -> Spending:
        spending = Spending(PRICES, ceiling)

        async def call() -> None:
            held = await spending.hold(MOST)
            assert spending.usd + spending._held <= ceiling
            await asyncio.sleep(0)
            spending.settle(held, ACTUAL)

        found = await asyncio.gather(*(call() for _ in range(40)), return_exceptions=True)
        refused = [error for error in found if isinstance(error, InputError)]
        assert len(refused) == 40 - spending.calls
        assert all("--max-cost" in str(error) and "is reached" in str(error) for error in refused)
        return spending

    spending = asyncio.run(run())
    assert ceiling - PRICES.of(MOST) < spending.usd <= ceiling
    assert spending.usd == pytest.approx(spending.calls * PRICES.of(ACTUAL))


def test_a_call_of_which_nobody_knows_counts_as_the_most_that_it_may_have_cost() -> None:
    async def run() -> Spending:
        spending = Spending(PRICES, 1.0)
        spending.settle(await spending.hold(MOST), None)
        return spending

    spending = asyncio.run(run())
    assert spending.usd == pytest.approx(PRICES.of(MOST))
    assert spending.line() == "1 calls, $0.002 of at most $1"
