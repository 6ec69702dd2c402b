"""Stage 1: measure the vectors that neither the run nor the shipped effects hold yet."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from saets.distributed import effects as distributed
from saets.distributed.rollcall import actors_alive, open_board
from saets.effects.pending import Pending, id_numbers
from saets.effects.worker import Failure, Measurement, effect_of
from saets.errors import InputError
from saets.experiment.config import BASELINE, Effects
from saets.model import model_shape
from saets.run_folder.rows import baseline_rows, effect_rows, failure_rows, measurement_rows, measurements_of, shared_baseline
from saets.run_folder.shipped import check_weights
from saets.run_folder.store import Appender, RunFolder, Table, read_shard
from saets.stages.session import Session

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
    with EffectWriter(run, experiment.effects) as writer:
        there = [run.effects, run.waiting, *((shipped.effects, shipped.summed) if shipped else ())]
        known = [_numbers(table) for table in there]
        if not retry_failed:
            known.append(_numbers(run.failures))
        pending = Pending(experiment, d_model, np.concatenate(known), run.baseline.ids())
        if pending.vectors or run.waiting.shards():
            _measure(session, pending, writer, shipped)
    run.effects.compact()
    if storage := writer.storage():
        run.update_stage("effects", {"storage": storage})
    lost = run.failures.ids() - run.effects.ids()
    if lost:
        logger.warning("%d vectors could not be measured; the reasons are in %s", len(lost), run.failures.folder)


def _measure(session: Session, pending: Pending, writer: EffectWriter, shipped: RunFolder | None) -> None:
    run, experiment = session.run, session.cluster.layout(session.experiment).applied(session.experiment)
    rows = recorded_rows(run) if experiment.execution.rows == "auto" else None
    board = open_board()
    failed = 0

    def note() -> str:
        alive = actors_alive(board)
        return f"{'?' if alive is None else alive} of {experiment.execution.actors} actors alive, {failed} failed"

    total = len(pending) + pending.vectors_known
    with (
        session.progress.stage("measuring effects", total, pending.vectors_known, "vectors", note) as advance,
        Appender(run.failures, failure_rows) as failures,
        contextlib.closing(distributed.measure(pending, experiment, session.cluster, rows=rows, board=board)) as measured,
    ):
        for results, worker in measured:
            if worker is not None:
                for there in (run, shipped):
                    if there:
                        check_weights(there, worker)
                _record_shape(run, worker)
            writer.add([result for result in results if isinstance(result, Measurement)])
            unmeasured = [result for result in results if isinstance(result, Failure)]
            failures.add(unmeasured)
            failed += len(unmeasured)
            _check_baseline(unmeasured)
            advance(len(results))


def _numbers(table: Table) -> NDArray[np.uint64]:
    """The vectors of a table, by the numbers of their ids."""
    frame = table.read(["vector_id"])
    return np.empty(0, np.uint64) if frame is None else id_numbers(frame["vector_id"])


def _check_baseline(failures: Iterable[Failure]) -> None:
    """Without its baseline no effect can be written, so a block that fails ends the stage."""
    for failure in failures:
        if failure.item.source == BASELINE:
            raise InputError(
                f"the unsteered baseline could not be measured: {failure.reason}. Run `saets doctor`, then the same "
                "command again: everything written so far is kept"
            )


def recorded_rows(run: RunFolder) -> int | None:
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


class EffectWriter:
    """Writes baseline blocks at once, and vectors as effects; those that come before the baseline is complete wait on disk.

    Each vector is in `effects` once, whenever the process is killed: what waits is turned into effects on entering, without
    the vectors that had been already.
    """

    def __init__(self, run: RunFolder, settings: Effects) -> None:
        self._run = run
        self._missing = settings.baseline_blocks - len(run.baseline.ids())
        self._baseline = functools.cache(lambda: shared_baseline(run.baseline))
        self._dtype = settings.dtype
        self._effects = Appender(run.effects, self._rows)
        self._waiting = Appender(run.waiting, measurement_rows)
        self._rounding, self._variance, self._written = 0.0, 0.0, 0

    def __enter__(self) -> EffectWriter:
        self._settle()
        return self

    def __exit__(self, *_: object) -> None:
        self._effects.flush()
        self._waiting.flush()

    def add(self, measurements: Iterable[Measurement]) -> None:
        """Take measurements of baseline blocks and vectors; they are on disk some seconds later."""
        measurements = list(measurements)
        blocks = [found for found in measurements if found.item.source == BASELINE]
        vectors = [found for found in measurements if found.item.source != BASELINE]
        if blocks:
            self._run.baseline.write(baseline_rows(blocks))
            self._missing -= len(blocks)
            self._settle()
        (self._waiting if self._missing > 0 else self._effects).add(vectors)

    def _settle(self) -> None:
        if self._missing > 0:
            return
        self._waiting.flush()
        waiting = self._run.waiting.shards()
        there = self._run.effects.ids() if waiting else set()
        for shard in waiting:
            found = [one for one in measurements_of(read_shard(shard)) if one.item.vector_id not in there]
            self._effects.add(found)
            self._effects.flush()
            shard.delete()

    def _rows(self, found: list[Measurement]) -> pa.Table:
        baseline = self._baseline()
        rows = effect_rows(found, baseline, self._dtype)
        exact = np.stack([effect_of(one.mean, baseline.mean) for one in found])
        stored = rows["effect"].combine_chunks().to_numpy_ndarray().astype(np.float32)
        self._rounding += np.square(stored - exact).mean(axis=1).sum().item()
        self._variance += np.square(rows["standard_error"].to_numpy()).sum().item()
        self._written += len(found)
        return rows

    def storage(self) -> dict[str, float | str] | None:
        """What the rows on disk take, and what their rounding adds to their error; None where nothing was written."""
        if not self._written:
            return None
        sizes = [entry.size for name, entry in self._run.effects.folder.entries().items() if name.endswith(".parquet")]
        rows = len(_numbers(self._run.effects))
        return {
            "dtype": self._dtype,
            "megabytes_per_10000_vectors": sum(sizes) / rows * 10_000 / 1e6,
            "rounding_rms": (self._rounding / self._written) ** 0.5,
            "standard_error_rms": (self._variance / self._written) ** 0.5,
        }
