"""Which measured rows a fit reads, and how: the newest of each vector once, a row group at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from saets.errors import InputError
from saets.files.storage import Location
from saets.run_folder.store import Table, open_shard

COLUMNS = ("vector_id", "vector", "effect", "standard_error", "calibration")
"""What a fit reads of the effects."""


class RowBatch(NamedTuple):
    """Some rows in memory."""

    vector_ids: list[str]
    vectors: Tensor
    """[rows, d_model], unit vectors."""
    effects: Tensor
    """[rows, d_sae], as they are stored."""
    standard_errors: Tensor
    """Of each row the root mean square over features; NaN where it is not known."""
    capped: Tensor
    """Which rows' calibration met the grid's end."""

    @classmethod
    def of(cls, table: pa.Table) -> RowBatch:
        """From a table of `COLUMNS`."""
        vectors, effects = (torch.tensor(table[name].combine_chunks().to_numpy_ndarray()) for name in ("vector", "effect"))
        errors = torch.tensor(table["standard_error"].to_numpy())
        capped = torch.tensor([found == "capped" for found in table["calibration"].to_pylist()])
        return cls(table["vector_id"].to_pylist(), vectors, effects, errors, capped)

    def some(self, chosen: Tensor) -> RowBatch:
        """The rows that a mask [rows] chooses."""
        ids = [vector_id for vector_id, which in zip(self.vector_ids, chosen.tolist(), strict=True) if which]
        return RowBatch(ids, *(column[chosen] for column in self[1:]))


class ShardRows(NamedTuple):
    """Some rows of a shard."""

    shard: Location
    chosen: np.ndarray
    """[rows of the shard], bool."""

    def tables(self, columns: Sequence[str] = COLUMNS) -> Iterator[pa.Table]:
        """The chosen rows, those of a row group after another; groups without any, and columns that are not there, are not read.

        Raises:
            InputError: the shard is gone, or the storage fails.
        """
        start = 0
        with open_shard(self.shard) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                chosen, start = self.chosen[start:end], end
                if chosen.any():
                    rows = file.read_row_group(group, there)
                    yield rows if chosen.all() else rows.filter(pa.array(chosen))


@dataclass(frozen=True)
class MeasuredRows:
    """What a fit reads; kept are a path and a mask a shard, never vectors or effects."""

    parts: tuple[ShardRows, ...]
    d_model: int
    d_sae: int

    def __len__(self) -> int:
        return sum(int(part.chosen.sum()) for part in self.parts)

    def has(self, column: str) -> bool:
        """Whether any shard has this column."""
        for part in self.parts:
            with open_shard(part.shard) as file:
                if column in file.schema_arrow.names:
                    return True
        return False

    def batches(self) -> Iterator[RowBatch]:
        """The rows, those of a row group at a time. Raises `InputError`: see `ShardRows.tables`."""
        return (RowBatch.of(table) for part in self.parts for table in part.tables())

    @classmethod
    def of(cls, tables: Sequence[Table], leave_out: Collection[str] = ()) -> MeasuredRows:
        """The newest row of each vector_id, from the first of the tables that holds it; reads vector_ids alone.

        Vectors whose id is in `leave_out` are not read.

        Raises:
            InputError: no rows at all, or shards whose vectors or effects differ in length (names two, with their shapes).
        """
        parts: list[ShardRows] = []
        seen = set(leave_out)
        first: tuple[Location, tuple[int, int]] | None = None
        for table in tables:
            for shard in reversed(table.shards()):
                with open_shard(shard) as file:
                    shape = _shape(shard, file.schema_arrow)
                    ids = file.read(["vector_id"])["vector_id"].to_pylist()
                first = first or (shard, shape)
                if shape != first[1]:
                    described = ", ".join(_described(*found) for found in ((shard, shape), first))
                    raise InputError(
                        f"effects of different shapes cannot be fitted together: {described}; move the shards of one kind "
                        "away, or give --out a new folder"
                    )
                chosen = np.zeros(len(ids), bool)
                for row in reversed(range(len(ids))):
                    chosen[row] = ids[row] not in seen
                    seen.add(ids[row])
                parts.append(ShardRows(shard, chosen))
        if first is None:
            raise InputError("no measured effects; run `saets effects` first")
        return cls(tuple(parts), *first[1])


def _shape(shard: Location, schema: pa.Schema) -> tuple[int, int]:
    """d_model and d_sae."""
    types = [schema.field(name).type if name in schema.names else None for name in ("vector", "effect")]
    if not all(isinstance(found, pa.FixedShapeTensorType) for found in types):
        raise InputError(f"{shard} holds no vectors and effects of fixed length; move it away, its rows are measured again")
    d_model, d_sae = (found.shape[0] for found in types if found)
    return d_model, d_sae


def _described(shard: Location, shape: tuple[int, int]) -> str:
    return f"{shard} holds vectors of d_model {shape[0]} and effects of d_sae {shape[1]}"
