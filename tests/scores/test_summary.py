"""Winners, ties and differences of methods, from texts to the page."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from saets.scores import statistics
from saets.scores.page import score_table, scores_section
from saets.scores.summary import ALL_GOALS, Summary, summarise

SAMPLES = 60


@pytest.fixture(autouse=True)
def few_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the tests of these tables together."""
    monkeypatch.setattr(statistics, "FLIPS", 2000)


def texts(means: dict[str, dict[str, float]], *, seed: int = 0, samples: int = SAMPLES, prompts: int = 1) -> pl.DataFrame:
    """Texts as of `results.paired`: behaviour about the mean of goal and method at scale 40, less elsewhere."""
    rng = np.random.default_rng(seed)
    rows = [
        (goal, method, f"prompt {prompt}", scale, sample, float(np.clip(rng.normal(mean * share, 0.1), 0, 1)), 0.9)
        for goal, methods in means.items()
        for method, mean in methods.items()
        for prompt in range(prompts)
        for scale, share in ((20.0, 0.7), (40.0, 1.0), (60.0, 0.4))
        for sample in range(samples)
    ]
    names = ["goal", "method", "prompt", "scale", "sample", "behaviour", "coherence"]
    frame = pl.DataFrame(rows, schema=names, orient="row")
    return frame.with_columns((pl.col("behaviour") * pl.col("coherence")).alias("product"), pl.lit(False).alias("failed"))


def standings(found: Summary, goal: str) -> dict[str, str]:
    rows = pl.concat([found.methods, found.overall]).filter(pl.col("goal") == goal)
    return dict(rows.select("method", "standing").iter_rows())


MEANS = {"anger": {"caa": 0.3, "sae": 0.3, "sae_ts": 0.6}, "praise": {"caa": 0.5, "sae": 0.2, "sae_ts": 0.5}}


def test_a_planted_winner_wins_and_equal_methods_tie() -> None:
    found = summarise(texts(MEANS))
    assert standings(found, "anger") == {"caa": "behind", "sae": "behind", "sae_ts": "winner"}
    assert standings(found, "praise") == {"caa": "tie", "sae": "behind", "sae_ts": "tie"}
    assert standings(found, ALL_GOALS) == {"caa": "behind", "sae": "behind", "sae_ts": "winner"}


def test_differences_are_those_of_the_scores_and_lie_in_their_intervals() -> None:
    found = summarise(texts(MEANS), seed=3)
    scores = {(goal, method): score for goal, method, score in found.methods.select("goal", "method", "held_out").iter_rows()}
    for row in found.comparisons.filter(pl.col("goal") != ALL_GOALS).iter_rows(named=True):
        difference = scores[row["goal"], row["method"]] - scores[row["goal"], row["other"]]
        assert row["difference"] == pytest.approx(difference)
        assert row["difference_low"] <= difference <= row["difference_high"]
        assert (row["n"], row["seed"]) == (SAMPLES, 3)
    overall = found.comparisons.filter(pl.col("goal") == ALL_GOALS)
    assert len(overall) == 3
    assert found.overall["held_out"].to_list() == pytest.approx(
        [(scores["anger", method] + scores["praise", method]) / 2 for method in found.overall["method"]]
    )


def test_noise_that_methods_share_narrows_the_interval_of_their_difference() -> None:
    shared = texts({"anger": {"caa": 0.5}}, samples=200)
    both = pl.concat([shared, shared.with_columns(pl.lit("sae").alias("method"), pl.col("behaviour") - 0.05)])
    row = summarise(both.sort("goal", "method")).comparisons.row(0, named=True)
    alone = summarise(shared).methods.row(0, named=True)
    assert row["difference_high"] - row["difference_low"] < 0.2 * (alone["held_out_high"] - alone["held_out_low"])
    assert row["p"] < 0.01


def test_goals_with_different_samples_have_no_common_mean() -> None:
    found = summarise(pl.concat([texts({"anger": MEANS["anger"]}), texts({"praise": MEANS["praise"]}, samples=10)]))
    assert found.overall.is_empty()
    assert set(found.comparisons["goal"]) == {"anger", "praise"}


def test_one_method_has_no_standing_and_one_goal_no_mean() -> None:
    found = summarise(texts({"anger": {"caa": 0.5}}))
    assert found.methods["standing"].to_list() == [None]
    assert found.comparisons.is_empty()
    assert found.overall.is_empty()


def test_a_method_without_grades_is_compared_with_nothing() -> None:
    frame = texts(MEANS)
    lost = (pl.col("method") == "sae") & (pl.col("goal") == "anger")
    scores = pl.col("behaviour", "coherence", "product")
    frame = frame.with_columns(pl.when(~lost).then(scores).name.keep(), lost.alias("failed"))
    found = summarise(frame)
    assert standings(found, "anger") == {"caa": "behind", "sae": None, "sae_ts": "winner"}
    assert set(standings(found, ALL_GOALS)) == {"caa", "sae_ts"}
    pair = found.comparisons.filter((pl.col("goal") == "anger") & (pl.col("method") == "sae"))
    assert pair.select("difference", "p", "p_adjusted").row(0) == (None, None, None)


def test_the_order_of_rows_changes_nothing() -> None:
    frame = texts(MEANS, samples=20, prompts=2)
    for one, other in zip(summarise(frame), summarise(frame.sample(fraction=1, shuffle=True, seed=1)), strict=True):
        assert_frame_equal(one, other, check_exact=True)


def test_prompts_are_strata() -> None:
    frame = texts({"anger": {"caa": 0.5}}, prompts=2, samples=100)
    first = pl.col("prompt") == "prompt 0"
    frame = frame.with_columns(pl.when(first).then(0.2 + pl.col("behaviour") * 0.01).otherwise(0.8).alias("behaviour"))
    row = summarise(frame).methods.row(0, named=True)
    assert row["held_out_high"] - row["held_out_low"] < 0.01, "the spread between prompts is no noise"


def test_the_page_marks_winners_and_ties_and_says_how() -> None:
    found = summarise(texts(MEANS), seed=7)
    page = scores_section(found, {"sae_ts": "SAE-TS", "caa": "CAA", "sae": "SAE"})
    table = page.partition("## Optimistic maximum")[0]
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]] for line in table.splitlines() if "|" in line
    }
    assert rows["goal"] == ["SAE-TS", "CAA", "SAE"] or "SAE-TS" in page
    assert rows["anger"][0].startswith("**")
    assert not rows["anger"][1].endswith("=")
    assert [cell[-1] for cell in rows["praise"]] == ["=", "=", "]"]
    assert "seed 7" in page
    assert "2,000 resamples" in page
    best = found.methods.filter(pl.col("goal") == "anger", pl.col("method") == "caa").row(0, named=True)
    assert "## Optimistic maximum" in page and f"{best['optimistic_max']:.3f} at {best['scale']:g}" in page


def test_a_table_of_one_method_marks_nothing_and_keeps_odd_goals_in_their_cells() -> None:
    found = summarise(texts({"a|b": {"caa": 0.5}, "c\nd": {"caa": 0.5}}))
    table = score_table(found.methods, {"caa": "CAA"})
    assert table.startswith("| goal | CAA |\n| --- | --- |\n| a\\|b | 0.")
    assert "| c d | 0." in table
    assert "**" not in table
