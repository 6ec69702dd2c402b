"""Which method steers best: held-out scores of goals and methods with intervals, and every pair of methods compared.

`saets.scores.statistics` has the formulas, `saets.scores.results` the texts and scales.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from saets.records import CRITERIA
from saets.scores import statistics
from saets.scores.results import COUNTS, by_method
from saets.scores.statistics import Half, HeldOut, Spread, one_by_one

ALL_GOALS = "all goals"
"""Stands for the mean over goals where a row belongs to no single one."""

Standing = Literal["winner", "tie", "behind"]
"""A method's place in a goal: significantly above every other one; not told apart from the best, or the best itself without being
told apart from all others; significantly below the best."""

_SCORES = ("scale", "scale_even", "scale_odd", "held_out", "held_out_low", "held_out_high", "optimistic_max")
_LAST = {"standing": pl.String, "seed": pl.Int64}
_SUMMARY_SCHEMA = pl.Schema({"goal": pl.String, "method": pl.String, **dict.fromkeys(_SCORES, pl.Float64), **COUNTS, **_LAST})
_DIFFERENCES = ("difference", "difference_low", "difference_high", "p", "p_adjusted")
_COMPARISON_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("goal", "method", "other"), pl.String),
        **dict.fromkeys(_DIFFERENCES, pl.Float64),
        "n": pl.Int64,
        "seed": pl.Int64,
    }
)


class Summary(NamedTuple):
    """Methods compared."""

    methods: pl.DataFrame
    """One row a goal and method; see `summary_table`."""
    overall: pl.DataFrame
    """The same columns, one row a method: means over the goals. Empty with one goal, or goals whose samples differ."""
    comparisons: pl.DataFrame
    """One row a goal and pair of methods; see `summarise`."""


def summary_table(texts: pl.DataFrame, *, seed: int = 0) -> pl.DataFrame:
    """One row a goal and method, its prompts pooled: goal, method, scale, scale_even, ..., held_out, ..., standing, seed.

    The score of a scale is mean(behaviour) * mean(coherence) over its graded texts.

    - `scale`, `optimistic_max`: the scale with the largest score on all texts, the lowest of equal ones, and that score.
    - `scale_even`, `scale_odd`: the same on even and on odd sample numbers, of the scales graded in both halves.
    - `held_out`: mean of the odd samples' score at `scale_even` and the even samples' score at `scale_odd`.
    - `held_out_low`, `held_out_high`: 95% percentile bootstrap. Samples are drawn within each half and prompt, a sample with all
      its scales (they share their noise), and the scales are chosen anew in every resample.
    - `n`, `n_failed`: texts over all scales.
    - `standing`: see `Standing`; null where there is nothing to compare with. `seed`: that of draws and flips.

    With one half empty `held_out` and its scales are null; with one sample in a half, its interval; with no grades, all.

    Raises:
        InputError: no texts.
    """
    return summarise(texts, seed=seed).methods


def summarise(texts: pl.DataFrame, *, seed: int = 0, spread: Spread = one_by_one) -> Summary:
    """The methods of each goal, and every pair of them compared.

    A row of `comparisons` is about the held-out score of `method` minus that of `other`: the `difference`; its 95% interval over
    the resamples, which both scores share; `p` of a paired test over the `n` samples, see `statistics.swapped_differences`; and
    `p_adjusted` by Holm's method over all goals and pairs (over all pairs, for the rows of `ALL_GOALS`). The methods differ where
    that is below `statistics.LEVEL`. Resamples and swaps of each goal are one item of `spread`.

    Raises:
        InputError: no texts.
    """
    groups = by_method(texts).group_by("goal", maintain_order=True)
    goals: list[_Goal] = spread(_scored_goal, [(str(goal), group, seed) for (goal,), group in groups])
    overall = _overall(goals)
    comparisons = [_comparisons(some, seed) for some in (goals, overall)]
    methods, means = (_methods(some, pairs, seed) for some, pairs in zip((goals, overall), comparisons, strict=True))
    return Summary(methods, means, pl.concat(comparisons))


class _Scored(NamedTuple):
    """A method of one goal, or over all goals."""

    method: str
    figures: dict[str, Any]
    """Columns of `summary_table`; what cannot be given is left out."""
    held_out: HeldOut | None


class _Goal(NamedTuple):
    """A goal and its methods, or the means over goals."""

    goal: str
    samples: pl.DataFrame
    """Prompt and sample number of each, in order."""
    methods: list[_Scored]
    by_chance: dict[tuple[str, str], NDArray[np.float64]]
    """Differences of each pair of methods where there is nothing but chance between them, [FLIPS]."""


def _scored_goal(goal: str, texts: pl.DataFrame, seed: int) -> _Goal:
    samples = texts.select("prompt", "sample").unique().sort("prompt", "sample")
    scales = texts["scale"].unique().sort().to_numpy()
    parts = {str(method): part for (method,), part in texts.group_by("method", maintain_order=True)}
    halves = {method: _halves(part, samples, scales) for method, part in parts.items()}
    by_chance = statistics.swapped_differences(list(halves.values()), seed=seed) if len(halves) > 1 else ()
    return _Goal(
        goal,
        samples,
        [_scored(method, part, halves[method], scales, seed) for method, part in parts.items()],
        dict(zip(itertools.combinations(parts, 2), by_chance, strict=True)),
    )


def _halves(texts: pl.DataFrame, samples: pl.DataFrame, scales: NDArray[np.float64]) -> tuple[Half, Half]:
    """The graded texts of even and of odd sample numbers."""
    graded = texts.filter(~pl.col("failed"))
    cells = np.zeros((len(samples), len(scales), 3))
    rows = graded.join(samples.with_row_index("row"), on=("prompt", "sample"), how="left", maintain_order="left")["row"]
    columns = np.searchsorted(scales, graded["scale"].to_numpy())
    cells[rows.to_numpy(), columns] = graded.select(*CRITERIA, pl.lit(1.0)).to_numpy()
    is_even, prompts = (samples["sample"] % 2 == 0).to_numpy(), samples["prompt"].rle_id().to_numpy()
    even, odd = (
        Half(cells[half], tuple(np.unique(prompts[half], return_counts=True)[1].tolist())) for half in (is_even, ~is_even)
    )
    return even, odd


def _scored(method: str, texts: pl.DataFrame, halves: tuple[Half, Half], scales: NDArray[np.float64], seed: int) -> _Scored:
    """The scores of one goal and method."""
    n_failed = int(texts["failed"].sum())
    figures: dict[str, Any] = {"n": len(texts) - n_failed, "n_failed": n_failed}
    if n_failed == len(texts):
        return _Scored(method, figures, None)
    cells = np.concatenate([half.cells for half in halves])
    product = statistics.products(np.ones((1, len(cells))), cells)[0]
    figures |= {"scale": scales[np.nanargmax(product)], "optimistic_max": np.nanmax(product)}
    held_out = statistics.held_out(*halves, seed=seed)
    if held_out is not None:
        figures |= {"scale_even": scales[held_out.even], "scale_odd": scales[held_out.odd], **_interval(held_out)}
    return _Scored(method, figures, held_out)


def _interval(held_out: HeldOut) -> dict[str, float]:
    figures = {"held_out": held_out.score}
    if held_out.resampled is not None:
        figures["held_out_low"], figures["held_out_high"] = statistics.interval(held_out.resampled)
    return figures


def _overall(goals: Sequence[_Goal]) -> list[_Goal]:
    """The methods' means over goals as one goal, of those with a held-out score in each; none where the samples differ."""
    if len(goals) < 2 or not all(goal.samples.equals(goals[0].samples) for goal in goals):
        return []
    by_method: dict[str, list[_Scored]] = {}
    for goal in goals:
        for scored in goal.methods:
            by_method.setdefault(scored.method, []).append(scored)
    everywhere = {
        method: found for method, found in by_method.items() if sum(s.held_out is not None for s in found) == len(goals)
    }
    if not everywhere:
        return []
    methods = [_mean(method, found) for method, found in everywhere.items()]
    by_chance = {
        pair: np.mean([goal.by_chance[pair] for goal in goals], axis=0) for pair in itertools.combinations(everywhere, 2)
    }
    return [_Goal(ALL_GOALS, goals[0].samples, methods, by_chance)]


def _mean(method: str, found: Sequence[_Scored]) -> _Scored:
    """One method's mean over goals; the resamples of all goals draw the same samples."""
    held_out = [scored.held_out for scored in found if scored.held_out]
    each = [one.resampled for one in held_out if one.resampled is not None]
    resampled = np.mean(each, axis=0) if len(each) == len(found) else None
    mean = HeldOut(float(np.mean([one.score for one in held_out])), -1, -1, resampled)
    figures = {name: sum(scored.figures[name] for scored in found) for name in COUNTS}
    best = float(np.mean([scored.figures["optimistic_max"] for scored in found]))
    return _Scored(method, {**figures, **_interval(mean), "optimistic_max": best}, mean)


def _comparisons(goals: Sequence[_Goal], seed: int) -> pl.DataFrame:
    """The rows of `Summary.comparisons`, corrected together."""
    rows = [
        {"goal": goal.goal, "method": one.method, "other": other.method, **_difference(goal, one, other), "seed": seed}
        for goal in goals
        for one, other in itertools.combinations(goal.methods, 2)
    ]
    adjusted = statistics.holm([row["p"] for row in rows])
    return pl.DataFrame(
        [{**row, "p_adjusted": p} for row, p in zip(rows, adjusted.tolist(), strict=True)], schema=_COMPARISON_SCHEMA
    ).with_columns(pl.col("p", "p_adjusted").fill_nan(None))


def _difference(goal: _Goal, one: _Scored, other: _Scored) -> dict[str, Any]:
    if one.held_out is None or other.held_out is None:
        return {"p": math.nan, "n": 0}
    difference = one.held_out.score - other.held_out.score
    by_chance = goal.by_chance[one.method, other.method]
    figures: dict[str, Any] = {"difference": difference, "n": len(goal.samples)}
    figures["p"] = float(statistics.p_values(np.array([difference]), by_chance[None])[0])
    if one.held_out.resampled is not None and other.held_out.resampled is not None:
        resampled = one.held_out.resampled - other.held_out.resampled
        figures["difference_low"], figures["difference_high"] = statistics.interval(resampled)
    return figures


def _methods(goals: Sequence[_Goal], comparisons: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The rows of `summary_table`."""
    differ = comparisons.filter(pl.col("p_adjusted") < statistics.LEVEL).select("goal", "method", "other").rows()
    apart = {(goal, frozenset(pair)) for goal, *pair in differ}
    rows = []
    for goal in goals:
        scores = {scored.method: scored.held_out.score for scored in goal.methods if scored.held_out}
        for scored in goal.methods:
            from_others = {other: (goal.goal, frozenset((scored.method, other))) in apart for other in scores}
            standing = _standing(scored.method, scores, from_others)
            rows.append({"goal": goal.goal, "method": scored.method, **scored.figures, "standing": standing, "seed": seed})
    return pl.DataFrame(rows, schema=_SUMMARY_SCHEMA)


def _standing(method: str, scores: Mapping[str, float], differs: Mapping[str, bool]) -> Standing | None:
    """Where a method stands; `differs` says from which of the others, by name, it is told apart."""
    if len(scores) < 2 or method not in scores:
        return None
    best = max(scores, key=scores.__getitem__)
    if method != best:
        return "behind" if differs[best] else "tie"
    return "winner" if all(differs[other] for other in scores if other != method) else "tie"
