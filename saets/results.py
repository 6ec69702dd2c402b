"""What the grades say: scores of texts, scales and methods, with bootstrap intervals (method, section 4).

A text counts only when both its criteria were graded; a text with a failed or missing grade is counted in `n_failed`, never
scored. The unsteered texts of a goal are the scale-0 point of each of its methods.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from saets.errors import InputError
from saets.records import CRITERIA, UNSTEERED

RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)
"""Bounds of every interval: 95%."""

MEASURES = (*CRITERIA, "product")
_CELL_SCHEMA = {"goal": pl.String, "method": pl.String, "prompt": pl.String, "scale": pl.Float64}
_CELL, _TEXT = tuple(_CELL_SCHEMA), (*_CELL_SCHEMA, "sample")
_TEXT_SCHEMA = pl.Schema({**_CELL_SCHEMA, "sample": pl.Int64})
_BOUNDS = tuple(f"{measure}_{bound}" for measure in MEASURES for bound in ("low", "high"))
_COUNTS = {"n": pl.Int64, "n_failed": pl.Int64}
_SCALE_SCHEMA = pl.Schema({**_CELL_SCHEMA, **dict.fromkeys((*MEASURES, *_BOUNDS), pl.Float64), **_COUNTS})
_SCORES = ("scale", "scale_even", "scale_odd", "held_out", "held_out_low", "held_out_high", "optimistic_max")
_SUMMARY_SCHEMA = pl.Schema({"goal": pl.String, "method": pl.String, **dict.fromkeys(_SCORES, pl.Float64), **_COUNTS})


def paired(generations: pl.DataFrame, grades: pl.DataFrame) -> pl.DataFrame:
    """One row a text, both criteria side by side: goal, method, prompt, scale, sample, behaviour, coherence, product, failed.

    `product` is behaviour * coherence of that one text. Where either criterion failed or is missing, all three are null and
    `failed` is true. Unsteered texts stand once, under their own method. Rows are sorted by their first five columns.

    Raises:
        InputError: no rows, missing columns, two judges' grades or two vectors' texts mixed, grades of other texts.
    """
    _check(generations, "generations", ("generation_id", *_TEXT, "vector_id"), "generate")
    _check(grades, "grades", ("generation_id", "criterion", "score"), "grade")
    _check_unique(generations, ("generation_id",), "generations holds the same id twice")
    _check_unique(generations, _TEXT, "generations holds two texts for one sample")
    _check_unique(grades, ("generation_id", "criterion"), "grades holds two grades of one text; give those of one judge")
    vectors = generations.filter(pl.col("method") != UNSTEERED).select("goal", "method", "vector_id").unique()
    _check_unique(vectors, ("goal", "method"), "generations mixes texts of two vectors; give those of one vector a method")
    if grades.join(generations, on="generation_id", how="semi").is_empty():
        raise InputError(f"none of the {len(grades)} grades is of these {len(generations)} texts; run `saets grade` on this run")
    texts = generations
    for criterion in CRITERIA:
        score = pl.col("score").cast(pl.Float64).fill_nan(None).alias(criterion)
        one = grades.filter(pl.col("criterion") == criterion).select("generation_id", score)
        texts = texts.drop(criterion, strict=False).join(one, on="generation_id", how="left")
    product = pl.col("behaviour") * pl.col("coherence")
    columns = zip(MEASURES, (*CRITERIA, product), strict=True)
    measures = [pl.when(product.is_not_null()).then(value).alias(name) for name, value in columns]
    return texts.cast(_TEXT_SCHEMA).select(*_TEXT, *measures, product.is_null().alias("failed")).sort(_TEXT)


def scale_table(texts: pl.DataFrame, *, seed: int = 0) -> pl.DataFrame:
    """One row a goal, method, prompt and scale of the texts of `paired`.

    behaviour, coherence: means over the `n` graded texts; product: mean(behaviour) * mean(coherence), the paper's score.
    `*_low`, `*_high`: 95% percentile bootstrap over those texts, both criteria of a text drawn together; null below two texts.
    `n_failed`: texts left out. With n = 0 everything else is null.

    Raises:
        InputError: no texts.
    """
    rows = []
    for key, cell in _by_method(texts).group_by(_CELL, maintain_order=True):
        graded = cell.filter(~pl.col("failed"))
        counts = {"n": len(graded), "n_failed": len(cell) - len(graded)}
        rows.append({**dict(zip(_CELL, key, strict=True)), **_measures(graded.select(CRITERIA).to_numpy(), seed), **counts})
    return pl.DataFrame(rows, schema=_SCALE_SCHEMA)


def results_table(texts: pl.DataFrame, *, seed: int = 0) -> pl.DataFrame:
    """The rows of `scale_table`, with the scale to use marked in each goal, method and prompt.

    `optimistic_max`: largest product over the scales, as the paper reports it; optimistic, because the same texts choose and
    score. `chosen`: true at that scale, at the lowest of equal ones; nowhere where no text was graded.
    """
    best = pl.col("product").max()
    chosen = pl.col("scale") == pl.col("scale").filter(pl.col("product") == best).min()
    rows = scale_table(texts, seed=seed).with_columns(
        chosen.over(_CELL[:3]).fill_null(value=False).alias("chosen"), best.over(_CELL[:3]).alias("optimistic_max")
    )
    return rows.select(*_CELL, "chosen", *MEASURES, *_BOUNDS, *_COUNTS, "optimistic_max")


def summary_table(texts: pl.DataFrame, *, seed: int = 0) -> pl.DataFrame:
    """One row a goal and method, its prompts pooled: goal, method, scale, scale_even, ..., held_out, optimistic_max, n, n_failed.

    The score of a scale is mean(behaviour) * mean(coherence) over its graded texts.

    - `scale`, `optimistic_max`: the scale with the largest score on all texts, the lowest of equal ones, and that score.
    - `scale_even`, `scale_odd`: the same on even and on odd sample numbers, of the scales graded in both halves.
    - `held_out`: mean of the odd samples' score at `scale_even` and the even samples' score at `scale_odd`.
    - `held_out_low`, `held_out_high`: 95% percentile bootstrap. Samples are drawn within each half, a sample with all its
      scales (they share their noise), and the scales are chosen anew in every resample.
    - `n`, `n_failed`: texts over all scales.

    With one half empty `held_out` and its scales are null; with one sample in a half, its interval; with no grades, all.

    Raises:
        InputError: no texts.
    """
    rows: list[dict[str, Any]] = []
    for (goal, method), group in _by_method(texts).group_by("goal", "method", maintain_order=True):
        graded = group.filter(~pl.col("failed"))
        counts = {"n": len(graded), "n_failed": len(group) - len(graded)}
        rows.append({"goal": goal, "method": method, **(_scores(graded, seed) if len(graded) else {}), **counts})
    return pl.DataFrame(rows, schema=_SUMMARY_SCHEMA)


def markdown_table(summary: pl.DataFrame, names: Mapping[str, str] | None = None) -> str:
    """Markdown table of a `summary_table`, goals by methods: held-out score [95% interval], the best of a goal in bold.

    Where there is no held-out score the cell gives the optimistic maximum and says so; a dash stands for no grades. `names`
    are the methods' display names, whose order the columns follow.
    """
    names = names or {}
    present = set(summary["method"])
    methods = [method for method in names if method in present] + sorted(present - set(names))
    lines = [_line(["goal", *(names.get(method, method) for method in methods)]), _line(["---"] * (1 + len(methods)))]
    for (goal,), group in summary.group_by("goal", maintain_order=True):
        best = group["held_out"].max()
        cells = {row["method"]: _score_cell(row, best) for row in group.iter_rows(named=True)}
        lines.append(_line([str(goal), *(cells.get(method, "–") for method in methods)]))
    return "\n".join(lines) + "\n"


def _check(frame: pl.DataFrame, what: str, columns: Sequence[str], command: str) -> None:
    if frame.is_empty():
        raise InputError(f"there are no {what}; run `saets {command}` first")
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise InputError(f"{what} has no column {', '.join(missing)}; got {', '.join(frame.columns)}")


def _check_unique(frame: pl.DataFrame, columns: Sequence[str], message: str) -> None:
    twice = frame.filter(frame.select(columns).is_duplicated())
    if not twice.is_empty():
        where = ", ".join(f"{name} {value!r}" for name, value in zip(columns, twice.select(columns).row(0), strict=True))
        raise InputError(f"{message}: {where}")


def _by_method(texts: pl.DataFrame) -> pl.DataFrame:
    """The texts with the unsteered ones copied to each method of their goal; a goal without methods keeps them as they are.

    A method's own text at scale 0 goes before the unsteered one of the same sample.
    """
    _check(texts, "texts", (*_TEXT, *MEASURES, "failed"), "generate")
    unsteered = pl.col("method") == UNSTEERED
    own = texts.filter(~unsteered)
    shared = texts.filter(unsteered).drop("method").join(own.select("goal", "method").unique(), on="goal", how="left")
    shared = shared.with_columns(pl.col("method").fill_null(UNSTEERED)).select(texts.columns).join(own, on=_TEXT, how="anti")
    return pl.concat([own, shared]).sort(_TEXT)


@functools.lru_cache(maxsize=4)
def _draws(n: int, seed: int, stream: int = 0) -> NDArray[np.float64]:
    """How often each of n texts is drawn in each resample, [RESAMPLES, n].

    The draws depend on n and the seeds alone, so an interval does not change when other goals or methods are added.
    """
    drawn = np.random.default_rng((seed, stream, n)).integers(n, size=(RESAMPLES, n))
    flat = drawn + n * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(flat.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(np.float64)
    counts.setflags(write=False)
    return counts


def _measures(scores: NDArray[np.float64], seed: int) -> dict[str, float]:
    """Means, product and bounds of the scores [texts, 2] of one scale; what cannot be given is left out."""
    n = len(scores)
    if not n:
        return {}
    means = scores.mean(axis=0)
    found = dict(zip(MEASURES, (*means.tolist(), float(means.prod())), strict=True))
    if n > 1:
        drawn = _draws(n, seed) @ scores / n
        bounds = np.percentile(np.column_stack([drawn, drawn.prod(axis=1)]), PERCENTILES, axis=0)
        found |= dict(zip(_BOUNDS, bounds.T.ravel().tolist(), strict=True))
    return found


class _Choice(NamedTuple):
    """Outcome of choosing on one half and scoring on the other, for each of R resamples."""

    score: NDArray[np.float64]
    """Mean of the two ways, [R]; NaN where no scale has texts in both halves."""
    even: NDArray[np.intp]
    """Column of the scale chosen on the even samples, [R]."""
    odd: NDArray[np.intp]


def _choose(even: NDArray[np.float64], odd: NDArray[np.float64]) -> _Choice:
    """Choose and score on the halves' products [R, scales]."""
    usable = ~np.isnan(even * odd)
    by_even, by_odd = (np.where(usable, half, -1.0).argmax(axis=1) for half in (even, odd))
    rows = np.arange(len(even))
    score = (odd[rows, by_even] + even[rows, by_odd]) / 2
    return _Choice(np.where(usable.any(axis=1), score, np.nan), by_even, by_odd)


def _products(weights: NDArray[np.float64], cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean(behaviour) * mean(coherence), [R, scales]; NaN where a scale has no text of positive weight.

    `weights` is [R, samples]; `cells` is [samples, scales, 3]: behaviour, coherence, 1, or zeros where there is no text.
    """
    behaviour, coherence, count = np.moveaxis(np.tensordot(weights, cells, axes=1), -1, 0)
    with np.errstate(invalid="ignore"):
        products: NDArray[np.float64] = behaviour * coherence / count**2
    return products


def _scores(graded: pl.DataFrame, seed: int) -> dict[str, float]:
    """The scores of `summary_table` for the graded texts of one goal and method; what cannot be given is left out."""
    sample = ("prompt", "sample")
    rows = graded.select(*sample).unique(maintain_order=True).with_row_index("row")
    scales, columns = np.unique(graded["scale"].to_numpy(), return_inverse=True)
    cells = np.zeros((len(rows), len(scales), 3))
    where = graded.join(rows, on=sample, how="left", maintain_order="left")["row"].to_numpy()
    cells[where, columns] = graded.select(*CRITERIA, pl.lit(1.0)).to_numpy()
    overall = _products(np.ones((1, len(rows))), cells)[0]
    found = {"scale": scales[overall.argmax()], "optimistic_max": overall.max()}
    is_even = (rows["sample"] % 2 == 0).to_numpy()
    halves = [cells[is_even], cells[~is_even]]
    choice = _choose(*(_products(np.ones((1, len(half))), half) for half in halves))
    if np.isnan(choice.score[0]):
        return found
    found |= {"held_out": choice.score[0], "scale_even": scales[choice.even[0]], "scale_odd": scales[choice.odd[0]]}
    if min(len(half) for half in halves) > 1:
        again = _choose(*(_products(_draws(len(half), seed, stream), half) for stream, half in enumerate(halves)))
        low, high = np.nanpercentile(again.score, PERCENTILES)
        found |= {"held_out_low": low, "held_out_high": high}
    return found


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"


def _score_cell(row: Mapping[str, Any], best: Any) -> str:
    if row["held_out"] is None:
        return "–" if row["optimistic_max"] is None else f"max {row['optimistic_max']:.3f}, not held out"
    interval = "" if row["held_out_low"] is None else f" [{row['held_out_low']:.3f}, {row['held_out_high']:.3f}]"
    text = f"{row['held_out']:.3f}{interval}"
    return f"**{text}**" if row["held_out"] == best else text
