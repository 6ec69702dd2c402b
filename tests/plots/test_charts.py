"""What charts show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from saets import plots
from saets.errors import InputError
from saets.scores.results import results_table
from saets.scores.summary import summarise, summary_table
from tests.plots.charts import CHARTS, EFFECTS, LOSSES, ODD, failed, features, held_out, rows, texts


def marks(chart: plots.Plot, kind: str) -> list[dict[str, Any]]:
    """The layers of a kind of mark."""
    found = chart.to_dict()
    return [layer for layer in found.get("spec", found)["layer"] if layer["mark"]["type"] == kind]


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize(
    "frame",
    [texts(samples=1), texts().filter(pl.col("scale") == 40), failed(texts())],
    ids=["one sample", "one scale", "all failed"],
)
def test_a_chart_of_little_or_nothing_still_draws(name: str, frame: pl.DataFrame) -> None:
    assert CHARTS[name](frame, plots.SCREEN).to_dict()["$schema"].startswith("https://vega.github.io/schema/vega-lite")


def test_panels_are_goals_and_where_there_are_several_prompts_goals_and_prompts() -> None:
    one = rows(plots.product_by_scale(results_table(texts())))
    assert {row["panel"] for row in one} == {"london", ODD}
    two = rows(plots.product_by_scale(results_table(texts(("london",), ("I think", "")))))
    assert {row["panel"] for row in two} == {"london, “I think”", "london, no prompt"}


def test_every_line_starts_at_the_unsteered_texts() -> None:
    drawn = [row for row in rows(plots.product_by_scale(results_table(texts()))) if row["scale"] == 0 and row["goal"] == "london"]
    assert [row["series"] for row in drawn] == ["CAA", "SAE-TS"]
    assert len({row["product"] for row in drawn}) == 1


def test_the_criteria_are_drawn_as_they_stand_in_the_results() -> None:
    results = results_table(texts())
    drawn = pl.DataFrame(rows(plots.criteria_by_scale(results, "caa", ["london"])))
    expected = results.filter((pl.col("goal") == "london") & (pl.col("method") == "caa"))
    for series, column in (("behaviour", "behaviour"), ("coherence", "coherence"), ("behaviour × coherence", "product")):
        assert drawn.filter(pl.col("series") == series)["value"].to_list() == expected[column].to_list()


def test_arrowheads_point_to_the_larger_scale() -> None:
    means = [(0.1, 0.9), (0.5, 0.9), (0.5, 0.5)]
    columns = {"goal": "london", "method": "caa", "prompt": "", "failed": False, "product": 0.0}
    frame = pl.concat(
        pl.DataFrame({"scale": [20.0 * i], "sample": [0], "behaviour": [y], "coherence": [x]}) for i, (y, x) in enumerate(means)
    ).with_columns(**{name: pl.lit(value) for name, value in columns.items()})
    up, left, last = rows(plots.coherence_behaviour(results_table(frame)))
    assert up["angle"] == pytest.approx(0)
    assert (up["middle_behaviour"], up["middle_coherence"]) == (pytest.approx(0.3), pytest.approx(0.9))
    assert left["angle"] == pytest.approx(-90)
    assert (left["middle_behaviour"], left["middle_coherence"]) == (pytest.approx(0.5), pytest.approx(0.7))
    assert last["middle_behaviour"] is None


def test_the_histogram_counts_every_vector_once() -> None:
    drawn = pl.DataFrame(rows(plots.calibration_histogram(EFFECTS)))
    counts = dict(drawn.group_by("outcome").agg(pl.col("vectors").sum()).iter_rows())
    assert counts == {"ok (6,000)": 6000, "capped (500)": 500}
    assert drawn.filter(pl.col("outcome") == "capped (500)").select("high", "vectors").rows() == [(200.0, 500)]


@pytest.mark.parametrize("scale", [0.0, 80.0])
def test_the_histogram_of_one_scale_is_one_bar(scale: float) -> None:
    effects = pl.DataFrame({"scale": [scale] * 5, "calibration": ["fixed"] * 5})
    (bar,) = rows(plots.calibration_histogram(effects))
    assert bar["vectors"] == 5
    assert bar["low"] <= scale <= bar["high"]


def test_what_cannot_be_drawn_is_refused_by_name() -> None:
    results = results_table(texts())
    with pytest.raises(InputError, match="unknown goal 'lodon'.*did you mean 'london'"):
        plots.criteria_by_scale(results, "caa", ["lodon"])
    with pytest.raises(InputError, match="unknown method 'sae'; known: caa, sae_ts"):
        plots.criteria_by_scale(results, "sae")
    with pytest.raises(InputError, match="unknown method 'mine'"):
        plots.product_by_scale(results.with_columns(pl.lit("mine").alias("method")))
    with pytest.raises(InputError, match="no results to plot"):
        plots.product_by_scale(results.clear())
    with pytest.raises(InputError, match="no effects to plot"):
        plots.calibration_histogram(EFFECTS.clear())
    with pytest.raises(InputError, match="no losses of calibrated vectors"):
        plots.loss_by_scale(LOSSES.clear())
    with pytest.raises(InputError, match="no held-out effects"):
        plots.predicted_effects(held_out().clear())
    with pytest.raises(InputError, match="no feature has both"):
        plots.r2_by_density(features().with_columns(r2=pl.lit(float("nan"))))


def test_criteria_have_a_panel_for_each_goal_chosen() -> None:
    results = results_table(texts(("london", "love", "wedding")))
    assert {row["panel"] for row in rows(plots.criteria_by_scale(results, "caa"))} == {"london", "love", "wedding"}
    assert {row["panel"] for row in rows(plots.criteria_by_scale(results, "caa", ["love", "wedding"]))} == {"love", "wedding"}


def test_the_corners_of_the_plane_are_named_once_a_panel(tmp_path: Path) -> None:
    (svg,) = plots.save(plots.coherence_behaviour(results_table(texts())), tmp_path, "plane", ["svg"])
    page = svg.read_text()
    assert (page.count(">good</text>"), page.count(">bad</text>")) == (2, 2)


def test_scores_stand_beside_the_papers() -> None:
    summary = summary_table(texts(("london", "love")))
    paper = pl.DataFrame({"goal": ["london", "paris"], "method": ["sae_ts", "sae_ts"], "score": [0.95, 0.1]})
    drawn = {(row["goal"], row["method"]): row for row in rows(plots.score_bars(summary, paper))}
    assert drawn["london", "sae_ts"]["paper"] == 0.95
    assert [drawn[key]["paper"] for key in drawn if key != ("london", "sae_ts")] == [None] * 3
    assert len(drawn) == 4
    assert beside(plots.score_bars(summary, paper)) == ["best scale, optimistic", "the paper's, optimistic"]
    assert beside(plots.score_bars(summary)) == ["best scale, optimistic"]


def beside(chart: plots.Plot) -> list[str]:
    """Names of the marks beside the bars."""
    return list(marks(chart, "point")[0]["encoding"]["shape"]["scale"]["domain"])


def test_the_mean_over_goals_is_a_panel_of_its_own() -> None:
    compared = summarise(texts(("london", "love")))
    drawn = rows(plots.score_bars(pl.concat([compared.methods, compared.overall])))
    assert list(dict.fromkeys(row["panel"] for row in drawn)) == ["london", "love", "all goals"]


def test_losses_are_drawn_with_the_one_they_aim_at() -> None:
    chart = plots.loss_by_scale(LOSSES)
    assert [(row["scale"], row["loss"]) for row in rows(chart)] == LOSSES.select("scale", "loss").rows()
    (rule,) = marks(chart, "rule")
    assert rule["transform"][0]["aggregate"] == [{"op": "max", "field": "target", "as": "target"}]
    free = plots.loss_by_scale(LOSSES.with_columns(target=pl.lit(None, pl.Float64)))
    assert marks(free, "rule")[0]["transform"][1] == {"filter": "isValid(datum.target)"}


def test_every_effect_is_counted_in_the_cell_where_it_lies() -> None:
    frame = held_out()
    data = plots.predicted_effects(frame).to_dict()["datasets"].values()
    cells = pl.DataFrame(next(found for found in data if "count" in found[0]))
    assert cells["count"].sum() == len(frame)
    top = cells.sort("measured")[-1]
    highest = frame.sort("measured")[-1]
    assert top["measured"].item() <= highest["measured"].item() <= top["top"].item() + 1e-9
    assert top["predicted"].item() <= highest["predicted"].item() <= top["right"].item()


def test_one_effect_that_is_everywhere_the_same_is_one_cell() -> None:
    frame = pl.DataFrame({"predicted": [0.5] * 3, "measured": [0.5] * 3})
    data = plots.predicted_effects(frame).to_dict()["datasets"].values()
    assert [cell["count"] for cell in next(found for found in data if "count" in found[0])] == [3]


def test_r2_is_summed_up_in_bins_of_equally_many_features_and_the_rest_is_counted() -> None:
    frame = pl.concat([features(), pl.DataFrame({"density": [0.0, 0.1], "r2": [0.5, float("nan")]})])
    chart = plots.r2_by_density(frame)
    (bins,) = chart.to_dict()["datasets"].values()
    assert [row["features"] for row in bins] == [100] * 12
    known = features()
    for i, row in enumerate(bins):
        part = known["r2"].to_numpy()[100 * i : 100 * (i + 1)]
        assert row["median"] == pytest.approx(np.median(part), abs=1e-3)
        assert row["lower"] <= row["median"] <= row["upper"]
        assert row["density"] == pytest.approx(np.median(known["density"].to_numpy()[100 * i : 100 * (i + 1)]), rel=1e-6)
    assert "1,200 features, without 2" in chart.to_dict()["description"]
