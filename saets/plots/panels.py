"""What charts share: panels of one width, the series of a legend, lines with bands, tooltips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from saets.errors import InputError
from saets.plots.looks import Look, method_looks
from saets.plots.theme import Size, theme

Plot = alt.Chart | alt.LayerChart | alt.FacetChart

WIDEST = 300.0
"""Pixels of a panel, where there are few."""


def named(rows: pl.DataFrame) -> tuple[pl.DataFrame, list[Look]]:
    """The rows with the methods' display names as `series`, and the looks of those methods in the order of `method_looks`.

    Raises:
        InputError: a method that is not known.
    """
    looks = method_looks(rows["method"])
    names = pl.col("method").replace_strict({method: look.name for method, look in looks.items()}, return_dtype=pl.String)
    return rows.with_columns(names.alias("series")), [look for method, look in looks.items() if method in rows["method"]]


def panelled(results: pl.DataFrame) -> pl.DataFrame:
    """The rows with the title of their panel: the goal, and the prompt where there are several."""
    if results["prompt"].n_unique() <= 1:
        return results.with_columns(pl.col("goal").alias("panel"))
    prompt = pl.when(pl.col("prompt") == "").then(pl.lit("no prompt")).otherwise(pl.format("“{}”", "prompt"))
    return results.with_columns(pl.format("{}, {}", "goal", prompt).alias("panel"))


def encodings(looks: Sequence[Look], size: Size) -> tuple[alt.Color, alt.Shape, alt.StrokeDash]:
    """Colour, shape and dash of the column `series`; one legend shows colour and shape."""
    longest = max((len(look.name) for look in looks), default=1)
    columns = max(1, int(0.85 * size.width / (0.55 * size.large * longest + 2.5 * size.large)))
    names, legend = [look.name for look in looks], alt.Legend(title=None, columns=columns)
    colours, shapes, dashes = [look.colour for look in looks], [look.shape for look in looks], [look.dash for look in looks]
    return (
        alt.Color("series:N", scale=alt.Scale(domain=names, range=colours), legend=legend),
        alt.Shape("series:N", scale=alt.Scale(domain=names, range=shapes), legend=legend),
        alt.StrokeDash("series:N", scale=alt.Scale(domain=names, range=dashes), legend=None),
    )


def tooltip(*scores: str) -> list[alt.Tooltip]:
    """Series, scale, the scores named, and how many texts they are of."""
    score = [alt.Tooltip(f"{name}:Q", format=".3f") for name in scores]
    return [alt.Tooltip("series:N", title=" "), alt.Tooltip("scale:Q"), *score, alt.Tooltip("n:Q"), alt.Tooltip("n_failed:Q")]


def lines(looks: Sequence[Look], value: str, title: str, size: Size) -> list[alt.Chart]:
    """Bands, lines and points of the column `value` against scale."""
    colour, shape, dash = encodings(looks, size)
    low, high = f"{value}_low", f"{value}_high"
    base = alt.Chart().encode(x="scale:Q", y=alt.Y(f"{value}:Q", title=title), color=colour)
    band = base.mark_area(opacity=0.15).encode(y=alt.Y(f"{low}:Q", title=title), y2=high)
    points = base.mark_point(filled=True, opacity=1, size=42 * size.marks**2)
    line = base.mark_line(strokeWidth=1.8 * size.marks).encode(strokeDash=dash)
    return [band, line, points.encode(shape=shape, tooltip=tooltip(value, low, high))]


def panel_size(size: Size, panels: int, left: float = 3.0) -> tuple[float, float]:
    """Width and height of each of so many panels; `left` is what an axis takes beside them, in letters' heights."""
    config, columns = theme(size), min(size.columns, max(panels, 1))
    around = 2 * config["padding"] + left * size.small + 1.5 * size.large + (columns - 1) * config["facet"]["spacing"]
    # Labels at both ends of an axis stick out of the panel by half.
    width = min((size.width - around) / columns - 1.2 * size.small, WIDEST)
    return width, size.aspect * width


def facets(
    layers: list[alt.Chart], rows: pl.DataFrame, title: str, subtitle: str, size: Size, *, height: Any = None, left: float = 3.0
) -> alt.FacetChart:
    """One panel each value of the column `panel`, in the order of the rows."""
    if rows.is_empty():
        raise InputError("there are no results to plot; run `saets grade` first")
    titles = rows["panel"].unique(maintain_order=True).to_list()
    across, up = panel_size(size, len(titles), left)
    panel = alt.LayerChart(layer=layers, data=alt.InlineData(values=rows.to_dicts()), width=across, height=height or up)
    header = alt.Header(labelLimit=across)
    chart = panel.facet(
        facet=alt.Facet("panel:N", sort=titles, title=None, header=header), columns=min(size.columns, len(titles))
    )
    # A shared x axis would hang below the empty places of an incomplete last row.
    return chart.resolve_axis(x="independent").properties(**heading(title, subtitle, size), config=theme(size, across))


def heading(title: str, subtitle: str, size: Size) -> dict[str, Any]:
    """The properties that say what a chart shows: above it where the size has titles, for screen readers always."""
    said = {"description": f"{title}. {subtitle}."}
    return {**said, "title": alt.TitleParams(title, subtitle=subtitle)} if size.titled else said


def top(values: pl.Series) -> float:
    """End of an axis from 0 for these scores: the next tenth, with a little room."""
    highest = values.max()
    return math.ceil(highest * 10 + 0.2) / 10 if isinstance(highest, float) else 1.0


def to(end: float) -> alt.Scale:
    """An axis from 0 to that end."""
    return alt.Scale(domain=[0, end], nice=False)
