"""How strongly each vector was calibrated to steer."""

from __future__ import annotations

import altair as alt
import numpy as np
import polars as pl

from saets.errors import InputError
from saets.plots.looks import OUTCOMES
from saets.plots.panels import Plot, heading, panel_size
from saets.plots.theme import SCREEN, Size, theme

BINS = 30


def calibration_histogram(effects: pl.DataFrame, *, size: Size = SCREEN) -> Plot:
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
    said = heading("Calibrated scales", f"{len(effects):,} vectors, by outcome of the calibration", size)
    width, height = panel_size(size, 1)
    chart = alt.Chart(alt.InlineData(values=rows), width=width, height=height, config=theme(size, width), **said)
    return chart.mark_bar(stroke="white", strokeWidth=0.5).encode(
        x=alt.X("low:Q", bin="binned", title="scale", scale=alt.Scale(domain=[0.0, float(edges[-1])], nice=False)),
        x2="high",
        y=alt.Y("vectors:Q", stack=True),
        color=alt.Color("outcome:N", title=None, scale=alt.Scale(domain=[*colours], range=[*colours.values()])),
        tooltip=["outcome:N", "low:Q", "high:Q", "vectors:Q"],
    )
