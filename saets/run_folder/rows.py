"""Records as Arrow tables: the columns of what the run folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from saets.effects.worker import Failure, Measurement, effect_of
from saets.engine.calibration import Calibration
from saets.errors import InputError
from saets.records import Battle, Generation, Grade, VectorItem
from saets.run_folder.store import Table
from saets.scores.measures import Measures

GENERATIONS = pa.schema(
    [
        ("generation_id", pa.string()),
        ("goal", pa.string()),
        ("method", pa.string()),
        ("vector_id", pa.string()),
        ("scale", pa.float64()),
        ("prompt", pa.string()),
        ("sample", pa.int64()),
        ("seed", pa.int64()),
        ("completion", pa.string()),
    ]
)
GRADES = pa.schema(
    [
        ("generation_id", pa.string()),
        ("criterion", pa.string()),
        ("score", pa.float64()),
        ("reply", pa.string()),
        ("error", pa.string()),
        ("judge", pa.string()),
    ]
)
BATTLES = pa.schema(
    [
        ("battle_id", pa.string()),
        ("goal", pa.string()),
        ("criterion", pa.string()),
        ("prompt", pa.string()),
        ("sample", pa.int64()),
        ("first", pa.string()),
        ("second", pa.string()),
        ("first_id", pa.string()),
        ("second_id", pa.string()),
        ("winner", pa.string()),
        ("reply", pa.string()),
        ("error", pa.string()),
        ("judge", pa.string()),
    ]
)
MEASURES = pa.schema(
    [
        ("generation_id", pa.string()),
        ("loss", pa.float64()),
        ("perplexity", pa.float64()),
        ("distinct_1", pa.float64()),
        ("distinct_2", pa.float64()),
        ("repetition", pa.float64()),
        ("n_tokens", pa.int64()),
        ("n_words", pa.int64()),
    ]
)

MEASURED = pa.schema(
    [
        ("error_variance", pa.float64()),
        ("scale", pa.float64()),
        ("loss", pa.float64()),
        ("outcome", pa.string()),
        ("unsteered_loss", pa.float64()),
        ("n_rollouts", pa.int64()),
        ("n_tokens", pa.int64()),
    ]
)
FEATURE_ERRORS = "feature_error_variance"


def item_rows(items: Sequence[VectorItem]) -> pa.Table:
    """One row an item, with its vector."""
    return pa.table({**_named(items), "vector": tensor_column([item.direction for item in items])})


def _named(items: Sequence[VectorItem]) -> dict[str, Any]:
    """The columns that say which vectors these are."""
    return {
        "vector_id": [item.vector_id for item in items],
        "source": [item.source for item in items],
        "index": pa.array([item.index for item in items], pa.int64()),
    }


def items_of(table: pa.Table) -> list[VectorItem]:
    """The items of `item_rows`, or of a table with those columns."""
    rows = table.select(("vector_id", "source", "index")).to_pylist()
    return [VectorItem(**row, direction=vector) for row, vector in zip(rows, _arrays(table, "vector"), strict=True)]


def measurement_rows(measurements: Sequence[Measurement]) -> pa.Table:
    """One row a measurement that has no baseline yet: everything in it, means in float32."""
    facts = [
        {
            "error_variance": found.error_variance,
            **found.calibration._asdict(),
            "unsteered_loss": found.unsteered_loss,
            "n_rollouts": found.n_rollouts,
            "n_tokens": found.n_tokens,
        }
        for found in measurements
    ]
    table = item_rows([found.item for found in measurements])
    for name, column in zip(MEASURED.names, pa.Table.from_pylist(facts, schema=MEASURED).columns, strict=True):
        table = table.append_column(name, column)
    table = table.append_column("mean", tensor_column([found.mean for found in measurements]))
    errors = [found.feature_error_variance for found in measurements if found.feature_error_variance is not None]
    return table.append_column(FEATURE_ERRORS, tensor_column(errors)) if errors else table


def measurements_of(table: pa.Table) -> list[Measurement]:
    """The measurements of `measurement_rows`."""
    features: Sequence[NDArray[np.float32] | None] = [None] * table.num_rows
    if FEATURE_ERRORS in table.column_names:
        features = _arrays(table, FEATURE_ERRORS)
    facts = table.select(MEASURED.names).to_pylist()
    return [
        Measurement(
            item=item,
            mean=mean,
            error_variance=row["error_variance"],
            feature_error_variance=of_features,
            calibration=Calibration(row["scale"], row["loss"], row["outcome"]),
            unsteered_loss=row["unsteered_loss"],
            n_rollouts=row["n_rollouts"],
            n_tokens=row["n_tokens"],
        )
        for item, mean, of_features, row in zip(items_of(table), _arrays(table, "mean"), features, facts, strict=True)
    ]


def _arrays(table: pa.Table, name: str) -> list[NDArray[np.float32]]:
    """One array of its own a row, so that none keeps the whole table in memory."""
    if not table.num_rows:
        return []
    return [np.array(row) for row in table.column(name).combine_chunks().to_numpy_ndarray()]


def failure_rows(failures: Sequence[Failure]) -> pa.Table:
    """One row a vector that could not be measured."""
    return pa.table({**_named([failure.item for failure in failures]), "reason": [failure.reason for failure in failures]})


def generation_rows(texts: Sequence[Generation]) -> pa.Table:
    """One row a completion."""
    return pa.Table.from_pylist([asdict(text) for text in texts], GENERATIONS)


def grade_rows(grades: Sequence[Grade]) -> pa.Table:
    """One row a criterion of a completion."""
    return pa.Table.from_pylist([asdict(grade) for grade in grades], GRADES)


def battle_rows(battles: Sequence[Battle]) -> pa.Table:
    """One row a battle."""
    return pa.Table.from_pylist([asdict(battle) for battle in battles], BATTLES)


def measures_rows(measures: Sequence[Measures]) -> pa.Table:
    """One row a completion: its figures that need no judge."""
    return pa.Table.from_pylist([asdict(found) for found in measures], MEASURES)


def side_effect_rows(measurements: Sequence[Measurement], baseline: Baseline) -> pa.Table:
    """One row a vector and scale: losses on held-out text, effect in float32 and its standard error (RMS over features)."""
    return pa.table(
        {
            "vector_id": [found.item.vector_id for found in measurements],
            "scale": [found.calibration.scale for found in measurements],
            "loss": [found.calibration.loss for found in measurements],
            "unsteered_loss": [found.unsteered_loss for found in measurements],
            "n_rollouts": [found.n_rollouts for found in measurements],
            "standard_error": np.sqrt([found.error_variance + baseline.error_variance for found in measurements]),
            "effect": tensor_column([effect_of(found.mean, baseline.mean) for found in measurements]),
        }
    )


def tensor_column(arrays: Sequence[NDArray[np.generic]]) -> pa.FixedShapeTensorArray:
    """Equal-shaped arrays as one column that polars, torch and Ray read natively."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(arrays))


def baseline_rows(blocks: Sequence[Measurement]) -> pa.Table:
    """One row a block of the unsteered baseline: mean feature activations in float32."""
    table = pa.table(
        {
            "vector_id": [block.item.vector_id for block in blocks],
            "index": pa.array([block.item.index for block in blocks], pa.int64()),
            "mean": tensor_column([block.mean for block in blocks]),
            "error_variance": [block.error_variance for block in blocks],
            "unsteered_loss": [block.unsteered_loss for block in blocks],
        }
    )
    each = [block.feature_error_variance for block in blocks if block.feature_error_variance is not None]
    return table.append_column("feature_error_variance", tensor_column(each)) if each else table


class Baseline(NamedTuple):
    """The run's one shared baseline."""

    mean: NDArray[np.float32]
    """Mean feature activations of unsteered text, [d_sae]."""
    error_variance: float
    """Squared standard error of the mean, averaged over features."""
    feature_error_variance: NDArray[np.float32] | None
    """The same for each feature, where the run keeps it."""


def shared_baseline(table: Table) -> Baseline:
    """The baseline of all blocks in a table, which holds at least one."""
    frame = table.read()
    assert frame is not None
    return mean_of_blocks(frame)


def measured_baseline(blocks: Sequence[Measurement]) -> Baseline:
    """The baseline of blocks that were measured and not written."""
    return mean_of_blocks(pl.DataFrame(pl.from_arrow(baseline_rows(blocks))))


def mean_of_blocks(frame: pl.DataFrame) -> Baseline:
    """The mean over all blocks, given as `baseline_rows`, and its standard errors."""
    blocks = frame.sort(pl.col("index"))
    mean = np.asarray(blocks["mean"].to_numpy(), dtype=np.float64).mean(axis=0)
    each = blocks["feature_error_variance"].to_numpy() if "feature_error_variance" in blocks.columns else None
    return Baseline(
        mean.astype(np.float32),
        float(blocks["error_variance"].to_numpy().mean() / len(blocks)),
        None if each is None else (np.asarray(each, dtype=np.float64).mean(axis=0) / len(blocks)).astype(np.float32),
    )


def effect_rows(measurements: Sequence[Measurement], baseline: Baseline, dtype: str = "float16") -> pa.Table:
    """One row a vector: unit vector in float32, calibrated scale, effect in `dtype` and its standard error (RMS over features).

    Where measurement and baseline have standard errors of each feature, they follow as `standard_errors` in `dtype`.

    Raises:
        InputError: an effect too large for float16.
    """
    effects = np.stack([effect_of(found.mean, baseline.mean) for found in measurements])
    if dtype == "float16" and np.abs(effects).max() > np.finfo(np.float16).max:
        raise InputError("an effect exceeds 65504, the range of float16; store them with --set effects.dtype=float32")
    errors = [found.error_variance + baseline.error_variance for found in measurements]
    table = pa.table(
        {
            **_named([found.item for found in measurements]),
            "vector": tensor_column([found.item.direction for found in measurements]),
            "scale": [found.calibration.scale for found in measurements],
            "loss": [found.calibration.loss for found in measurements],
            "unsteered_loss": [found.unsteered_loss for found in measurements],
            "calibration": [found.calibration.outcome for found in measurements],
            "n_rollouts": [found.n_rollouts for found in measurements],
            "n_tokens": [found.n_tokens for found in measurements],
            "standard_error": np.sqrt(errors),
            "effect": pa.FixedShapeTensorArray.from_numpy_ndarray(effects.astype(dtype)),
        }
    )
    each = [found.feature_error_variance for found in measurements if found.feature_error_variance is not None]
    if not each or baseline.feature_error_variance is None:
        return table
    of_features = [np.sqrt(variance + baseline.feature_error_variance).astype(dtype) for variance in each]
    return table.append_column("standard_errors", tensor_column(of_features))
