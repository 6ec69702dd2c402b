"""How far two judges agree on the same texts: rank correlation and weighted kappa, with intervals.

Both come from one table of counts, how often the first judge gave which of the ten scores and the second which. A local judge's
scores, which lie between, are rounded to the nearest of the ten.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from saets.records import CRITERIA
from saets.scores import statistics

LEVELS = 10
"""Scores of a judge: (s - 1) / 9 of an integer s from 1 to 10."""

_FIGURES = ("spearman", "spearman_low", "spearman_high", "kappa", "kappa_low", "kappa_high", "difference")
_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("goal", "criterion", "judge", "other"), pl.String),
        **dict.fromkeys(_FIGURES, pl.Float64),
        "n": pl.Int64,
        "seed": pl.Int64,
    }
)


def agreement_table(generations: pl.DataFrame, grades: pl.DataFrame, *, seed: int = 0) -> pl.DataFrame:
    """One row a goal, criterion and pair of judges, over the `n` texts that both graded; empty where one judge graded alone.

    `generations` needs generation_id, goal, prompt and sample, and `grades` generation_id, criterion, score and judge.
    `spearman`: rank correlation of the scores, ties in the middle; `kappa`: Cohen's kappa with squared weights; `difference`:
    mean score of `judge` minus that of `other`, 0..1. Bounds are 95% bootstrap intervals that draw sample numbers within prompts,
    as those of scores do. A figure is null where a judge gave all texts one score.
    """
    texts = grades.drop_nulls("score").join(
        generations.select("generation_id", "goal", "prompt", "sample"), on="generation_id", how="inner"
    )
    rows = []
    for (goal, criterion), group in texts.sort("goal", "criterion").group_by("goal", "criterion", maintain_order=True):
        by_judge = {str(judge): part for (judge,), part in group.sort("judge").group_by("judge", maintain_order=True)}
        for one, other in itertools.combinations(by_judge, 2):
            both = by_judge[one].join(by_judge[other].select("generation_id", "score"), on="generation_id", suffix="_other")
            if len(both):
                found = _figures(both.sort("prompt", "sample"), seed)
                rows.append({"goal": goal, "criterion": criterion, "judge": one, "other": other, **found, "seed": seed})
    order = pl.col("criterion").cast(pl.Enum(CRITERIA))
    return pl.DataFrame(rows, schema=_SCHEMA).sort("goal", order, "judge", "other")


def spearman(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation, [...], of tables of counts [..., levels, levels]; NaN where one side has one score only."""
    first, second = tables.sum(axis=-1), tables.sum(axis=-2)
    rows, columns = _middle_ranks(first), _middle_ranks(second)
    total = tables.sum(axis=(-2, -1))
    centre = (total / 2)[..., None]
    rows, columns = rows - centre, columns - centre
    covariance = np.einsum("...ij,...i,...j->...", tables, rows, columns)
    variances = (first * rows**2).sum(axis=-1) * (second * columns**2).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = np.where(variances > 0, covariance / np.sqrt(variances), np.nan)
    return found


def weighted_kappa(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kappa with squared weights, [...]: 1 - (mean squared distance of the scores) / (that of scores paired at random).

    NaN where both judges gave one and the same score to all.
    """
    apart = np.square(np.subtract.outer(np.arange(LEVELS), np.arange(LEVELS)))
    by_chance = np.einsum("...i,...j->...ij", tables.sum(axis=-1), tables.sum(axis=-2))
    observed, expected = ((counts * apart).sum(axis=(-2, -1)) for counts in (tables, by_chance))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = 1 - observed * tables.sum(axis=(-2, -1)) / expected
    return np.where(expected > 0, found, np.nan)


def _middle_ranks(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each level from 0, in the middle of the texts that share it, [..., levels]."""
    return np.cumsum(counts, axis=-1) - counts / 2


def _figures(both: pl.DataFrame, seed: int) -> dict[str, Any]:
    """The columns of one row; `both` is sorted by prompt and sample."""
    levels = [np.rint(both[name].to_numpy() * (LEVELS - 1)).astype(int).clip(0, LEVELS - 1) for name in ("score", "score_other")]
    samples = both.select("prompt", "sample").unique(maintain_order=True)
    which = both.join(samples.with_row_index("row"), on=("prompt", "sample"), how="left", maintain_order="left")["row"].to_numpy()
    tables = np.zeros((len(samples), LEVELS, LEVELS))
    np.add.at(tables, (which, *levels), 1)
    strata = tuple(samples.group_by("prompt", maintain_order=True).len()["len"].to_list())
    resampled = np.tensordot(statistics.draws(strata, seed), tables, axes=1) if len(samples) > 1 else None
    found: dict[str, Any] = {"n": len(both), "difference": float((both["score"] - both["score_other"]).to_numpy().mean())}
    for name, figure in (("spearman", spearman), ("kappa", weighted_kappa)):
        value = float(figure(tables.sum(axis=0)))
        if np.isnan(value):
            continue
        found[name] = value
        if resampled is not None:
            found[f"{name}_low"], found[f"{name}_high"] = statistics.interval(figure(resampled))
    return found
