"""Frames as runs have them, a chart of each kind from them, and what charts hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from saets import plots
from saets.scores.results import results_table
from saets.scores.summary import summary_table

ODD = 'odd </script><script>alert("1")</script> | & goal/with\\slashes'


def texts(goals: tuple[str, ...] = ("london", ODD), prompts: tuple[str, ...] = ("I think",), samples: int = 6) -> pl.DataFrame:
    """Texts of two methods at three scales and unsteered, with random scores."""
    rng = np.random.default_rng(0)
    cells = [("unsteered", 0.0), *((method, scale) for method in ("caa", "sae_ts") for scale in (40.0, 80.0, 120.0))]
    keys = ("goal", "prompt", "method", "scale", "sample")
    rows = [(goal, prompt, *cell, sample) for goal in goals for prompt in prompts for cell in cells for sample in range(samples)]
    scores = {name: rng.random(len(rows)) for name in ("behaviour", "coherence")}
    product = pl.col("behaviour") * pl.col("coherence")
    return pl.DataFrame(rows, schema=keys, orient="row").with_columns(**scores, failed=False).with_columns(product=product)


def failed(frame: pl.DataFrame) -> pl.DataFrame:
    """The same texts, none of them graded."""
    scores = pl.col("behaviour", "coherence", "product")
    return frame.with_columns(pl.when(False).then(scores).name.keep(), failed=True)


EFFECTS = pl.DataFrame(
    {"scale": [10.0 + i % 90 for i in range(6000)] + [200.0] * 500, "calibration": ["ok"] * 6000 + ["capped"] * 500}
)

LOSSES = pl.DataFrame(
    [
        {"goal": goal, "method": method, "scale": scale, "loss": 3.0 + (scale / length) ** 2, "target": 3.5}
        for goal in ("london", ODD)
        for method, length in (("caa", 80.0), ("sae_ts", 60.0))
        for scale in (0.0, 20.0, 40.0, 60.0)
    ]
)


def held_out(entries: int = 2000) -> pl.DataFrame:
    """Measured effects, and predictions that fall short of them."""
    measured = np.random.default_rng(1).standard_t(3, entries)
    return pl.DataFrame({"predicted": 0.5 * measured, "measured": measured})


def features(number: int = 1200) -> pl.DataFrame:
    """Features whose R2 grows with the logarithm of their density, from -0.2 to 0.7."""
    exponent = np.linspace(-4.0, -1.0, number)
    return pl.DataFrame({"density": 10**exponent, "r2": 1.0 + 0.3 * exponent})


CHARTS: dict[str, Callable[[pl.DataFrame, plots.Size], plots.Plot]] = {
    "product by scale": lambda frame, size: plots.product_by_scale(results_table(frame), size=size),
    "criteria by scale": lambda frame, size: plots.criteria_by_scale(results_table(frame), "sae_ts", size=size),
    "coherence and behaviour": lambda frame, size: plots.coherence_behaviour(results_table(frame), size=size),
    "score bars": lambda frame, size: plots.score_bars(summary_table(frame), size=size),
    "loss by scale": lambda _, size: plots.loss_by_scale(LOSSES, size=size),
    "calibration": lambda _, size: plots.calibration_histogram(EFFECTS, size=size),
    "predicted effects": lambda _, size: plots.predicted_effects(held_out(), size=size),
    "r2 by density": lambda _, size: plots.r2_by_density(features(), size=size),
}


def rows(chart: plots.Plot) -> list[dict[str, Any]]:
    """The data of a chart."""
    (data,) = chart.to_dict()["datasets"].values()
    return list(data)
