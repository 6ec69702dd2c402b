"""Coherence against behaviour: the way that text takes as the scale grows."""

from __future__ import annotations

import altair as alt
import polars as pl

from saets.plots.looks import BLACK, GREY
from saets.plots.panels import Plot, encodings, facets, named, panel_size, panelled, to, tooltip, top
from saets.plots.theme import SCREEN, Size
from saets.scores.results import MEASURES

ARROW_ROOM = 14
"""Pixels below which a segment gets no arrowhead."""

HEADROOM = 1.15
"""The plane reaches so far beyond the highest score, so that no line crosses the name of the corner above."""


def coherence_behaviour(results: pl.DataFrame, *, size: Size = SCREEN) -> Plot:
    """Mean coherence (x) against mean behaviour (y), joined in order of scale; one panel a goal (and prompt).

    Arrowheads point to the larger scale; a ring marks the unsteered texts, where all lines of a panel start. Text in the
    corner "good" shows the goal and is coherent, in the corner "bad" neither.
    """
    tops = {"coherence": top(results["coherence"]), "behaviour": top(results["behaviour"]) * HEADROOM}
    rows, looks = named(panelled(results))
    rows = _with_arrows(rows, tops, panel_size(size, rows["panel"].n_unique()))
    colour, shape, dash = encodings(looks, size)
    x, y = alt.X("coherence:Q", scale=to(tops["coherence"])), alt.Y("behaviour:Q", scale=to(tops["behaviour"]))
    base = alt.Chart().encode(x=x, y=y, color=colour)
    line = base.mark_line(strokeWidth=1.5 * size.marks).encode(order="scale:Q", strokeDash=dash)
    points = base.mark_point(filled=True, opacity=1, size=32 * size.marks**2).encode(shape=shape, tooltip=tooltip(*MEASURES))
    heads = base.mark_point(filled=True, opacity=1, size=300 * size.marks**2, shape="wedge").encode(
        x=alt.X("middle_coherence:Q", title="coherence"),
        y=alt.Y("middle_behaviour:Q", title="behaviour"),
        angle=alt.Angle("angle:Q", scale=None),
    )
    ring = base.mark_point(size=130 * size.marks**2, strokeWidth=1.5 * size.marks).encode(color=alt.value(BLACK))
    layers = [*_corners(), line, heads, points, ring.transform_filter("datum.scale === 0")]
    subtitle = "Joined in order of scale, arrows towards the larger scale; ring: unsteered"
    return facets(layers, rows, "Coherence and behaviour", subtitle, size)


def _corners() -> list[alt.Chart]:
    """Names of the corners, once a panel."""
    once = alt.Chart().transform_aggregate(rows="count()")
    bad = once.mark_text(align="left", baseline="bottom", dx=4, dy=-3, color=GREY, fontStyle="italic")
    good = once.mark_text(align="right", baseline="top", dx=-4, dy=4, color=GREY, fontStyle="italic")
    return [
        bad.encode(x=alt.value(0), y=alt.value("height"), text=alt.value("bad")),
        good.encode(x=alt.value("width"), y=alt.value(0), text=alt.value("good")),
    ]


def _with_arrows(rows: pl.DataFrame, tops: dict[str, float], panel: tuple[float, float]) -> pl.DataFrame:
    """The rows with the middle of the way to the next larger scale, and its angle in degrees clockwise from up."""
    steps = {name: pl.col(name).shift(-1).over("panel", "method", order_by="scale") - pl.col(name) for name in tops}
    across, up = (step * length / end for step, length, end in zip(steps.values(), panel, tops.values(), strict=True))
    shown = (across**2 + up**2).sqrt() >= ARROW_ROOM
    middles = [pl.when(shown).then(pl.col(name) + step / 2).alias(f"middle_{name}") for name, step in steps.items()]
    return rows.with_columns(pl.arctan2(across, up).degrees().alias("angle"), *middles)
