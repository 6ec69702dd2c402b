"""The score of each goal and method."""

from __future__ import annotations

import json

import altair as alt
import polars as pl

from saets.plots.looks import BLACK
from saets.plots.panels import Plot, encodings, facets, named, to, tooltip, top
from saets.plots.theme import SCREEN, Size

MARKS = {"optimistic_max": ("best scale, optimistic", "M0,-1.6L0,1.6"), "paper": ("the paper's, optimistic", "diamond")}
"""Figures drawn beside the bars: their names, and Vega symbols or SVG paths."""


def score_bars(summary: pl.DataFrame, paper: pl.DataFrame | None = None, *, size: Size = SCREEN) -> Plot:
    """Held-out score of each goal and method with its 95% interval, and the optimistic maximum over scales beside it.

    `summary` is a `summary_table`, or `Summary.methods` and `Summary.overall` together; without a held-out score only the
    maximum is drawn. `paper` has the columns goal, method and score (see `saets.plots.paper`): maxima over scales too.
    """
    published = (paper if paper is not None else _NOTHING).select("goal", "method", pl.col("score").alias("paper"))
    summary = summary.join(published, on=("goal", "method"), how="left", maintain_order="left")
    label = pl.col("held_out").map_elements("{:.2f}".format, return_dtype=pl.String).fill_null("")
    rows, looks = named(summary.with_columns(pl.col("goal").alias("panel"), label.alias("label")))
    end = rows.select(pl.max_horizontal("held_out", "held_out_high", *MARKS)).to_series()
    drawn = {column: mark for column, mark in MARKS.items() if rows[column].null_count() < len(rows)}
    base = alt.Chart().encode(y=alt.Y("series:N", sort=[look.name for look in looks], title=None))
    x = alt.X("held_out:Q", title="behaviour × coherence", scale=to(top(end) * 1.2))
    said = tooltip("held_out", "held_out_low", "held_out_high", *drawn)
    bars = base.mark_bar(height={"band": 0.7}).encode(x=x, color=encodings(looks, size)[0].legend(None), tooltip=said)
    interval = base.mark_rule(strokeWidth=1.5 * size.marks, color=BLACK).encode(x="held_out_low:Q", x2="held_out_high:Q")
    halo = interval.mark_rule(strokeWidth=4.5 * size.marks, color="white", opacity=0.8)
    names, shapes = [name for name, _ in drawn.values()], [shape for _, shape in drawn.values()]
    which = " : ".join(f"datum.what === '{column}' ? {json.dumps(name)}" for column, (name, _) in drawn.items()) + " : ''"
    others = base.transform_fold(list(drawn), as_=["what", "value"]).transform_calculate(mark=which)
    shape = alt.Shape("mark:N", scale=alt.Scale(domain=names, range=shapes), legend=_legend(size))
    at = others.encode(x=alt.X("value:Q", title="behaviour × coherence"), shape=shape)
    area, width = 60 * size.marks**2, 1.6 * size.marks
    beside = [
        at.mark_point(filled=False, size=area, strokeWidth=3 * width, color="white", opacity=0.8),
        at.mark_point(filled=True, fill="white", stroke=BLACK, size=area, strokeWidth=width, opacity=1),
    ]
    text = base.mark_text(align="right", dx=-2).encode(x=alt.value("width"), text="label:N")
    subtitle = "Bar, line and number: scale chosen on one half of the samples, scored on the other, with 95% interval"
    left = 0.55 * max((len(look.name) for look in looks), default=1)
    layers = [bars, halo, interval, *(beside if drawn else []), text]
    return facets(layers, rows, "Score by goal and method", subtitle, size, height=alt.Step(2.2 * size.small), left=left)


_NOTHING = pl.DataFrame(schema={"goal": pl.String, "method": pl.String, "score": pl.Float64})


def _legend(size: Size) -> alt.Legend:
    width = 1.6 * size.marks
    return alt.Legend(
        title=None, direction="horizontal", symbolStrokeWidth=width, symbolStrokeColor=BLACK, symbolFillColor="white"
    )
