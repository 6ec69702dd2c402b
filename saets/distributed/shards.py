"""Measured rows as a Ray Dataset, read anew each time it is gone through: a task a shard, which yields a row group at a time."""

from __future__ import annotations

import functools
from typing import Any

import ray.data
from ray.data.block import BlockMetadata

from saets.measured import MeasuredRows, Which

AT_ONCE = 2
"""Shards read at once for each worker: one is decompressed while another's rows are used."""


def dataset(rows: MeasuredRows, which: Which | None = None, *, workers: int = 1) -> ray.data.Dataset:
    """The rows, or those of them that `which` wants, in no certain order.

    Effects stay in the type in which they are stored. Reading asks for no CPU slot: all may be taken by the workers that wait
    for it.
    """
    source = Shards(rows, which)
    tasks = ray.data.TaskPoolStrategy(size=min(AT_ONCE * max(workers, 1), len(rows.parts)))
    made = ray.data.read_datasource(source, override_num_blocks=len(rows.parts), num_cpus=0, compute=tasks)
    made.context.enable_progress_bars = False
    return made


class Shards(ray.data.Datasource):
    """Shards of a run folder."""

    def __init__(self, rows: MeasuredRows, which: Which | None) -> None:
        super().__init__()
        self._rows, self._which = rows, which

    @property
    def supports_distributed_reads(self) -> bool:
        """Whether any node may read: that of a path cannot be known, so a path is read on the driver's node, a URI by all.

        A path on a file system that all nodes share would do, but nothing tells it from one that is there on this node alone.
        """
        return all(part.shard.local is None for part in self._rows.parts)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows where effects are float16."""
        return sum(int(part.chosen.sum()) for part in self._rows.parts) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return 4 * self._rows.d_model + 2 * self._rows.d_sae

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        """One a shard, whatever the parallelism."""
        tasks = []
        for part in self._rows.parts:
            n = int(part.chosen.sum())
            counted, size, files = None if self._which else n, n * self._row_bytes, (str(part.shard),)
            known = BlockMetadata(num_rows=counted, size_bytes=size, exec_stats=None, input_files=files)
            tasks.append(ray.data.ReadTask(functools.partial(part.tables, self._which), known))
        return tasks
