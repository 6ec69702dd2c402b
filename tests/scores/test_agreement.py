"""Agreement of judges against values worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
import pytest

from saets.scores.agreement import LEVELS, agreement_table, spearman, weighted_kappa

SAMPLES = 50


def frames(scores: Mapping[str, Sequence[float | None]], *, goal: str = "anger") -> tuple[pl.DataFrame, pl.DataFrame]:
    """Generations and grades of behaviour by each judge, `SAMPLES` texts a scale."""
    count = max(map(len, scores.values()))
    generations = pl.DataFrame(
        {
            "generation_id": [f"{goal}{i}" for i in range(count)],
            "goal": goal,
            "prompt": "I think",
            "sample": [i % SAMPLES for i in range(count)],
        }
    )
    graded = [(f"{goal}{i}", "behaviour", score, judge) for judge, values in scores.items() for i, score in enumerate(values)]
    names = {"generation_id": pl.String, "criterion": pl.String, "score": pl.Float64, "judge": pl.String}
    return generations, pl.DataFrame(graded, schema=names, orient="row")


def counts(one: Sequence[int], other: Sequence[int]) -> np.ndarray:
    table = np.zeros((LEVELS, LEVELS))
    np.add.at(table, (list(one), list(other)), 1)
    return table


def test_the_rank_correlation_is_that_of_ranks_with_ties_in_the_middle() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(LEVELS, size=200)
    other = (one + rng.integers(4, size=200)).clip(max=LEVELS - 1)
    ranks = [pl.Series(scores).rank("average").to_numpy() for scores in (one, other)]
    assert spearman(counts(one, other)) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_kappa_by_hand() -> None:
    # Four texts: distances 0, 0, 1, 2; all 16 pairs of scores of the two judges sum to 44 squared.
    one, other = [0, 1, 2, 2], [0, 1, 1, 4]
    chance = sum((a - b) ** 2 for a in one for b in other) / 16
    assert weighted_kappa(counts(one, other)) == pytest.approx(1 - (5 / 4) / chance)
    assert weighted_kappa(counts(one, one)) == pytest.approx(1)
    assert weighted_kappa(counts([0, 9], [9, 0])) == pytest.approx(-1)


def test_judges_that_agree_in_order_but_not_in_height_have_rank_correlation_1_and_a_lower_kappa() -> None:
    scores = [(i % 7) / 9 for i in range(2 * SAMPLES)]
    row = agreement_table(*frames({"a": scores, "b": [score + 2 / 9 for score in scores]})).row(0, named=True)
    assert row["spearman"] == pytest.approx(1)
    assert 0.4 < row["kappa"] < 0.8
    assert row["difference"] == pytest.approx(-2 / 9)
    assert row["n"] == 2 * SAMPLES


def test_judges_that_grade_at_random_agree_in_nothing_and_the_interval_says_so() -> None:
    rng = np.random.default_rng(1)
    row = agreement_table(*frames({judge: list(rng.integers(LEVELS, size=SAMPLES * 8) / 9) for judge in "ab"})).row(0, named=True)
    for name in ("spearman", "kappa"):
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
        assert row[f"{name}_low"] < 0 < row[f"{name}_high"]
        assert row[f"{name}_high"] - row[f"{name}_low"] == pytest.approx(2 * 1.96 / np.sqrt(SAMPLES * 8), rel=0.3)


def test_texts_that_one_judge_did_not_grade_are_left_out() -> None:
    row = agreement_table(*frames({"a": [0.0, 1.0, None, 0.5], "b": [0.0, 1.0, 1.0]})).row(0, named=True)
    assert (row["n"], row["kappa"]) == (2, 1)


def test_a_judge_that_gives_one_score_only_has_no_rank_correlation() -> None:
    row = agreement_table(*frames({"a": [0.0, 0.5, 1.0], "b": [0.5, 0.5, 0.5]})).row(0, named=True)
    assert (row["spearman"], row["spearman_low"]) == (None, None)
    assert row["kappa"] == pytest.approx(0)


def test_one_judge_alone_agrees_with_nobody_and_three_make_three_pairs() -> None:
    assert agreement_table(*frames({"a": [0.0, 1.0]})).is_empty()
    found = agreement_table(*frames({"c": [0.0, 1.0], "a": [0.0, 1.0], "b": [1.0, 0.0]}))
    assert found.select("judge", "other").rows() == [("a", "b"), ("a", "c"), ("b", "c")]
