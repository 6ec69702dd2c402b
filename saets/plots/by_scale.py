"""What grows or falls with the scale: scores of text, and the model's loss."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import polars as pl

from saets.errors import InputError, unknown
from saets.plots.looks import BLACK, CRITERIA_LOOKS
from saets.plots.panels import Plot, encodings, facets, lines, named, panelled
from saets.plots.theme import SCREEN, Size

BANDS = "Bands: 95% bootstrap intervals"


def product_by_scale(results: pl.DataFrame, *, size: Size = SCREEN) -> Plot:
    """behaviour × coherence against scale with 95% bands; one panel a goal (and prompt), one line a method.

    `results` is a `scale_table` or a `results_table`.
    """
    rows, looks = named(panelled(results))
    layers = lines(looks, "product", "behaviour × coherence", size)
    return facets(layers, rows, "Behaviour × coherence by scale", BANDS, size)


def criteria_by_scale(results: pl.DataFrame, method: str, goals: Sequence[str] = (), *, size: Size = SCREEN) -> Plot:
    """Behaviour, coherence and their product against scale with 95% bands, for one method; one panel a goal (and prompt).

    `goals` are those drawn, by default all that the method has.

    Raises:
        InputError: `results` has no such method, or not one of the goals for it.
    """
    if method not in results["method"]:
        raise unknown("method", method, results["method"].unique())
    results = results.filter(pl.col("method") == method)
    for goal in goals:
        if goal not in results["goal"]:
            raise unknown("goal", goal, results["goal"].unique())
    (look,) = named(results)[1]
    chosen = panelled(results.filter(pl.col("goal").is_in(list(goals))) if goals else results)
    rows = pl.concat(
        chosen.select(
            *("panel", "scale", "n", "n_failed"),
            pl.lit(series.name).alias("series"),
            *(pl.col(name + end).alias("value" + end) for end in ("", "_low", "_high")),
        )
        for name, series in CRITERIA_LOOKS.items()
    )
    layers = lines(list(CRITERIA_LOOKS.values()), "value", "mean score", size)
    return facets(layers, rows, f"{look.name}: scores by scale", BANDS, size)


def loss_by_scale(losses: pl.DataFrame, *, size: Size = SCREEN) -> Plot:
    """The model's loss on the calibration text against scale, and the loss that calibration aims at; one panel a goal.

    `losses` has the columns goal, method, scale, loss and target (null where a scale was set without a search).

    Raises:
        InputError: no losses.
    """
    if losses.is_empty():
        raise InputError("there are no losses of calibrated vectors to plot; run `saets vectors` first")
    rows, looks = named(losses.with_columns(pl.col("goal").alias("panel")))
    colour, shape, dash = encodings(looks, size)
    base = alt.Chart().encode(
        x="scale:Q",
        y=alt.Y("loss:Q", title="loss (nats a token)", scale=alt.Scale(zero=False)),
        color=colour,
        tooltip=[alt.Tooltip("series:N", title=" "), "scale:Q", alt.Tooltip("loss:Q", format=".3f")],
    )
    line = base.mark_line(strokeWidth=1.8 * size.marks).encode(strokeDash=dash)
    points = base.mark_point(filled=True, opacity=1, size=42 * size.marks**2).encode(shape=shape)
    targets = alt.Chart().transform_aggregate(target="max(target)").transform_filter("isValid(datum.target)").encode(y="target:Q")
    rule = targets.mark_rule(strokeWidth=size.marks, strokeDash=[2, 2], color=BLACK)
    label = targets.encode(x=alt.value(2), text=alt.value("target"))
    halo = label.mark_text(align="left", baseline="bottom", dy=-2, stroke="white", strokeWidth=4)
    text = label.mark_text(align="left", baseline="bottom", dy=-2)
    subtitle = "On the calibration text, at the scales that the search measured; dotted rule: the loss it aims at"
    return facets([rule, line, halo, text, points], rows, "Loss by scale", subtitle, size)
