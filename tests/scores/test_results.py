"""Scores, choices and intervals against numbers worked out by hand and planted truths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from saets.errors import InputError
from saets.scores.page import score_table
from saets.scores.results import paired, results_table, scale_table
from saets.scores.summary import summary_table

Scores = Sequence[tuple[float | None, float | None]]
"""Behaviour and coherence of each sample; None is a failed grade."""


def run(cells: Mapping[tuple[str, float], Scores], *, goal: str = "london", prompt: str = "I think") -> list[pl.DataFrame]:
    """Generations and grades of one goal, from the scores by (method, scale)."""
    generations, grades = [], []
    for (method, scale), scores in cells.items():
        for sample, pair in enumerate(scores):
            text = f"{goal}/{method}/{prompt}/{scale}/{sample}"
            place = {"goal": goal, "method": method, "vector_id": f"{goal}/{method}", "scale": float(scale), "prompt": prompt}
            generations.append({"generation_id": text, **place, "sample": sample, "seed": sample, "completion": "a text"})
            for criterion, score in zip(("behaviour", "coherence"), pair, strict=True):
                error = "timed out" if score is None else None
                grade = {
                    "generation_id": text,
                    "criterion": criterion,
                    "score": score,
                    "reply": "",
                    "error": error,
                    "judge": "fake",
                }
                grades.append(grade)
    schema = {"score": pl.Float64, "error": pl.String}
    return [pl.DataFrame(generations), pl.DataFrame(grades, schema_overrides=schema)]


def joined(*runs: list[pl.DataFrame]) -> pl.DataFrame:
    generations, grades = (pl.concat(parts) for parts in zip(*runs, strict=True))
    return paired(generations, grades)


def texts(cells: Mapping[tuple[str, float], Scores], **place: str) -> pl.DataFrame:
    return paired(*run(cells, **place))


def noise(mean: float, n: int, seed: int) -> Scores:
    """Samples whose behaviour and coherence are 0 or 1 with this probability, independently."""
    drawn = np.random.default_rng(seed).random((n, 2)) < mean
    return [(float(behaviour), float(coherence)) for behaviour, coherence in drawn]


def test_one_lost_grade_does_not_shift_its_neighbours() -> None:
    found = texts({("caa", 20): [(0.5, 1.0), (0.25, None), (1.0, 0.5)]})
    assert found["sample"].to_list() == [0, 1, 2]
    assert found["behaviour"].to_list() == [0.5, None, 1.0]
    assert found["coherence"].to_list() == [1.0, None, 0.5]
    assert found["product"].to_list() == [0.5, None, 0.5]
    assert found["failed"].to_list() == [False, True, False]


@pytest.mark.parametrize("loss", ["no row", "null", "NaN"])
def test_a_missing_grade_and_a_failed_grade_count_alike(loss: str) -> None:
    generations, grades = run({("caa", 20): [(1.0, 1.0), (1.0, 1.0)]})
    lost = (pl.col("generation_id") == generations["generation_id"][1]) & (pl.col("criterion") == "behaviour")
    if loss == "no row":
        grades = grades.filter(~lost)
    else:
        value = None if loss == "null" else float("nan")
        grades = grades.with_columns(pl.when(lost).then(pl.lit(value, pl.Float64)).otherwise("score").alias("score"))
    row = scale_table(paired(generations, grades)).row(0, named=True)
    assert (row["n"], row["n_failed"], row["product"]) == (1, 1, 1.0)


def test_the_score_of_a_scale_is_the_product_of_the_means() -> None:
    row = scale_table(texts({("caa", 20): [(0.0, 1.0), (1.0, 0.5)]})).row(0, named=True)
    assert (row["behaviour"], row["coherence"], row["product"]) == (0.5, 0.75, 0.375)


def test_the_unsteered_texts_are_scale_0_of_every_method_of_their_goal() -> None:
    london = run({("unsteered", 0): [(0.0, 0.5)], ("caa", 20): [(1.0, 1.0)], ("sae", 20): [(1.0, 1.0)]})
    love = run({("unsteered", 0): [(0.25, 1.0)], ("caa", 20): [(1.0, 1.0)]}, goal="love")
    found = scale_table(joined(london, love)).filter(pl.col("scale") == 0).select("goal", "method", "behaviour", "coherence")
    assert found.rows() == [("london", "caa", 0.0, 0.5), ("london", "sae", 0.0, 0.5), ("love", "caa", 0.25, 1.0)]


def test_a_goal_with_unsteered_texts_only_keeps_them() -> None:
    assert scale_table(texts({("unsteered", 0): [(0.0, 0.5)]})).select("method", "n").rows() == [("unsteered", 1)]


def test_a_methods_own_text_at_scale_0_goes_before_the_unsteered_one() -> None:
    found = scale_table(texts({("unsteered", 0): [(0.0, 0.0), (0.0, 0.0)], ("caa", 0): [(1.0, 1.0)]}))
    assert found.select("method", "n", "behaviour").rows() == [("caa", 2, 0.5)]


def test_the_chosen_scale_is_the_planted_best_one() -> None:
    means = {0: 0.1, 20: 0.4, 40: 0.8, 60: 0.5}
    found = results_table(texts({("caa", scale): noise(mean, 60, int(scale)) for scale, mean in means.items()}))
    assert found.filter("chosen")["scale"].to_list() == [40.0]
    assert found["optimistic_max"].unique().to_list() == [found["product"].max()]
    assert summary_table(texts({("caa", scale): noise(mean, 60, scale) for scale, mean in means.items()}))["scale"][0] == 40


def test_each_prompt_chooses_its_own_scale_and_the_summary_pools_them() -> None:
    good, poor = [(1.0, 1.0)] * 2, [(0.5, 0.0)] * 2
    found = joined(
        run({("caa", 20): good, ("caa", 40): poor}),
        run({("caa", 20): poor, ("caa", 40): [(0.5, 1.0)] * 2}, prompt="Surprisingly,"),
    )
    assert results_table(found).filter("chosen").select("prompt", "scale").rows() == [("I think", 20), ("Surprisingly,", 40)]
    row = summary_table(found).row(0, named=True)
    assert (row["scale"], row["optimistic_max"], row["held_out"], row["n"]) == (20, 0.375, 0.375, 8)


def test_of_equal_scales_the_lowest_is_chosen() -> None:
    found = texts({("caa", scale): [(0.5, 0.5)] * 4 for scale in (40, 20, 60)})
    assert results_table(found).filter("chosen")["scale"].to_list() == [20.0]
    assert summary_table(found).select("scale", "scale_even", "scale_odd").row(0) == (20.0, 20.0, 20.0)


def test_the_held_out_score_by_hand() -> None:
    found = summary_table(texts({("caa", 20): [(1.0, 1.0), (0.5, 0.5)], ("caa", 40): [(0.0, 0.0), (0.9, 0.9)]}))
    row = found.row(0, named=True)
    # Even samples choose 20, which odd ones score 0.25; odd ones choose 40, which even ones score 0.
    assert (row["scale_even"], row["scale_odd"], row["held_out"]) == (20, 40, 0.125)
    assert (row["scale"], row["optimistic_max"]) == (20, 0.75 * 0.75)
    assert row["held_out_low"] is None, "one sample a half has no spread to draw from"


def test_on_pure_noise_the_held_out_score_is_honest_and_the_maximum_is_not() -> None:
    drawn = [[noise(0.5, 40, 1000 * goal + scale) for scale in range(0, 200, 20)] for goal in range(30)]
    runs = [
        run({("caa", 20 * column): scores for column, scores in enumerate(scales)}, goal=f"goal{goal:02}")
        for goal, scales in enumerate(drawn)
    ]
    found = summary_table(joined(*runs))
    halves = np.array(drawn).reshape(30, 10, 20, 2, 2).mean(axis=2).prod(axis=-1)
    by_hand = [(odd[even.argmax()] + even[odd.argmax()]) / 2 for even, odd in halves.transpose(0, 2, 1)]
    assert found["held_out"].to_list() == pytest.approx(by_hand)
    error = np.std(by_hand) / np.sqrt(30)
    assert found["held_out"].mean() == pytest.approx(0.25, abs=4 * error)
    assert np.mean(found["optimistic_max"].to_numpy()) > 0.25 + 4 * error
    assert found.filter((pl.col("held_out_low") < 0.25) & (pl.col("held_out_high") > 0.25)).height >= 28
    assert found.filter(pl.col("held_out").is_between("held_out_low", "held_out_high")).height == 30


def test_the_interval_covers_the_planted_mean_about_95_times_in_100() -> None:
    found = scale_table(joined(*(run({("caa", 20): noise(0.5, 100, seed)}, goal=f"goal{seed:03}") for seed in range(100))))
    for measure, truth in (("behaviour", 0.5), ("coherence", 0.5), ("product", 0.25)):
        covered = found.filter((pl.col(f"{measure}_low") <= truth) & (pl.col(f"{measure}_high") >= truth)).height
        assert 88 <= covered <= 100, measure
    width = (found["behaviour_high"] - found["behaviour_low"]).mean()
    assert width == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.05)


def test_both_criteria_of_a_text_are_drawn_together() -> None:
    row = scale_table(texts({("caa", 20): [(value, 1 - value) for value in np.linspace(0, 1, 50)]})).row(0, named=True)
    assert row["behaviour_low"] == pytest.approx(1 - row["coherence_high"])
    assert row["product_high"] <= 0.25, "behaviour + coherence is 1 in every resample, so their product is at most 1/4"


def test_all_failed_gives_nulls() -> None:
    found = texts({("caa", 20): [(None, 1.0), (None, None)], ("caa", 40): [(1.0, None), (None, 0.0)]})
    table = results_table(found)
    assert table["n_failed"].to_list() == [2, 2]
    assert table["chosen"].to_list() == [False, False]
    assert table.select("behaviour", "product", "product_low", "optimistic_max").null_count().row(0) == (2, 2, 2, 2)
    summary = summary_table(found)
    assert summary.select("scale", "held_out", "optimistic_max", "n", "n_failed").row(0) == (None, None, None, 0, 4)
    assert score_table(summary).splitlines()[-1] == "| london | – |"


def test_one_sample_has_no_halves() -> None:
    found = texts({("caa", 20): [(0.5, 0.5)], ("caa", 40): [(1.0, 0.5)]})
    assert results_table(found)["product_low"].to_list() == [None, None]
    summary = summary_table(found)
    assert summary.select("scale", "held_out", "held_out_low", "optimistic_max").row(0) == (40.0, None, None, 0.5)
    assert "max 0.500, not held out" in score_table(summary)


def test_the_order_of_rows_and_other_goals_do_not_change_a_result() -> None:
    cells = {("caa", float(scale)): noise(0.5, 20, scale) for scale in (20, 40)}
    generations, grades = run(cells)
    shuffled = paired(generations.sample(fraction=1, shuffle=True, seed=1), grades.sample(fraction=1, shuffle=True, seed=2))
    more = joined([generations, grades], run({("sae", 20): noise(0.2, 7, 9)}, goal="anger"))
    for table in (results_table, summary_table):
        alone = table(paired(generations, grades))
        assert_frame_equal(table(shuffled), alone, check_exact=True)
        assert_frame_equal(table(more).filter(pl.col("goal") == "london"), alone, check_exact=True)
        assert not table(paired(generations, grades), seed=1).equals(alone)


def test_the_results_have_the_columns_users_were_promised() -> None:
    bounds = ["behaviour_low", "behaviour_high", "coherence_low", "coherence_high", "product_low", "product_high"]
    measures = ["chosen", "behaviour", "coherence", "product", *bounds, "n", "n_failed", "optimistic_max"]
    assert results_table(texts({("caa", 20): [(1.0, 1.0)]})).columns == ["goal", "method", "prompt", "scale", *measures]


def test_what_cannot_be_scored_is_refused_by_name() -> None:
    generations, grades = run({("caa", 20): [(1.0, 1.0)], ("caa", 40): [(1.0, 1.0)]})
    other = pl.when(pl.col("scale") == 40).then(pl.lit("other")).otherwise("vector_id").alias("vector_id")
    renamed = generations.with_columns(pl.format("{}-again", "generation_id").alias("generation_id"))
    refused = [
        (generations.clear(), grades, "there are no generations; run `saets generate`"),
        (generations, grades.clear(), "there are no grades; run `saets grade`"),
        (generations.drop("sample", "scale"), grades, "generations has no column scale, sample"),
        (generations, pl.concat([grades, grades]), "two grades of one text"),
        (pl.concat([generations, generations]), grades, "the same id twice"),
        (pl.concat([generations, renamed]), grades, "two texts for one sample"),
        (generations.with_columns(other), grades, "two vectors.*goal 'london', method 'caa'"),
        (renamed, grades, "none of the 4 grades is of these 2 texts"),
    ]
    for bad_generations, bad_grades, message in refused:
        with pytest.raises(InputError, match=message):
            paired(bad_generations, bad_grades)
    with pytest.raises(InputError, match="there are no texts"):
        scale_table(paired(generations, grades).clear())
