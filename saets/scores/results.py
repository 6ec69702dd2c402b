"""What the grades say: scores of texts, scales and methods, with bootstrap intervals (method, section 4).

A text counts only when both its criteria were graded; a text with a failed or missing grade is counted in `n_failed`, never
scored. The unsteered texts of a goal are the scale-0 point of each of its methods. `saets.scores.statistics` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from saets.errors import InputError
from saets.records import CRITERIA, UNSTEERED
from saets.scores import statistics

MEASURES = (*CRITERIA, "product")
FIGURES = ("perplexity", "distinct_1", "distinct_2", "repetition", "n_tokens", "n_words")
"""Columns of `measure_table`."""

_CELL_SCHEMA = {"goal": pl.String, "method": pl.String, "prompt": pl.String, "scale": pl.Float64}
_CELL, _TEXT = tuple(_CELL_SCHEMA), (*_CELL_SCHEMA, "sample")
_TEXT_SCHEMA = pl.Schema({**_CELL_SCHEMA, "sample": pl.Int64})
_BOUNDS = tuple(f"{measure}_{bound}" for measure in MEASURES for bound in ("low", "high"))
COUNTS = {"n": pl.Int64, "n_failed": pl.Int64}
"""Columns of how many texts were graded, and how many were not."""
_SCALE_SCHEMA = pl.Schema({**_CELL_SCHEMA, **dict.fromkeys((*MEASURES, *_BOUNDS), pl.Float64), **COUNTS})


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
    for key, cell in by_method(texts).group_by(_CELL, maintain_order=True):
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
    return rows.select(*_CELL, "chosen", *MEASURES, *_BOUNDS, *COUNTS, "optimistic_max")


def measure_table(generations: pl.DataFrame, measures: pl.DataFrame | None, keys: Sequence[str] = _CELL) -> pl.DataFrame:
    """Means of the figures that need no judge by goal, method, prompt and scale, or by other `keys`; no rows without measures.

    Unsteered texts are those of each method at scale 0, as in `scale_table`. `perplexity` is exp(mean loss), which one text in
    ruins does not decide; the others are plain means over the texts that have them.
    """
    columns = {name: pl.Float64 for name in FIGURES}
    if measures is None:
        return pl.DataFrame(schema={**{key: generations.schema[key] for key in keys}, **columns})
    texts = generations.select("generation_id", *_TEXT).join(measures, on="generation_id", how="inner").drop("generation_id")
    means = [pl.col(name).mean() for name in FIGURES[1:]]
    perplexity = pl.col("loss").mean().exp().alias("perplexity")
    found = _unsteered_shared(texts).group_by(keys, maintain_order=True).agg(perplexity, *means)
    return found.with_columns(pl.col(name).cast(kind) for name, kind in columns.items())


def by_method(texts: pl.DataFrame) -> pl.DataFrame:
    """The texts with the unsteered ones copied to each method of their goal; a goal without methods keeps them as they are.

    A method's own text at scale 0 goes before the unsteered one of the same sample.

    Raises:
        InputError: no texts.
    """
    _check(texts, "texts", (*_TEXT, *MEASURES, "failed"), "generate")
    return _unsteered_shared(texts)


def _unsteered_shared(texts: pl.DataFrame) -> pl.DataFrame:
    unsteered = pl.col("method") == UNSTEERED
    own = texts.filter(~unsteered)
    shared = texts.filter(unsteered).drop("method").join(own.select("goal", "method").unique(), on="goal", how="left")
    shared = shared.with_columns(pl.col("method").fill_null(UNSTEERED)).select(texts.columns).join(own, on=_TEXT, how="anti")
    return pl.concat([own, shared]).sort(_TEXT)


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


def _measures(scores: NDArray[np.float64], seed: int) -> dict[str, float]:
    """Means, product and bounds of the scores [texts, 2] of one scale; what cannot be given is left out."""
    n = len(scores)
    if not n:
        return {}
    means = scores.mean(axis=0)
    found = dict(zip(MEASURES, (*means.tolist(), float(means.prod())), strict=True))
    if n > 1:
        drawn = statistics.draws((n,), seed) @ scores / n
        bounds = np.percentile(np.column_stack([drawn, drawn.prod(axis=1)]), statistics.PERCENTILES, axis=0)
        found |= dict(zip(_BOUNDS, bounds.T.ravel().tolist(), strict=True))
    return found
