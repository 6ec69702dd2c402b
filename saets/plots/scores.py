"""The score of each goal and method."""

from __future__ import annotations

import altair as alt
import polars as pl

from saets.plots.looks import BLACK, GREY
from saets.plots.panels import Plot, encodings, facets, named, to, tooltip, top
from saets.plots.theme import SCREEN, Size


def score_bars(summary: pl.DataFrame, *, size: Size = SCREEN) -> Plot:
    """Held-out score of each goal and method with its 95% interval, and the optimistic maximum over scales as a tick.

    `summary` is a `summary_table`; without a held-out score only the tick is drawn.
    """
    end = pl.max_horizontal("held_out", "held_out_high", "optimistic_max")
    label = pl.col("held_out").map_elements("{:.2f}".format, return_dtype=pl.String).fill_null("")
    rows, looks = named(summary.with_columns(pl.col("goal").alias("panel"), end.alias("end"), label.alias("label")))
    base = alt.Chart().encode(y=alt.Y("series:N", sort=[look.name for look in looks], title=None))
    x = alt.X("held_out:Q", title="behaviour × coherence", scale=to(top(rows["end"]) * 1.15))
    said = tooltip("held_out", "held_out_low", "held_out_high", "optimistic_max")
    bars = base.mark_bar(height={"band": 0.7}).encode(x=x, color=encodings(looks, size)[0].legend(None), tooltip=said)
    interval = base.mark_rule(strokeWidth=1.5 * size.marks, color=BLACK).encode(x="held_out_low:Q", x2="held_out_high:Q")
    halo = interval.mark_rule(strokeWidth=4.5 * size.marks, color="white", opacity=0.8)
    best = base.mark_tick(thickness=2 * size.marks, color=GREY).encode(x="optimistic_max:Q")
    text = base.mark_text(align="left", dx=0.5 * size.small).encode(x="end:Q", text="label:N")
    subtitle = "Bar and line: scale chosen on one half, scored on the other, 95% interval. Grey tick: best scale, optimistic"
    left = 0.55 * max((len(look.name) for look in looks), default=1)
    layers = [bars, halo, interval, best, text]
    return facets(layers, rows, "Score by goal and method", subtitle, size, height=alt.Step(2.2 * size.small), left=left)
