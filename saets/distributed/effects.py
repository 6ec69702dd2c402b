"""Stage 1 on Ray: actors with a model and an SAE each stream measurements through a Ray Dataset to the driver.

A row of the Dataset is a batch. One task on the driver's node makes batches of vectors while actors ask for more, an actor
turns one at a time into results, and the driver pulls those and is the only writer. So nothing piles up anywhere, and n actors
need n slots.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data.block import BlockMetadata
from ray.data.exceptions import ExecutionTimeoutError

from saets.distributed.cluster import Cluster, actor_count, input_error
from saets.distributed.layout import Layout
from saets.distributed.rollcall import (
    BEAT_SECONDS,
    SILENT_SECONDS,
    Board,
    actors_alive,
    all_actors,
    answering,
    give_up,
    lost_actors,
    open_board,
)
from saets.effects.pending import Pending
from saets.effects.worker import EffectWorker, Failure, Measurement, describe, vectors_per_batch
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.records import VectorItem
from saets.run_folder.rows import item_rows, items_of, measurement_rows, measurements_of

logger = logging.getLogger(__name__)

TASK_RETRIES = 1
"""Tries after the first of a batch whose process ended."""

RESTARTS = 100
"""How often an actor may be started again; a node that comes and goes must not end a long run."""

NO_PROGRESS_SECONDS = 1800
"""A run that produces nothing for this long ends instead of waiting for ever."""

ONE_ROW_A_BLOCK = 1
"""Ray cuts blocks at this many bytes, but not within a row: every batch is a block, and a task, of its own."""


class EffectActor:
    """An `EffectWorker` that speaks Arrow."""

    def __init__(self, experiment: str, rows: int | None, board: Board | None = None) -> None:
        answering(board)
        parsed = Experiment.model_validate_json(experiment)
        if parsed.execution.gpus_per_actor == 0:
            torch.set_num_threads(max(1, int(parsed.execution.cpus_per_actor)))
        self.worker = EffectWorker(parsed, rows)
        self.facts = describe(self.worker)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if not batch.column("items")[0].is_valid:  # the end of the vectors, passed on to the driver
            return _END.append_column("error", batch.column("error"))
        results = self.measure(items_of(_unpacked(batch, "items")))
        self.facts["rows_per_step"] = self.worker.rows
        measured = [result for result in results if isinstance(result, Measurement)]
        failed = [result for result in results if isinstance(result, Failure)]
        reasons = (
            item_rows([failure.item for failure in failed]).append_column("reason", [[f.reason for f in failed]])
            if failed
            else None
        )
        return pa.table(
            {
                "measured": pa.array([_packed(measurement_rows(measured)) if measured else None], pa.large_binary()),
                "failed": pa.array([_packed(reasons) if reasons else None], pa.large_binary()),
                "worker": [json.dumps(self.facts, sort_keys=True)],
                "error": pa.nulls(1, pa.string()),
            }
        )

    def measure(self, items: Sequence[VectorItem]) -> list[Measurement | Failure]:
        """Where a batch raises, each item by itself, so that the one to blame fails alone."""
        try:
            return self.worker.measure(items)
        except Exception as error:
            if "CUDA" in str(error):  # this process cannot go on
                logger.exception("the GPU process ends and is started again")
                os._exit(1)
            if len(items) == 1:
                return [Failure(items[0], f"{type(error).__name__}: {error}".splitlines()[0])]
            return [result for item in items for result in self.measure([item])]


_END = pa.table({"measured": pa.nulls(1, pa.large_binary()), "failed": pa.nulls(1, pa.large_binary()), "worker": [""]})

Batch = tuple[list[Measurement | Failure], dict[str, Any] | None]
"""Results, and the `describe` of the worker that made them; None where no worker lived to tell."""


def measure(
    pending: Pending,
    experiment: Experiment,
    cluster: Cluster,
    *,
    rows: int | None = None,
    board: Board | None = None,
    actor: type[EffectActor] = EffectActor,
) -> Generator[Batch]:
    """A result for every pending item as batches finish, in any order; `pending` is told of them.

    `rows` a step are those an earlier part of the run recorded, if there was one. A batch whose process ends is tried again a
    few times; what is still missing then is tried once more, each vector by itself, so that one that kills its process costs
    its neighbours nothing, and becomes a `Failure`. A batch whose node is gone waits for another node as long as there is other
    work, then goes to the actors that are left. Where the stream of vectors breaks off, it is made again from what is left.

    Raises:
        InputError: what a worker found wrong with the experiment when it loaded, or sources that can no longer be read.
    """
    layout = cluster.layout(experiment)
    experiment = layout.applied(experiment)
    board = board or open_board()
    sizes = [1, vectors_per_batch(experiment)]
    while sizes:
        size, before = sizes.pop(), len(pending)
        broken: BrokenStream | None = None
        with (
            Watch(board) as watch,
            contextlib.closing(_one_pass(pending, size, experiment, layout, rows, board, actor)) as one_pass,
        ):
            try:
                for results, worker in one_pass:
                    watch.results()
                    pending.done(result.item for result in results)
                    yield results, worker
            except BrokenStream as error:
                broken = error
        if not len(pending):
            return
        if watch.lost:
            logger.warning("%d vectors were in the hands of actors whose node is gone; measuring them again", len(pending))
            sizes.append(size)
        elif broken:
            if len(pending) == before:
                raise broken
            logger.warning("the stream of vectors broke off; going on with the %d that are left", len(pending))
            sizes.append(size)
        else:
            logger.warning("%d vectors lost their worker process; trying each by itself", len(pending))
    yield [Failure(item, "the worker process ended each time it was measured") for item in pending], None


class BrokenStream(InputError):
    """The row that ends the vectors never came: what makes them ended before, or the actor that was to pass it on did."""


class Watch:
    """Gives up actors whose node is gone once nothing comes from the others any more, so that a Dataset ends without them.

    Until then they may find another node. Nothing comes any more where three times the longest wait for results has passed.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self.given_up: set[str] = set()
        self.lost: set[str] = set()
        """All whose node was lost meanwhile; known on leaving."""
        self._before = all_actors(board)
        self._last, self._longest = time.monotonic(), 0.0
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="saets-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._watching.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watching.join()
        self.lost = self.given_up | (lost_actors(self._board, 0.0) - self._before)
        for actor in all_actors(self._board) - self._before:
            give_up(actor)  # one that waits for a node would take the slot of an actor to come

    def results(self) -> None:
        """Some have come."""
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now

    def _watch(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            if time.monotonic() - self._last < max(SILENT_SECONDS, 3 * self._longest):
                continue
            for actor in lost_actors(self._board) - self._before - self.given_up:
                give_up(actor)
                self.given_up.add(actor)


def _one_pass(
    pending: Pending, size: int, experiment: Experiment, layout: Layout, rows: int | None, board: Board, actor: type[EffectActor]
) -> Generator[Batch]:
    """Results of the batches whose process lived."""
    dataset = ray.data.read_datasource(Batches(pending, size), override_num_blocks=1, num_cpus=0)
    dataset.context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    dataset.context.enable_progress_bars = False
    dataset.context.max_errored_blocks = -1
    dataset.context.target_max_block_size = ONE_ROW_A_BLOCK
    gpus = layout.gpus_per_actor or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # restarts and retries have no named parameter in this Ray yet
        results = dataset.map_batches(
            actor,
            fn_constructor_args=(experiment.model_dump_json(), rows, board),
            batch_format="pyarrow",
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=actor_count(layout, -(-len(pending) // size)), max_tasks_in_flight_per_actor=1
            ),
            num_gpus=gpus,
            num_cpus=None if gpus else layout.cpus_per_actor,
            max_restarts=RESTARTS,
            max_task_retries=TASK_RETRIES,
        )
    ended = False
    bundles: Any = None
    try:
        bundles = results.iter_internal_ref_bundles()  # in this thread, so that stopping here stops the Dataset before Ray goes
        for bundle in bundles:
            for batch in _rows_of(bundle):
                if worker := batch["worker"][0].as_py():
                    yield _results(batch), json.loads(worker)
                else:
                    ended, reason = True, batch["error"][0].as_py()
                    if reason is not None:
                        raise InputError(f"the vectors could not be made: {reason}")
    except ExecutionTimeoutError as error:
        raise InputError(
            f"nothing was measured for {NO_PROGRESS_SECONDS / 60:g} minutes, with {actors_alive(board)} actors alive; see "
            "`ray status`, and run the same command again: everything written so far is kept"
        ) from error
    except ray.exceptions.RayError as error:
        raise input_error(error) or error from error
    finally:
        del bundles  # which ends what still runs
    if not ended and len(pending):
        raise BrokenStream(
            f"the process that makes the vectors ended before the last {len(pending)}; run the same command again: everything "
            "written so far is kept"
        )


def _rows_of(bundle: Any) -> list[pa.Table]:
    blocks: list[pa.Table] = ray.get([entry.ref for entry in bundle.blocks])
    return [block.slice(row, 1) for block in blocks for row in range(len(block))]


class Batches(ray.data.Datasource):
    """Pending items as a stream of rows, each a batch, made one after another on the driver's node.

    They come in the same order each time, as Ray asks of a task that it may have to repeat.
    """

    def __init__(self, pending: Iterable[VectorItem], size: int) -> None:
        super().__init__()
        self._pending, self._size = pending, size

    @property
    def supports_distributed_reads(self) -> bool:
        """Sources may lie in files that the driver's node alone sees."""
        return False

    def estimate_inmemory_data_size(self) -> None:
        """Unknown before the sources are gone through."""

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        """One task, whatever the parallelism."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ray.data.ReadTask(functools.partial(_batch_rows, self._pending, self._size), unknown)]


def _batch_rows(pending: Iterable[VectorItem], size: int) -> Iterator[pa.Table]:
    """The batches, and a last row without items: Ray drops a task that fails, and with it would go all vectors to come."""
    reason = None
    try:
        items = iter(pending)
        while batch := list(itertools.islice(items, size)):
            yield _batch_row(batch)
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    yield pa.table({"items": pa.nulls(1, pa.large_binary()), "error": pa.array([reason], pa.string())})


def _batch_row(items: Sequence[VectorItem]) -> pa.Table:
    return pa.table({"items": pa.array([_packed(item_rows(items))], pa.large_binary()), "error": pa.nulls(1, pa.string())})


def _packed(table: pa.Table) -> bytes:
    """A table as one value of another."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


def _unpacked(row: pa.Table, name: str) -> pa.Table:
    return pa.ipc.open_stream(row.column(name)[0].as_buffer()).read_all()


def _results(row: pa.Table) -> list[Measurement | Failure]:
    results: list[Measurement | Failure] = []
    if row.column("measured")[0].is_valid:
        results += measurements_of(_unpacked(row, "measured"))
    if row.column("failed")[0].is_valid:
        failed = _unpacked(row, "failed")
        results += [Failure(item, reason) for item, reason in zip(items_of(failed), failed["reason"].to_pylist(), strict=True)]
    return results
