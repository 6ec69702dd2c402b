"""Measured rows as a Ray Dataset: a task a shard, which yields a row group at a time."""

from __future__ import annotations

from typing import Any

import ray.data
from ray.data.block import BlockMetadata

from saets.run_folder.measured import MeasuredRows

AT_ONCE = 2
"""Shards read at once for each worker: one is decompressed while another's rows are used."""


def dataset(rows: MeasuredRows, workers: int) -> ray.data.Dataset:
    """The rows, in no certain order.

    Effects stay in the type in which they are stored. Reading asks for no CPU slot: all may be taken by the workers that wait
    for it.
    """
    tasks = ray.data.TaskPoolStrategy(size=min(AT_ONCE * max(workers, 1), len(rows.parts)))
    made = ray.data.read_datasource(Shards(rows), override_num_blocks=len(rows.parts), num_cpus=0, compute=tasks)
    made.context.enable_progress_bars = False
    return made


class Shards(ray.data.Datasource):
    """Shards of a run folder."""

    def __init__(self, rows: MeasuredRows) -> None:
        super().__init__()
        self._rows = rows

    @property
    def supports_distributed_reads(self) -> bool:
        """Whether any node may read: that of a path cannot be known, so a path is read on the driver's node, a URI by all.

        A path on a file system that all nodes share would do, but nothing tells it from one that is there on this node alone.
        """
        return all(part.shard.local is None for part in self._rows.parts)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all rows where effects are float16."""
        return len(self._rows) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return 4 * self._rows.d_model + 2 * self._rows.d_sae

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        """One a shard, whatever the parallelism."""
        tasks = []
        for part in self._rows.parts:
            n = int(part.chosen.sum())
            known = BlockMetadata(num_rows=n, size_bytes=n * self._row_bytes, exec_stats=None, input_files=(str(part.shard),))
            tasks.append(ray.data.ReadTask(part.tables, known))
        return tasks
