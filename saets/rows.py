"""Records as Arrow tables: the columns of what the run folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saets.effects import Failure, Measurement, effect_of
from saets.errors import InputError
from saets.records import Generation, Grade

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


def failure_rows(failures: Sequence[Failure]) -> pa.Table:
    """One row a vector that could not be measured."""
    return pa.table(
        {
            "vector_id": [failure.item.vector_id for failure in failures],
            "source": [failure.item.source for failure in failures],
            "index": pa.array([failure.item.index for failure in failures], pa.int64()),
            "reason": [failure.reason for failure in failures],
        }
    )


def generation_rows(texts: Sequence[Generation]) -> pa.Table:
    """One row a completion."""
    return pa.Table.from_pylist([asdict(text) for text in texts], GENERATIONS)


def grade_rows(grades: Sequence[Grade]) -> pa.Table:
    """One row a criterion of a completion."""
    return pa.Table.from_pylist([asdict(grade) for grade in grades], GRADES)


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


def effect_rows(measurements: Sequence[Measurement], baseline: Baseline) -> pa.Table:
    """One row a vector: unit vector in float32, calibrated scale, effect in float16 and its standard error (RMS over features).

    Where measurement and baseline have standard errors of each feature, they follow as `standard_errors` in float16.

    Raises:
        InputError: an effect too large for float16.
    """
    effects = np.stack([effect_of(found.mean, baseline.mean) for found in measurements])
    if np.abs(effects).max() > np.finfo(np.float16).max:
        raise InputError("an effect exceeds 65504, the range of float16; the SAE's activations are too large to store")
    errors = [found.error_variance + baseline.error_variance for found in measurements]
    table = pa.table(
        {
            "vector_id": [found.item.vector_id for found in measurements],
            "source": [found.item.source for found in measurements],
            "index": pa.array([found.item.index for found in measurements], pa.int64()),
            "vector": tensor_column([found.item.direction for found in measurements]),
            "scale": [found.calibration.scale for found in measurements],
            "loss": [found.calibration.loss for found in measurements],
            "unsteered_loss": [found.unsteered_loss for found in measurements],
            "calibration": [found.calibration.outcome for found in measurements],
            "n_rollouts": [found.n_rollouts for found in measurements],
            "n_tokens": [found.n_tokens for found in measurements],
            "standard_error": np.sqrt(errors),
            "effect": pa.FixedShapeTensorArray.from_numpy_ndarray(effects.astype(np.float16)),
        }
    )
    each = [found.feature_error_variance for found in measurements if found.feature_error_variance is not None]
    if not each or baseline.feature_error_variance is None:
        return table
    of_features = [np.sqrt(variance + baseline.feature_error_variance).astype(np.float16) for variance in each]
    return table.append_column("standard_errors", tensor_column(of_features))
