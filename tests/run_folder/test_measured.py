"""The rows that a fit reads: each vector once, and nothing that does not fit together."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from saets.errors import InputError
from saets.files.storage import Location
from saets.run_folder.measured import MeasuredRows
from saets.run_folder.rows import tensor_column
from saets.run_folder.store import Table


def measured(*ids: str, d_model: int = 2, d_sae: int = 3, value: float | None = None) -> pa.Table:
    """Rows whose effect tells their id's length, or `value`."""
    lengths = [len(name) if value is None else value for name in ids]
    vectors, effects = (tensor_column([np.full(size, n, np.float32) for n in lengths]) for size in (d_model, d_sae))
    facts = {"standard_error": [0.1] * len(ids), "calibration": ["ok"] * len(ids)}
    return pa.table({"vector_id": list(ids), "vector": vectors, "effect": effects, **facts})


def read(rows: MeasuredRows) -> list[tuple[list[str], list[float]]]:
    parts = [part for shard in rows.parts for part in shard.tables()]
    return [(part["vector_id"].to_pylist(), part["effect"].combine_chunks().to_numpy_ndarray()[:, 0].tolist()) for part in parts]


def test_rows_that_two_writers_both_wrote_are_fitted_once(place: Location) -> None:
    own, shipped = Table(place / "own", ["vector_id"]), Table(place / "shipped", ["vector_id"])
    own.write(measured("a", "bb"))
    own.write(measured("bb", "ccc"))
    shipped.write(measured("a", "dddd"))
    rows = MeasuredRows.of([own, shipped])
    assert (rows.d_model, rows.d_sae) == (2, 3)
    assert read(rows) == [(["bb", "ccc"], [2, 3]), (["a"], [1]), (["dddd"], [4])]


def test_rows_that_are_to_be_left_out_are_not_read(place: Location) -> None:
    table = Table(place, ["vector_id"])
    table.write(measured("a", "bb", "ccc"))
    rows = MeasuredRows.of([table], leave_out={"bb", "other"})
    assert read(rows) == [(["a", "ccc"], [1, 3])]
    assert len(rows) == 2


def test_of_rows_that_compaction_put_into_one_shard_the_newest_is_fitted(place: Location) -> None:
    table = Table(place, ["vector_id"])
    table.write(measured("a", "b", value=1))
    table.write(measured("a", "c", value=2))
    table.compact()
    assert read(MeasuredRows.of([table])) == [(["b", "a", "c"], [1, 2, 2])]


def test_only_row_groups_with_wanted_rows_are_read(place: Location) -> None:
    table = Table(place, ["vector_id"])
    table.write(measured(*(f"v{i}" for i in range(600))))  # row groups of 256
    newer = Table(place / "newer", ["vector_id"])
    newer.write(measured(*(f"v{i}" for i in range(300))))
    first, second = MeasuredRows.of([newer, table]).parts
    assert [len(rows) for rows in first.tables()] == [256, 44]
    assert [len(rows) for rows in second.tables()] == [212, 88]


@pytest.mark.parametrize(("d_model", "d_sae"), [(2, 5), (4, 3)])
def test_shards_of_different_shapes_are_named_before_anything_is_fitted(place: Location, d_model: int, d_sae: int) -> None:
    table = Table(place, ["vector_id"])
    table.write(measured("a"))
    table.write(measured("b", d_model=d_model, d_sae=d_sae))
    older, newer = (shard.name for shard in table.shards())
    expected = f"{older} holds vectors of d_model 2 and effects of d_sae 3, .*{newer} .* d_model {d_model} .* d_sae {d_sae}; move"
    with pytest.raises(InputError, match=expected):
        MeasuredRows.of([table])


def test_a_folder_without_effects_says_what_to_do_first(place: Location) -> None:
    with pytest.raises(InputError, match="run `saets effects` first"):
        MeasuredRows.of([Table(place, ["vector_id"])])
