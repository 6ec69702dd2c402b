"""Pictures of the results: Altair charts from the frames of `saets.scores.results`, and their files.

A method looks the same in every chart, and colour is never alone: marker shape and dash, or a label, tell methods apart in grey.
"""

from __future__ import annotations

import io
import json
import math
import re
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import polars as pl

from saets.errors import InputError, unknown
from saets.files.storage import Location, Where, locate
from saets.records import UNSTEERED, content_id
from saets.scores.results import MEASURES

Plot = alt.Chart | alt.FacetChart


class Look(NamedTuple):
    """How one series is drawn."""

    name: str
    colour: str
    shape: str
    """Vega symbol or SVG path."""
    dash: tuple[int, int]
    """Pixels drawn and left out."""


SOLID, DASHED, DOTTED = (1, 0), (6, 3), (2, 2)
BLACK, GREY = "#000000", "#777777"

METHODS = {
    "caa": Look("CAA", "#332288", "square", DASHED),
    "sae": Look("SAE", "#E69F00", "triangle-up", DOTTED),
    "sae_ts": Look("SAE-TS", "#CC3311", "circle", SOLID),
    "pinverse": Look("Pseudoinverse", "#0077BB", "diamond", DASHED),
    "pinverse_raw": Look("Pseudoinverse, raw", "#A6CEE3", "M0,-1L1,0L0,0.3L-1,0Z", DOTTED),
    "rotation": Look("Rotation", "#EE6677", "cross", SOLID),
    "fgaa": Look("FGAA", "#DDCC77", "triangle-down", DASHED),
    "ridge": Look("Ridge", "#AA3377", "triangle-left", DOTTED),
    "constrained": Look("Constrained", "#661100", "triangle-right", SOLID),
    UNSTEERED: Look("Unsteered", BLACK, "M-1,-0.3L1,-0.3L1,0.3L-1,0.3Z", SOLID),
}
"""Every method's look, in the order of legends. Any two colours differ by at least 23 (CIE 1976), for full sight and as
simulated for protanopia, deuteranopia and tritanopia."""

CRITERIA_LOOKS = {
    "behaviour": Look("behaviour", "#0077BB", "square", DASHED),
    "coherence": Look("coherence", "#E69F00", "triangle-up", DOTTED),
    "product": Look("behaviour × coherence", BLACK, "circle", SOLID),
}
OUTCOMES = {"ok": "#0077BB", "capped": "#E69F00", "fixed": GREY}
"""Colours of the calibration's outcomes."""

THEME: dict[str, Any] = {
    "background": "white",
    "padding": 12,
    "font": "Arial, Helvetica, sans-serif",
    "view": {"stroke": None},
    "axis": {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "gridColor": "#e6e6e6", "tickCount": 5},
    "axisX": {"labelFlush": False},
    "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
    # A series' dash would otherwise fray the edge of its symbol.
    "legend": {"labelFontSize": 12, "symbolSize": 90, "symbolOpacity": 1, "symbolStrokeWidth": 0, "labelLimit": 300},
    "header": {"labelFontSize": 13, "labelFontWeight": "bold", "labelLimit": 260},
    "title": {"fontSize": 15, "anchor": "start", "subtitleFontSize": 12, "subtitleColor": "#444444", "offset": 14},
    "facet": {"spacing": 24},
}
WIDTH, HEIGHT, COLUMNS = 260, 190, 3
"""Size of a panel in pixels, and panels a row."""

BINS = 30
ARROW_ROOM = 14
"""Pixels below which a segment gets no arrowhead."""


def display_names() -> dict[str, str]:
    """Names of the methods for people, by id, in the order of legends and tables."""
    return {method: look.name for method, look in METHODS.items()}


def product_by_scale(results: pl.DataFrame) -> Plot:
    """behaviour × coherence against scale with 95% bands; one panel a goal (and prompt), one line a method.

    `results` is a `scale_table` or a `results_table`.
    """
    rows, looks = _named(_panelled(results))
    lines = _lines(looks, "product", "behaviour × coherence")
    return _facets(lines, rows, "Behaviour × coherence by scale", "Bands: 95% bootstrap intervals")


def criteria_by_scale(results: pl.DataFrame, goal: str, method: str) -> Plot:
    """Behaviour, coherence and their product against scale with 95% bands, for one goal and method; one panel a prompt.

    Raises:
        InputError: `results` has no such goal, or not this method for it.
    """
    for column, value in (("goal", goal), ("method", method)):
        if value not in results[column]:
            raise unknown(column, value, results[column].unique())
        results = results.filter(pl.col(column) == value)
    (look,) = _named(results)[1]
    rows = pl.concat(
        _panelled(results).select(
            *("panel", "scale", "n", "n_failed"),
            pl.lit(series.name).alias("series"),
            *(pl.col(name + end).alias("value" + end) for end in ("", "_low", "_high")),
        )
        for name, series in CRITERIA_LOOKS.items()
    )
    lines = _lines(list(CRITERIA_LOOKS.values()), "value", "mean score")
    return _facets(lines, rows, f"{look.name}: scores by scale", "Bands: 95% bootstrap intervals")


def coherence_behaviour(results: pl.DataFrame) -> Plot:
    """Mean coherence (x) against mean behaviour (y), joined in order of scale; one panel a goal (and prompt).

    Arrowheads point to the larger scale; a ring marks the unsteered texts, where all lines of a panel start.
    """
    tops = {name: _top(results[name]) for name in ("coherence", "behaviour")}
    rows, looks = _named(_panelled(results))
    rows = _with_arrows(rows, tops)
    colour, shape, dash = _encodings(looks)
    x, y = alt.X("coherence:Q", scale=_to(tops["coherence"])), alt.Y("behaviour:Q", scale=_to(tops["behaviour"]))
    base = alt.Chart().encode(x=x, y=y, color=colour)
    line = base.mark_line(strokeWidth=1.5).encode(order="scale:Q", strokeDash=dash)
    points = base.mark_point(filled=True, opacity=1, size=32).encode(shape=shape, tooltip=_tooltip(*MEASURES))
    heads = base.mark_point(filled=True, opacity=1, size=300, shape="wedge").encode(
        x=alt.X("middle_coherence:Q", title="coherence"),
        y=alt.Y("middle_behaviour:Q", title="behaviour"),
        angle=alt.Angle("angle:Q", scale=None),
    )
    ring = base.mark_point(size=130, strokeWidth=1.5).encode(color=alt.value(BLACK)).transform_filter("datum.scale === 0")
    subtitle = "Joined in order of scale, arrows towards the larger scale; ring: unsteered"
    return _facets([line, heads, points, ring], rows, "Coherence and behaviour", subtitle)


def score_bars(summary: pl.DataFrame) -> Plot:
    """Held-out score of each goal and method with its 95% interval, and the optimistic maximum over scales as a tick.

    `summary` is a `summary_table`; without a held-out score only the tick is drawn.
    """
    end = pl.max_horizontal("held_out", "held_out_high", "optimistic_max")
    label = pl.col("held_out").map_elements("{:.2f}".format, return_dtype=pl.String).fill_null("")
    rows, looks = _named(summary.with_columns(pl.col("goal").alias("panel"), end.alias("end"), label.alias("label")))
    base = alt.Chart().encode(y=alt.Y("series:N", sort=[look.name for look in looks], title=None))
    x = alt.X("held_out:Q", title="behaviour × coherence", scale=_to(_top(rows["end"]) * 1.15))
    tooltip = _tooltip("held_out", "held_out_low", "held_out_high", "optimistic_max")
    bars = base.mark_bar(height={"band": 0.7}).encode(x=x, color=_encodings(looks)[0].legend(None), tooltip=tooltip)
    interval = base.mark_rule(strokeWidth=1.5, color=BLACK).encode(x="held_out_low:Q", x2="held_out_high:Q")
    halo = interval.mark_rule(strokeWidth=4.5, color="white", opacity=0.8)
    best = base.mark_tick(thickness=2, color=GREY).encode(x="optimistic_max:Q")
    text = base.mark_text(align="left", dx=6, fontSize=11).encode(x="end:Q", text="label:N")
    subtitle = "Bar and line: scale chosen on one half, scored on the other, 95% interval. Grey tick: best scale, optimistic"
    return _facets([bars, halo, interval, best, text], rows, "Score by goal and method", subtitle, height=alt.Step(24))


def calibration_histogram(effects: pl.DataFrame) -> Plot:
    """How many vectors were calibrated to which scale, coloured by outcome; `effects` has the columns scale and calibration.

    Raises:
        InputError: no effects.
    """
    if effects.is_empty():
        raise InputError("there are no effects to plot; run `saets effects` first")
    scales = effects["scale"].to_numpy()
    edges = np.histogram_bin_edges(scales, bins=BINS, range=(0.0, scales.max()))
    rows, colours = [], {}
    for outcome, colour in OUTCOMES.items():
        counts = np.histogram(effects.filter(pl.col("calibration") == outcome)["scale"].to_numpy(), edges)[0]
        if counts.any():
            name = f"{outcome} ({counts.sum():,})"
            colours[name] = colour
            bins = zip(edges.tolist(), edges[1:].tolist(), counts.tolist(), strict=False)
            rows += [{"low": low, "high": high, "vectors": count, "outcome": name} for low, high, count in bins if count]
    title = alt.TitleParams("Calibrated scales", subtitle=f"{len(effects):,} vectors, by outcome of the calibration")
    chart = alt.Chart(alt.InlineData(values=rows), title=title, width=2 * WIDTH, height=1.3 * HEIGHT, config=THEME)
    return chart.mark_bar(stroke="white", strokeWidth=0.5).encode(
        x=alt.X("low:Q", bin="binned", title="scale"),
        x2="high",
        y=alt.Y("vectors:Q", stack=True),
        color=alt.Color("outcome:N", title=None, scale=alt.Scale(domain=[*colours], range=[*colours.values()])),
        tooltip=["outcome:N", "low:Q", "high:Q", "vectors:Q"],
    )


def file_name(name: str) -> str:
    """The name with only letters, digits, `.`, `_` and `-`; a name that had to be changed ends in a hash of the original."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80]
    return safe if safe == name != "" else f"{safe or 'plot'}-{content_id(name)[:8]}"


def save(chart: Plot, folder: Where, name: str) -> list[Location]:
    """Write the chart as HTML that needs no network, SVG and PNG (two pixels a point), each whole or not at all.

    `folder` is a local path or a URI. Returns the three files, called `file_name(name)`.

    Raises:
        InputError: the folder cannot be written.
    """
    svg, png = io.StringIO(), io.BytesIO()
    chart.save(svg, format="svg")
    chart.save(png, format="png", scale_factor=2)
    actions = {"export": True, "source": False, "compiled": False, "editor": False}
    html = chart.to_html(inline=True, embed_options={"actions": actions}, json_kwds={"cls": _ScriptSafe})
    files = []
    for kind, content in {"html": html.encode(), "svg": svg.getvalue().encode(), "png": png.getvalue()}.items():
        file = locate(folder) / f"{file_name(name)}.{kind}"
        file.write_bytes(content)
        files.append(file)
    return files


class _ScriptSafe(json.JSONEncoder):
    """JSON inside a script element: a goal's name must not be able to end it."""

    def encode(self, o: Any) -> str:
        return super().encode(o).replace("<", r"\u003c")


def _named(rows: pl.DataFrame) -> tuple[pl.DataFrame, list[Look]]:
    """The rows with the methods' display names as `series`, and the looks of those methods in the order of `METHODS`."""
    for method in rows["method"].unique():
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    names = pl.col("method").replace_strict(display_names(), return_dtype=pl.String)
    return rows.with_columns(names.alias("series")), [look for method, look in METHODS.items() if method in rows["method"]]


def _panelled(results: pl.DataFrame) -> pl.DataFrame:
    """The rows with the title of their panel: the goal, and the prompt where there are several."""
    if results["prompt"].n_unique() <= 1:
        return results.with_columns(pl.col("goal").alias("panel"))
    prompt = pl.when(pl.col("prompt") == "").then(pl.lit("no prompt")).otherwise(pl.format("“{}”", "prompt"))
    return results.with_columns(pl.format("{}, {}", "goal", prompt).alias("panel"))


def _encodings(looks: list[Look]) -> tuple[alt.Color, alt.Shape, alt.StrokeDash]:
    """Colour, shape and dash of the column `series`; one legend shows colour and shape."""
    names, legend = [look.name for look in looks], alt.Legend(title=None, orient="top", columns=5)
    colours, shapes, dashes = [look.colour for look in looks], [look.shape for look in looks], [look.dash for look in looks]
    return (
        alt.Color("series:N", scale=alt.Scale(domain=names, range=colours), legend=legend),
        alt.Shape("series:N", scale=alt.Scale(domain=names, range=shapes), legend=legend),
        alt.StrokeDash("series:N", scale=alt.Scale(domain=names, range=dashes), legend=None),
    )


def _tooltip(*scores: str) -> list[alt.Tooltip]:
    score = [alt.Tooltip(f"{name}:Q", format=".3f") for name in scores]
    return [alt.Tooltip("series:N", title=" "), alt.Tooltip("scale:Q"), *score, alt.Tooltip("n:Q"), alt.Tooltip("n_failed:Q")]


def _lines(looks: list[Look], value: str, title: str) -> list[alt.Chart]:
    """Bands, lines and points of the column `value` against scale."""
    colour, shape, dash = _encodings(looks)
    low, high = f"{value}_low", f"{value}_high"
    base = alt.Chart().encode(x="scale:Q", y=alt.Y(f"{value}:Q", title=title), color=colour)
    band = base.mark_area(opacity=0.15).encode(y=alt.Y(f"{low}:Q", title=title), y2=high)
    points = base.mark_point(filled=True, opacity=1, size=42).encode(shape=shape, tooltip=_tooltip(value, low, high))
    return [band, base.mark_line(strokeWidth=1.8).encode(strokeDash=dash), points]


def _facets(layers: list[alt.Chart], rows: pl.DataFrame, title: str, subtitle: str, height: Any = HEIGHT) -> alt.FacetChart:
    """One panel each value of the column `panel`, in the order of the rows."""
    if rows.is_empty():
        raise InputError("there are no results to plot; run `saets grade` first")
    titles = rows["panel"].unique(maintain_order=True).to_list()
    panel = alt.LayerChart(layer=layers, data=alt.InlineData(values=rows.to_dicts()), width=WIDTH, height=height)
    chart = panel.facet(facet=alt.Facet("panel:N", sort=titles, title=None), columns=min(COLUMNS, len(titles)))
    # A shared x axis would hang below the empty places of an incomplete last row.
    return chart.resolve_axis(x="independent").properties(title=alt.TitleParams(title, subtitle=subtitle), config=THEME)


def _top(values: pl.Series) -> float:
    """End of an axis from 0 for these scores: the next tenth, with a little room."""
    highest = values.max()
    return math.ceil(highest * 10 + 0.2) / 10 if isinstance(highest, float) else 1.0


def _to(top: float) -> alt.Scale:
    return alt.Scale(domain=[0, top], nice=False)


def _with_arrows(rows: pl.DataFrame, tops: dict[str, float]) -> pl.DataFrame:
    """The rows with the middle of the way to the next larger scale, and its angle in degrees clockwise from up."""
    steps = {name: pl.col(name).shift(-1).over("panel", "method", order_by="scale") - pl.col(name) for name in tops}
    across, up = steps["coherence"] * WIDTH / tops["coherence"], steps["behaviour"] * HEIGHT / tops["behaviour"]
    shown = (across**2 + up**2).sqrt() >= ARROW_ROOM
    middles = [pl.when(shown).then(pl.col(name) + step / 2).alias(f"middle_{name}") for name, step in steps.items()]
    return rows.with_columns(pl.arctan2(across, up).degrees().alias("angle"), *middles)
