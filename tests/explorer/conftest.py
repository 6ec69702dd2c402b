"""A small run with planted effects, to explore."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from saets.experiment.config import Experiment
from saets.experiment.loading import effect_settings
from saets.fit.approximator import EffectApproximator
from saets.records import unit, vector_id
from saets.run_folder.rows import tensor_column
from saets.run_folder.store import RunFolder
from saets.sae import load_sae

MEASURED = (3, 5, 7, 40)
"""Features whose decoder rows are measured, before six random vectors."""


def planted(experiment: Experiment) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors and their effects: four decoder rows, then six random directions."""
    draw = np.random.default_rng(5)
    decoder = load_sae(experiment.sae, 32).W_dec.numpy()
    vectors = [unit(row) for row in (*decoder[list(MEASURED)], *draw.standard_normal((6, 32)))]
    effects = draw.standard_normal((10, 64)).astype(np.float16).astype(np.float32)
    return np.stack(vectors), effects


def write(run: RunFolder, vectors: NDArray[np.float32], effects: NDArray[np.float32], *, errors: bool = False) -> None:
    """A shard of these rows."""
    n = len(vectors)
    table = pa.table(
        {
            "vector_id": [vector_id(vector) for vector in vectors],
            "source": ["<b>drawn</b>"] * n,
            "index": list(range(n)),
            "vector": tensor_column(list(vectors)),
            "scale": np.linspace(10, 19, n),
            "loss": np.full(n, 4.1),
            "unsteered_loss": np.full(n, 3.6),
            "calibration": ["capped", *["ok"] * (n - 1)],
            "n_rollouts": np.full(n, 12),
            "standard_error": np.linspace(0.1, 0.2, n),
            "effect": tensor_column(list(effects.astype(np.float16))),
        }
    )
    run.effects.write(
        table.append_column("standard_errors", tensor_column(list(np.abs(effects / 8).astype(np.float16)))) if errors else table
    )


def approximator(run: RunFolder) -> EffectApproximator:
    """One of random numbers, written as the run's."""
    draw = torch.Generator().manual_seed(4)
    made = EffectApproximator(torch.randn(32, 64, generator=draw), torch.randn(64, generator=draw))
    made.save(run.approximator)
    return made


@pytest.fixture
def run(tmp_path: Path, tiny_experiment: Experiment) -> RunFolder:
    """A run of the tiny experiment with the planted effects, in three shards."""
    run = RunFolder.create(tmp_path / "run", tiny_experiment, effect_settings(tiny_experiment))
    vectors, effects = planted(tiny_experiment)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 10)):
        write(run, vectors[rows], effects[rows])
    return run
