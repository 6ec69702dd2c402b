"""Stage 1: measure the vectors that neither the run nor the shipped effects hold yet."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl

from saets.config import BASELINE
from saets.distributed import effects as distributed
from saets.effects import Failure, Measurement, baseline_items
from saets.errors import InputError
from saets.model import model_shape
from saets.rows import Baseline, baseline_rows, effect_rows, failure_rows
from saets.sources import vector_items
from saets.stages.session import Session
from saets.store import Appender, RunFolder, read_shard

logger = logging.getLogger(__name__)

SHAPE = ("decoder", "rows_per_step", "dtype", "device", "threads")
"""What decides the last bits of a text, as `effects.describe` names it."""


def measure_effects(session: Session, *, retry_failed: bool = False) -> None:
    """Measure `effects.sources`; the run's one baseline goes first. Vectors that failed before are left out unless asked for."""
    experiment, run = session.experiment, session.run
    d_model = model_shape(experiment.model)[0]
    shipped = session.shipped()
    if shipped is not None and not run.baseline.shards():
        for shard in shipped.baseline.shards():
            run.baseline.write(read_shard(shard))
    items = vector_items(experiment, d_model)
    known = run.effects.ids() | (shipped.effects.ids() if shipped else set())
    failed = set() if retry_failed else run.failures.ids()
    missing = [item for item in items if item.vector_id not in known | failed]
    if not missing:
        return
    there = run.baseline.ids()
    blocks = [item for item in baseline_items(experiment, d_model) if item.vector_id not in there]
    left = len(missing) + len(blocks)
    rows = _recorded_rows(run) if experiment.execution.rows == "auto" else None
    total = left + sum(item.vector_id in known for item in items)
    with (
        session.progress.stage("measuring effects", total, total - left, "vectors") as advance,
        Appender(run.failures, failure_rows) as failures,
        _EffectWriter(run, blocks=experiment.effects.baseline_blocks) as writer,
    ):
        for results, worker in distributed.measure([*blocks, *missing], experiment, session.cluster, rows=rows):
            if worker is not None:
                _check_weights(run, shipped, worker)
                _record_shape(run, worker)
            writer.add([result for result in results if isinstance(result, Measurement)])
            failures.add(result for result in results if isinstance(result, Failure))
            _check_baseline(results)
            advance(len(results))
    run.effects.compact()
    lost = run.failures.ids() - run.effects.ids()
    if lost:
        logger.warning("%d vectors could not be measured; the reasons are in %s", len(lost), run.failures.folder)


def _check_baseline(results: Iterable[Measurement | Failure]) -> None:
    """Without its baseline no effect can be written, so a block that fails ends the stage."""
    for result in results:
        if isinstance(result, Failure) and result.item.source == BASELINE:
            raise InputError(
                f"the unsteered baseline could not be measured: {result.reason}. Run `saets doctor`, then the same "
                "command again: everything written so far is kept"
            )


def _recorded_rows(run: RunFolder) -> int | None:
    """Rows a step with which this run last measured."""
    rows = run.manifest().get("effects", {}).get("worker", {}).get("rows_per_step")
    return None if rows is None else int(rows)


def _record_shape(run: RunFolder, worker: Mapping[str, Any]) -> None:
    """Keep the worker's description and every execution shape the run has had: texts of two shapes may differ by rounding."""
    before = run.manifest().get("effects", {})
    shape = {name: worker[name] for name in SHAPE}
    shapes = before.get("shapes", [])
    if before.get("worker") == worker and shape in shapes:
        return
    if shapes and shape not in shapes:
        logger.warning("effects go on at another execution shape, %s; a text may differ by rounding", shape)
    run.update_stage("effects", {"worker": dict(worker), "shapes": shapes if shape in shapes else [*shapes, shape]})


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
        super().__init__(run.effects, lambda records: effect_rows(records, self._baseline()))
        self._run, self._missing = run, blocks - len(run.baseline.ids())
        self._early: list[Measurement] = []
        self._baseline = functools.cache(lambda: shared_baseline(run))

    def add(self, records: Iterable[Measurement]) -> None:
        """Take measurements of baseline blocks and vectors."""
        records = list(records)
        baseline = [found for found in records if found.item.source == BASELINE]
        if baseline:
            self._run.baseline.write(baseline_rows(baseline))
            self._missing -= len(baseline)
        self._early += [found for found in records if found.item.source != BASELINE]
        if self._missing <= 0:
            super().add(self._early)
            self._early = []


def shared_baseline(run: RunFolder) -> Baseline:
    """The mean over all blocks of the baseline and its standard errors."""
    frame = run.baseline.read()
    assert frame is not None
    blocks = frame.sort(pl.col("index"))
    mean = np.asarray(blocks["mean"].to_numpy(), dtype=np.float64).mean(axis=0)
    each = blocks["feature_error_variance"].to_numpy() if "feature_error_variance" in blocks.columns else None
    return Baseline(
        mean.astype(np.float32),
        float(blocks["error_variance"].to_numpy().mean() / len(blocks)),
        None if each is None else (np.asarray(each, dtype=np.float64).mean(axis=0) / len(blocks)).astype(np.float32),
    )
