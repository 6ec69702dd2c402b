"""Stage 1: measure the vectors that neither the run nor the shipped effects hold yet."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from saets.distributed import effects as distributed
from saets.effects import BASELINE, Failure, Measurement, baseline_items, vector_items
from saets.errors import InputError
from saets.model import model_shape
from saets.rows import baseline_rows, effect_rows, failure_rows
from saets.stages.session import Session
from saets.store import Appender, RunFolder

logger = logging.getLogger(__name__)


def measure_effects(session: Session, *, retry_failed: bool = False) -> None:
    """Measure `effects.sources`; the run's one baseline goes first. Vectors that failed before are left out unless asked for."""
    experiment, run = session.experiment, session.run
    d_model = model_shape(experiment.model)[0]
    shipped = session.shipped()
    if shipped is not None and not run.baseline.shards():
        for shard in shipped.baseline.shards():
            run.baseline.write(pq.read_table(shard))
    items = vector_items(experiment, d_model)
    known = run.effects.ids() | (shipped.effects.ids() if shipped else set())
    failed = set() if retry_failed else run.failures.ids()
    missing = [item for item in items if item.vector_id not in known | failed]
    if not missing:
        return
    there = run.baseline.ids()
    blocks = [item for item in baseline_items(experiment, d_model) if item.vector_id not in there]
    left = len(missing) + len(blocks)
    total = left + sum(item.vector_id in known for item in items)
    with (
        session.progress.stage("measuring effects", total, total - left, "vectors") as advance,
        Appender(run.failures, failure_rows) as failures,
        _EffectWriter(run, blocks=experiment.effects.baseline_blocks) as writer,
    ):
        for results, worker in distributed.measure([*blocks, *missing], experiment, session.cluster):
            _check_weights(run, shipped, worker)
            run.update_stage("effects", {"worker": worker})
            writer.add([result for result in results if isinstance(result, Measurement)])
            failures.add(result for result in results if isinstance(result, Failure))
            advance(len(results))
    lost = run.failures.ids() - run.effects.ids()
    if lost:
        logger.warning("%d vectors could not be measured; the reasons are in %s", len(lost), run.failures.folder)


def _check_weights(run: RunFolder, shipped: RunFolder | None, worker: Mapping[str, Any]) -> None:
    """Raise `InputError` where rows that are there were measured with other weights of the same name."""
    for there in (run, shipped):
        before = there.manifest().get("effects", {}).get("worker", worker) if there else worker
        different = [
            name for name in ("model_hash", "sae_hash") if before["dtype"] == worker["dtype"] and before[name] != worker[name]
        ]
        if different and there:
            raise InputError(
                f"{there.path} holds effects of other weights ({', '.join(different)}) under the same name; "
                "give --out a new folder, or pin model.revision"
            )


class _EffectWriter(Appender[Measurement]):
    """Writes baseline blocks at once, and vectors as effects as soon as the baseline is complete."""

    def __init__(self, run: RunFolder, *, blocks: int) -> None:
        super().__init__(run.effects, self._rows)
        self._run, self._blocks = run, blocks
        self._early: list[Measurement] = []

    def add(self, records: Iterable[Measurement]) -> None:
        """Take measurements of baseline blocks and vectors."""
        records = list(records)
        baseline = [found for found in records if found.item.source == BASELINE]
        if baseline:
            self._run.baseline.write(baseline_rows(baseline))
        self._early += [found for found in records if found.item.source != BASELINE]
        if len(self._run.baseline.ids()) >= self._blocks:
            super().add(self._early)
            self._early = []

    def _rows(self, records: list[Measurement]) -> pa.Table:
        mean, variance = shared_baseline(self._run)
        return effect_rows(records, mean, variance)


def shared_baseline(run: RunFolder) -> tuple[np.ndarray, float]:
    """Mean feature activations of unsteered text [d_sae] over all blocks, and their squared standard error."""
    frame = run.baseline.read()
    assert frame is not None
    blocks = frame.sort(pl.col("index"))
    mean = np.asarray(blocks["mean"].to_numpy(), dtype=np.float64).mean(axis=0)
    return mean.astype(np.float32), float(blocks["error_variance"].to_numpy().mean() / len(blocks))
