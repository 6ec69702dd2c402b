"""What pairwise battles say: strengths of methods with intervals, and how much the order of showing decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from saets.scores import statistics
from saets.scores.bradley_terry import fit_strengths
from saets.scores.statistics import Spread, one_by_one
from saets.scores.summary import ALL_GOALS

WINNERS = ("first", "second", "tie")
"""Which text a judge preferred, by the order in which they were shown."""

_KEYS = {"goal": pl.String, "criterion": pl.String}
_STRENGTHS = pl.Schema(
    {
        **_KEYS,
        "method": pl.String,
        **dict.fromkeys(("strength", "strength_low", "strength_high", "won", "tied", "lost"), pl.Float64),
        "n": pl.Int64,
        "judge": pl.String,
        "seed": pl.Int64,
    }
)
_ORDER = pl.Schema(
    {
        **_KEYS,
        **dict.fromkeys(("first", "first_low", "first_high", "consistent"), pl.Float64),
        "n": pl.Int64,
        "n_failed": pl.Int64,
        "judge": pl.String,
        "seed": pl.Int64,
    }
)


class BattleTables(NamedTuple):
    """What battles say, one row a goal and criterion and one for all goals together where there are several."""

    strengths: pl.DataFrame
    """And one a method: `strength` by `fit_strengths`, its 95% interval, and shares of its `n` battles: `won`, `tied`, `lost`."""
    order: pl.DataFrame
    """`first`: of the battles that were decided, the share that the text shown first won, 0.5 without bias, and its 95% interval;
    `consistent`: of pairs of texts shown in both orders, the share with the same verdict; `n` battles, without the `n_failed`."""


def battle_tables(battles: pl.DataFrame, *, seed: int = 0, spread: Spread = one_by_one) -> BattleTables:
    """Tables of battles with the columns goal, criterion, prompt, sample, first, second, winner (one of `WINNERS`, null where it
    failed) and judge. Intervals draw sample numbers within prompts, as those of scores do, each with all its battles.
    Each goal and criterion is one item of `spread`.
    """
    groups = [(str(goal), group) for (goal,), group in battles.sort("goal").group_by("goal", maintain_order=True)]
    if len(groups) > 1:
        groups.append((ALL_GOALS, battles))
    parts = [
        (goal, str(criterion), group, seed)
        for goal, of_goal in groups
        for (criterion,), group in of_goal.sort("criterion").group_by("criterion", maintain_order=True)
    ]
    found: list[_Rows] = spread(_rows, parts)
    strengths = [row for rows in found for row in rows.strengths]
    return BattleTables(pl.DataFrame(strengths, schema=_STRENGTHS), pl.DataFrame([rows.order for rows in found], schema=_ORDER))


class _Rows(NamedTuple):
    strengths: list[dict[str, Any]]
    order: dict[str, Any]


def _rows(goal: str, criterion: str, battles: pl.DataFrame, seed: int) -> _Rows:
    """The rows of both tables about one goal and criterion."""
    place = {"goal": goal, "criterion": criterion, "judge": battles["judge"][0], "seed": seed}
    strengths = [{**place, **row} for row in _strengths(battles, seed)]
    return _Rows(strengths, {**place, **_order(battles, seed)})


def _strengths(battles: pl.DataFrame, seed: int) -> list[dict[str, Any]]:
    """Rows by strength, the strongest first; none where no battle was decided or tied."""
    fought = battles.drop_nulls("winner")
    methods = sorted({*battles["first"], *battles["second"]})
    if fought.is_empty():
        return []
    places = [
        fought[name].replace_strict(methods, list(range(len(methods))), return_dtype=pl.Int64) for name in ("first", "second")
    ]
    outcome = fought["winner"].replace_strict(WINNERS, (0, 1, 2), return_dtype=pl.Int64)
    counts, resampled = _counted(fought, [*places, outcome], (len(methods), len(methods), 3), seed)
    found = fit_strengths(counts).strengths
    drawn = fit_strengths(resampled).strengths if resampled is not None else None
    rows = []
    for which, method in enumerate(methods):
        as_first, as_second = counts[which].sum(axis=0), counts[:, which].sum(axis=0)
        won, lost, tied = as_first[0] + as_second[1], as_first[1] + as_second[0], as_first[2] + as_second[2]
        n = won + lost + tied
        shares = {"won": won / n, "tied": tied / n, "lost": lost / n} if n else {}
        row = {"method": method, "strength": found[which], "n": int(n), **shares}
        if drawn is not None:
            row["strength_low"], row["strength_high"] = statistics.interval(drawn[:, which])
        rows.append(row)
    return sorted(rows, key=lambda row: -row["strength"])


def _order(battles: pl.DataFrame, seed: int) -> dict[str, Any]:
    fought = battles.drop_nulls("winner")
    row: dict[str, Any] = {"n": len(fought), "n_failed": len(battles) - len(fought)}
    decided = fought.filter(pl.col("winner") != "tie")
    if len(decided):
        won = (decided["winner"] == "first").cast(pl.Int64)
        counts, resampled = _counted(decided, [won], (2,), seed)
        row["first"] = counts[1] / counts.sum()
        if resampled is not None:
            row["first_low"], row["first_high"] = statistics.interval(resampled[:, 1] / resampled.sum(axis=1))
    place = ("goal", "prompt", "sample", "first", "second")
    other = fought.select(
        *place[:3],
        pl.col("second").alias("first"),
        pl.col("first").alias("second"),
        pl.col("winner").replace({"first": "second", "second": "first"}),
    )
    both = fought.join(other, on=place, suffix="_swapped")
    if len(both):
        row["consistent"] = float((both["winner"] == both["winner_swapped"]).to_numpy().mean())
    return row


def _counted(
    battles: pl.DataFrame, columns: Sequence[pl.Series], shape: tuple[int, ...], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """How often each combination of the columns' values comes, `shape`, and the same in every resample of the samples."""
    samples = battles.select("prompt", "sample").unique().sort("prompt", "sample")
    rows = battles.join(samples.with_row_index("row"), on=("prompt", "sample"), how="left", maintain_order="left")["row"]
    counts = np.zeros((len(samples), *shape))
    np.add.at(counts, (rows.to_numpy(), *(column.to_numpy() for column in columns)), 1)
    strata = tuple(samples.group_by("prompt", maintain_order=True).len()["len"].to_list())
    resampled = np.tensordot(statistics.draws(strata, seed), counts, axes=1) if len(samples) > 1 else None
    return counts.sum(axis=0), resampled
