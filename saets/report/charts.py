"""The report's charts as Vega-Lite specifications with all their rows; the page shows those of the goal and method chosen."""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from saets import plots
from saets.plots.panels import panelled
from saets.plots.theme import SCREEN
from saets.report.findings import Findings

SIZE = SCREEN._replace(name="report", width=1020, titled=False)
"""Headings are the page's own."""

Charts = dict[str, dict[str, Any]]


def charts(findings: Findings) -> Charts:
    """Specifications by name: `product`, `plane`, `criteria-METHOD` of each method, and `calibration` where there are effects.

    Those of scores are left out where no text was graded.
    """
    table = findings.results
    drawn: dict[str, plots.Plot] = {}
    if table["n"].sum():
        drawn |= {
            "product": plots.product_by_scale(table, size=SIZE),
            "plane": plots.coherence_behaviour(table, size=SIZE),
        }
        for method in table["method"].unique(maintain_order=True):
            drawn[f"criteria-{method}"] = plots.criteria_by_scale(table, method, size=SIZE)
    if findings.effects is not None and len(findings.effects):
        drawn["calibration"] = plots.calibration_histogram(findings.effects, size=SIZE)
    return {name: _finite(chart.to_dict(validate=False)) for name, chart in drawn.items()}


def panels(results: pl.DataFrame) -> dict[str, str]:
    """The goal of each panel, by the panel's title."""
    return dict(panelled(results).select("panel", "goal").unique().iter_rows())


def _finite(value: Any) -> Any:
    """The same specification with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
