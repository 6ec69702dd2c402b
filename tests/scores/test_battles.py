"""Strengths and order effects that were planted in simulated battles are found again."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest

from saets.scores.battles import WINNERS, battle_tables
from saets.scores.bradley_terry import PRIOR, fit_strengths
from saets.scores.page import battles_section
from saets.scores.summary import ALL_GOALS

Judge = Callable[[str, str], str | None]
"""Says which of two methods' texts wins, the first being shown first."""


def davidson(strengths: dict[str, float], order: float = 0.0, tie: float = -1.0, seed: int = 0) -> Judge:
    rng = np.random.default_rng(seed)

    def judge(first: str, second: str) -> str:
        one, other = strengths[first], strengths[second]
        weights = np.exp([one + order / 2, other - order / 2, (one + other) / 2 + tie])
        return WINNERS[rng.choice(3, p=weights / weights.sum())]

    return judge


def fought(
    judge: Judge, methods: tuple[str, ...] = ("caa", "sae", "sae_ts"), samples: int = 150, goals: tuple[str, ...] = ("anger",)
) -> pl.DataFrame:
    rows = [
        (goal, "behaviour", "I think", sample, first, second, judge(first, second), "planted")
        for goal in goals
        for sample in range(samples)
        for first, second in itertools.permutations(methods, 2)
    ]
    columns = ["goal", "criterion", "prompt", "sample", "first", "second", "winner", "judge"]
    return pl.DataFrame(rows, schema=columns, orient="row")


PLANTED = {"caa": -0.8, "sae": 0.1, "sae_ts": 0.7}


def test_planted_strengths_are_found_within_their_intervals() -> None:
    strengths = battle_tables(fought(davidson(PLANTED))).strengths
    assert strengths["method"].to_list() == ["sae_ts", "sae", "caa"]
    for row in strengths.iter_rows(named=True):
        assert row["strength"] == pytest.approx(PLANTED[row["method"]], abs=0.25)
        assert row["strength_low"] < PLANTED[row["method"]] < row["strength_high"]
        assert row["won"] + row["tied"] + row["lost"] == pytest.approx(1)
        assert row["n"] == 600
    assert strengths["strength"].sum() == pytest.approx(0, abs=1e-6)


def test_a_planted_position_bias_is_found_and_does_not_move_the_strengths() -> None:
    fair, biased = (battle_tables(fought(davidson(PLANTED, order=order), samples=400)) for order in (0.0, 1.5))
    row = biased.order.row(0, named=True)
    assert row["first_low"] > 0.6
    fair_row = fair.order.row(0, named=True)
    assert fair_row["first_low"] < 0.5 < fair_row["first_high"]
    assert row["consistent"] < fair_row["consistent"]
    ours, theirs = (dict(tables.strengths.select("method", "strength").iter_rows()) for tables in (fair, biased))
    assert all(abs(ours[method] - theirs[method]) < 0.25 for method in PLANTED)


def test_order_and_ties_are_parameters_of_their_own() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros((2, 2, 3))
    for (i, one), (j, other) in itertools.permutations(enumerate((0.5, -0.5)), 2):
        weights = np.exp([one + 0.4, other - 0.4, (one + other) / 2 + 0.3])
        counts[i, j] = rng.multinomial(50_000, weights / weights.sum())
    found = fit_strengths(counts)
    assert found.strengths == pytest.approx([0.5, -0.5], abs=0.02)
    assert float(found.order) == pytest.approx(0.8, abs=0.03)
    assert float(found.tie) == pytest.approx(0.3, abs=0.03)


def test_two_methods_without_ties_and_order_have_the_log_odds_of_their_wins() -> None:
    counts = np.zeros((2, 2, 3))
    counts[0, 1] = [3000, 1000, 0]
    counts[1, 0] = [1000, 3000, 0]
    found = fit_strengths(counts)
    assert found.strengths[0] - found.strengths[1] == pytest.approx(np.log(3), abs=0.01)


def test_a_method_that_wins_every_battle_has_a_finite_strength() -> None:
    strengths = battle_tables(fought(lambda first, second: "first" if first < second else "second", samples=20)).strengths
    assert strengths["method"].to_list() == ["caa", "sae", "sae_ts"]
    assert strengths["strength"].is_finite().all()
    assert 1 < strengths["strength"][0] < 3 * PRIOR


def test_many_tables_at_once_are_fitted_as_each_alone() -> None:
    counts = np.random.default_rng(0).integers(20, size=(5, 4, 4, 3)).astype(float)
    together = fit_strengths(counts)
    for row, table in enumerate(counts):
        assert together.strengths[row] == pytest.approx(fit_strengths(table).strengths, abs=1e-6)


def test_the_interval_of_a_strength_covers_the_planted_one_about_95_times_in_100() -> None:
    pair = {"caa": 0.3, "sae": -0.3}
    runs = [battle_tables(fought(davidson(pair, seed=seed), ("caa", "sae"), samples=60), seed=seed) for seed in range(60)]
    rows = [tables.strengths.filter(pl.col("method") == "caa").row(0, named=True) for tables in runs]
    assert np.mean([row["strength_low"] < 0.3 < row["strength_high"] for row in rows]) >= 0.85


def test_a_judge_that_always_prefers_the_first_makes_no_method_stronger() -> None:
    tables = battle_tables(fought(lambda first, second: "first"))
    assert tables.strengths["strength"].to_list() == pytest.approx([0, 0, 0], abs=1e-6)
    assert tables.order.select("first", "consistent").row(0) == (1, 0)


def test_failed_battles_are_counted_and_decide_nothing() -> None:
    judge = davidson(PLANTED)
    whole = fought(judge, samples=40)
    lost = whole.with_columns(pl.when(pl.col("sample") > 0).then("winner").alias("winner"))
    tables = battle_tables(lost)
    assert tables.order.select("n", "n_failed").row(0) == (39 * 6, 6)
    assert tables.strengths["n"].to_list() == [39 * 4] * 3
    none = battle_tables(whole.with_columns(pl.lit(None, pl.String).alias("winner")))
    assert none.strengths.is_empty()
    assert none.order.select("first", "n", "n_failed").row(0) == (None, 0, 240)


def test_several_goals_are_counted_together_too_and_the_order_of_rows_changes_nothing() -> None:
    battles = fought(davidson(PLANTED), samples=30, goals=("anger", "praise"))
    tables = battle_tables(battles)
    assert tables.order["goal"].to_list() == ["anger", "praise", ALL_GOALS]
    assert tables.strengths.filter(pl.col("goal") == ALL_GOALS)["n"].to_list() == [240] * 3
    shuffled = battle_tables(battles.sample(fraction=1, shuffle=True, seed=1))
    assert shuffled.strengths.equals(tables.strengths)
    assert shuffled.order.equals(tables.order)


def test_the_page_shows_strengths_and_position_bias() -> None:
    page = battles_section(battle_tables(fought(davidson(PLANTED))), {"sae_ts": "SAE-TS"})
    assert "## Battles" in page
    assert "| anger | behaviour | SAE-TS | +0." in page
    assert "shown first" in page
