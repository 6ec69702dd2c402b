"""Scores against scale."""

from __future__ import annotations

import polars as pl

from saets.errors import unknown
from saets.plots.looks import CRITERIA_LOOKS
from saets.plots.panels import Plot, facets, lines, named, panelled
from saets.plots.theme import SCREEN, Size


def product_by_scale(results: pl.DataFrame, *, size: Size = SCREEN) -> Plot:
    """behaviour × coherence against scale with 95% bands; one panel a goal (and prompt), one line a method.

    `results` is a `scale_table` or a `results_table`.
    """
    rows, looks = named(panelled(results))
    layers = lines(looks, "product", "behaviour × coherence", size)
    return facets(layers, rows, "Behaviour × coherence by scale", "Bands: 95% bootstrap intervals", size)


def criteria_by_scale(results: pl.DataFrame, goal: str, method: str, *, size: Size = SCREEN) -> Plot:
    """Behaviour, coherence and their product against scale with 95% bands, for one goal and method; one panel a prompt.

    Raises:
        InputError: `results` has no such goal, or not this method for it.
    """
    for column, value in (("goal", goal), ("method", method)):
        if value not in results[column]:
            raise unknown(column, value, results[column].unique())
        results = results.filter(pl.col(column) == value)
    (look,) = named(results)[1]
    rows = pl.concat(
        panelled(results).select(
            *("panel", "scale", "n", "n_failed"),
            pl.lit(series.name).alias("series"),
            *(pl.col(name + end).alias("value" + end) for end in ("", "_low", "_high")),
        )
        for name, series in CRITERIA_LOOKS.items()
    )
    layers = lines(list(CRITERIA_LOOKS.values()), "value", "mean score", size)
    return facets(layers, rows, f"{look.name}: scores by scale", "Bands: 95% bootstrap intervals", size)
