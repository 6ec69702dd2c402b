"""How well the fit predicts effects that it was not fitted to."""

from __future__ import annotations

import math
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from saets.errors import InputError
from saets.plots.looks import BLACK, CRITERIA_LOOKS
from saets.plots.panels import Plot, heading, panel_size
from saets.plots.theme import SCREEN, Size, theme

CELLS = 48
"""Along each side of the plane of predicted and measured effects."""

BINS = 12
"""Of features with equally many each, where there are that many."""

LOWEST_R2 = -0.5


def predicted_effects(effects: pl.DataFrame, *, size: Size = SCREEN) -> Plot:
    """Predicted (x) against measured (y) effects, one count a cell of the plane, and the line where both are equal.

    `effects` has the columns predicted and measured: a row a vector that was left out of the fit and a feature.

    Raises:
        InputError: no effects.
    """
    if effects.is_empty():
        raise InputError("there are no held-out effects to plot; run `saets effects` and `saets fit` first")
    predicted, measured = (effects[name].to_numpy() for name in ("predicted", "measured"))
    low, high = (float(f([f(predicted), f(measured)])) for f in (np.min, np.max))
    edges = np.linspace(low, high if high > low else low + 1, CELLS + 1)
    counts = np.histogram2d(predicted, measured, (edges, edges))[0].astype(int)
    at = edges.tolist()
    cells = [
        {"predicted": at[i], "right": at[i + 1], "measured": at[j], "top": at[j + 1], "count": int(counts[i, j])}
        for i, j in zip(*np.nonzero(counts), strict=True)
    ]
    ends = alt.Scale(domain=[at[0], at[-1]], nice=False)
    x, y = alt.X("predicted:Q", title="predicted effect", scale=ends), alt.Y("measured:Q", title="measured effect", scale=ends)
    shade = alt.Color("count:Q", title="count", scale=alt.Scale(type="log", scheme="blues"), legend=_gradient(size))
    base = alt.Chart(alt.InlineData(values=cells)).encode(tooltip=["predicted:Q", "measured:Q", "count:Q"])
    squares = base.mark_rect().encode(x=x, y=y, x2="right", y2="top", color=shade)
    diagonal = alt.Chart(alt.InlineData(values=[{"at": at[0]}, {"at": at[-1]}]))
    equal = diagonal.mark_line(color=BLACK, strokeDash=[4, 3], strokeWidth=size.marks).encode(x="at:Q", y="at:Q")
    subtitle = f"{len(effects):,} effects on features, of vectors left out of the fit; dashed: predicted = measured"
    return _layered([squares, equal], "Predicted and measured effects", subtitle, size, square=True)


def r2_by_density(features: pl.DataFrame, of: str = "density", *, size: Size = SCREEN) -> Plot:
    """Held-out R2 of features against their density: median and quartiles of bins with equally many features.

    `features` has the columns density and r2 (NaN or null where a feature does not vary). `of` says what the density is.

    Raises:
        InputError: no feature with both.
    """
    known = features.with_columns(pl.col("r2").fill_nan(None)).filter(pl.col("r2").is_not_null() & (pl.col("density") > 0))
    if known.is_empty():
        raise InputError("no feature has both a density and a held-out R2; run `saets fit` again with more effects")
    bins = min(BINS, max(1, len(known) // 4))
    place = (pl.col("density").rank("ordinal") - 1) * bins // len(known)
    groups = known.sort("density").group_by(place.alias("bin"), maintain_order=True)
    quartiles = {name: pl.col("r2").quantile(share).clip(LOWEST_R2) for name, share in _QUARTILES.items()}
    rows = groups.agg(pl.col("density").median(), pl.len().alias("features"), **quartiles).to_dicts()
    lowest = math.floor(10 * min(0.0, *(row["lower"] for row in rows))) / 10
    first, last = math.floor(math.log10(rows[0]["density"])), math.ceil(math.log10(rows[-1]["density"]))
    powers = [10.0**power for power in range(first, last + 1)]
    axis = alt.Axis(values=powers, tickCount=len(powers), format="~g", labelOverlap=True)
    x = alt.X("density:Q", title=of, scale=alt.Scale(type="log"), axis=axis)
    y = alt.Y("median:Q", title="held-out R²", scale=alt.Scale(domain=[lowest, 1.0], nice=False))
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y)
    colour = CRITERIA_LOOKS["behaviour"].colour
    band = base.mark_area(opacity=0.2, color=colour).encode(y=alt.Y("lower:Q", title="held-out R²"), y2="upper")
    line = base.mark_line(color=colour, strokeWidth=1.8 * size.marks)
    points = base.mark_point(color=colour, filled=True, opacity=1, size=42 * size.marks**2)
    dots = points.encode(tooltip=["density:Q", "lower:Q", "median:Q", "upper:Q", "features:Q"])
    left_out = len(features) - len(known)
    subtitle = f"Median and quartiles of {bins} bins of {len(known):,} features, without {left_out:,} that never fire or vary"
    return _layered([band, line, dots], "How well features are predicted", subtitle, size)


_QUARTILES = {"lower": 0.25, "median": 0.5, "upper": 0.75}


def _gradient(size: Size) -> alt.Legend:
    return alt.Legend(orient="right", gradientLength=8 * size.small, gradientThickness=0.9 * size.small, format="~s", tickCount=4)


def _layered(layers: list[alt.Chart], title: str, subtitle: str, size: Size, *, square: bool = False) -> Plot:
    width, height = panel_size(size, 1, left=9.0 if square else 3.0)
    said: dict[str, Any] = heading(title, subtitle, size)
    return alt.LayerChart(layer=layers, width=width, height=width if square else height, config=theme(size, width), **said)
