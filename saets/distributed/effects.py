"""Stage 1 on Ray: actors with a model and an SAE each stream measurements through a Ray Dataset to the driver.

One block is one batch is one actor task, so n actors need n slots and no read or write tasks compete with them; the driver
pulls finished blocks, which bounds memory, and is the only writer.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from saets.config import Experiment
from saets.distributed.cluster import Cluster, actor_count, input_error
from saets.effects import EffectWorker, Failure, Measurement, describe, vectors_per_batch
from saets.engine.calibration import Calibration
from saets.errors import InputError
from saets.records import VectorItem
from saets.rows import tensor_column

logger = logging.getLogger(__name__)

FEATURE_ERRORS = "feature_error_variance"

TASK_RETRIES = 1
"""Tries after the first of a batch whose process ended."""

RESTARTS = 100
"""How often an actor may be started again; a node that comes and goes must not end a long run."""

NO_PROGRESS_SECONDS = 1800
"""A run that produces nothing for this long ends instead of waiting for ever."""


class EffectActor:
    """An `EffectWorker` that speaks Arrow."""

    def __init__(self, experiment: str, rows: int | None) -> None:
        parsed = Experiment.model_validate_json(experiment)
        if parsed.execution.gpus_per_actor == 0:
            torch.set_num_threads(max(1, int(parsed.execution.cpus_per_actor)))
        self.worker = EffectWorker(parsed, rows)
        self.facts = describe(self.worker)

    def __call__(self, batch: pa.Table) -> pa.Table:
        results = self._measure(_items(batch))
        d_sae = self.worker.sae.cfg.d_sae
        means = [result.mean if isinstance(result, Measurement) else np.zeros(d_sae, np.float32) for result in results]
        self.facts["rows_per_step"] = self.worker.rows
        description = json.dumps(self.facts, sort_keys=True)
        facts = [{**_facts(result), "worker": description} for result in results]
        table = pa.Table.from_pylist(facts, schema=_FACTS)
        for name in ("vector_id", "source", "index", "vector"):
            table = table.append_column(name, batch.column(name))
        table = table.append_column("mean", tensor_column(means))
        if self.worker.experiment.effects.standard_errors == "features":
            none = np.full(d_sae, np.nan, np.float32)
            errors = [getattr(result, "feature_error_variance", none) for result in results]
            table = table.append_column(FEATURE_ERRORS, tensor_column(errors))
        return table

    def _measure(self, items: list[VectorItem]) -> list[Measurement | Failure]:
        """Where a batch raises, each item by itself, so that the one to blame fails alone."""
        try:
            return self.worker.measure(items)
        except InputError:
            raise
        except Exception as error:
            if "CUDA" in str(error):  # this process cannot go on
                logger.exception("the GPU process ends and is started again")
                os._exit(1)
            if len(items) == 1:
                return [Failure(items[0], f"{type(error).__name__}: {error}".splitlines()[0])]
            return [result for item in items for result in self._measure([item])]


Batch = tuple[list[Measurement | Failure], dict[str, Any] | None]
"""Results, and the `describe` of the worker that made them; None where no worker lived to tell."""


def measure(
    items: Sequence[VectorItem],
    experiment: Experiment,
    cluster: Cluster,
    *,
    rows: int | None = None,
    actor: type[EffectActor] = EffectActor,
) -> Iterator[Batch]:
    """A result for every item as batches finish, in any order.

    `rows` a step are those an earlier part of the run recorded, if there was one. A batch whose process ends is tried again a
    few times; what is still missing then is tried once more, each vector by itself, so that one that kills its process costs
    its neighbours nothing, and becomes a `Failure`.

    Raises:
        InputError: what a worker found wrong with the experiment when it loaded.
    """
    cluster.connect()
    left = {item.vector_id: item for item in items}
    for size in (vectors_per_batch(experiment), 1):
        for results, worker in _one_pass(list(left.values()), size, experiment, rows, actor):
            for result in results:
                del left[result.item.vector_id]
            yield results, worker
        if not left:
            return
        logger.warning("%d vectors lost their worker process; trying each by itself", len(left))
    reason = f"the worker process ended each time it was measured ({2 * (TASK_RETRIES + 1)} times)"
    yield [Failure(item, reason) for item in left.values()], None


def _one_pass(
    items: Sequence[VectorItem], size: int, experiment: Experiment, rows: int | None, actor: type[EffectActor]
) -> Iterator[Batch]:
    """Results of the batches whose process lived."""
    table = _table(items)
    blocks = [table.slice(start, size) for start in range(0, len(items), size)]
    execution = experiment.execution
    dataset = ray.data.from_arrow(blocks)
    dataset.context.execution_no_progress_timeout_s = NO_PROGRESS_SECONDS
    dataset.context.enable_progress_bars = False
    dataset.context.max_errored_blocks = -1
    gpus = execution.gpus_per_actor or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # restarts and retries have no named parameter in this Ray yet
        results = dataset.map_batches(
            actor,
            fn_constructor_args=(experiment.model_dump_json(), rows),
            batch_format="pyarrow",
            batch_size=size,
            compute=ray.data.ActorPoolStrategy(size=actor_count(execution, len(blocks)), max_tasks_in_flight_per_actor=1),
            num_gpus=gpus,
            num_cpus=None if gpus else execution.cpus_per_actor,
            max_restarts=RESTARTS,
            max_task_retries=TASK_RETRIES,
        )
    try:
        block: Any
        for block in results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            if block.num_rows:
                yield _results(block), json.loads(block.column("worker")[0].as_py())
    except ray.exceptions.RayError as error:
        raise input_error(error) or error from error


_FACTS = pa.schema(
    [
        ("error_variance", pa.float64()),
        ("scale", pa.float64()),
        ("loss", pa.float64()),
        ("outcome", pa.string()),
        ("unsteered_loss", pa.float64()),
        ("n_rollouts", pa.int64()),
        ("n_tokens", pa.int64()),
        ("failure", pa.string()),
        ("worker", pa.string()),
    ]
)


def _facts(result: Measurement | Failure) -> dict[str, Any]:
    if isinstance(result, Failure):
        return {"failure": result.reason}
    return {
        "error_variance": result.error_variance,
        **result.calibration._asdict(),
        "unsteered_loss": result.unsteered_loss,
        "n_rollouts": result.n_rollouts,
        "n_tokens": result.n_tokens,
    }


def _table(items: Sequence[VectorItem]) -> pa.Table:
    return pa.table(
        {
            "vector_id": [item.vector_id for item in items],
            "source": [item.source for item in items],
            "index": pa.array([item.index for item in items], pa.int64()),
            "vector": tensor_column([item.direction for item in items]),
        }
    )


def _items(table: pa.Table) -> list[VectorItem]:
    vectors = table.column("vector").combine_chunks().to_numpy_ndarray()
    names = ("vector_id", "source", "index")
    rows = table.select(names).to_pylist()
    return [VectorItem(**row, direction=np.array(vector)) for row, vector in zip(rows, vectors, strict=True)]


def _results(block: pa.Table) -> list[Measurement | Failure]:
    means = block.column("mean").combine_chunks().to_numpy_ndarray()
    errors: Any = [None] * len(means)
    if FEATURE_ERRORS in block.column_names:
        errors = block.column(FEATURE_ERRORS).combine_chunks().to_numpy_ndarray()
    results: list[Measurement | Failure] = []
    facts = block.select(_FACTS.names).to_pylist()
    for item, mean, error, row in zip(_items(block), means, errors, facts, strict=True):
        if row["failure"] is not None:
            results.append(Failure(item, row["failure"]))
            continue
        results.append(
            Measurement(
                item=item,
                mean=np.array(mean),
                error_variance=row["error_variance"],
                feature_error_variance=None if error is None else np.array(error),
                calibration=Calibration(row["scale"], row["loss"], row["outcome"]),
                unsteered_loss=row["unsteered_loss"],
                n_rollouts=row["n_rollouts"],
                n_tokens=row["n_tokens"],
            )
        )
    return results
