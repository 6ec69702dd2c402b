"""What is kept of a table that goes by in pieces is what sorting the whole would give."""

from __future__ import annotations

import pytest
import torch

from saets.explorer import neighbours as module
from saets.explorer.neighbours import neighbours
from saets.explorer.strongest import Lists, of_columns, of_rows

TABLE = torch.randn(50, 23, generator=torch.Generator().manual_seed(0))
ERRORS = TABLE.abs() / 7


@pytest.mark.parametrize("pieces", [1, 7, 50])
def test_the_strongest_of_each_column_do_not_depend_on_the_pieces_the_rows_come_in(pieces: int) -> None:
    found = Lists.empty(23, 6)
    start = 0
    for values, errors in zip(TABLE.chunk(pieces), ERRORS.chunk(pieces), strict=True):
        found = found.joined(of_columns(values, start, 6, errors))
        start += len(values)
    for column in range(23):
        order = sorted(range(50), key=lambda row: -abs(TABLE[row, column].item()))[:6]
        assert found.which[column].tolist() == order
        assert torch.equal(found.value[column], TABLE[order, column])
        assert found.error is not None
        assert torch.equal(found.error[column], ERRORS[order, column])


def test_the_strongest_of_each_row_are_those_largest_in_size_whatever_their_sign() -> None:
    found = of_rows(TABLE, 4)
    for row in range(50):
        assert found.which[row].tolist() == sorted(range(23), key=lambda column: -abs(TABLE[row, column].item()))[:4]
    assert (found.value < 0).any()
    assert (found.value > 0).any()


def test_a_number_that_is_none_comes_last() -> None:
    values = torch.tensor([[float("nan"), 0.5, -2.0]])
    assert of_rows(values, 2).which.tolist() == [[2, 1]]
    assert of_rows(values, 5).value.isnan().tolist() == [[False, False, True]]


def test_errors_that_one_part_lacks_are_not_known() -> None:
    joined = of_columns(TABLE[:2], 0, 2).joined(of_columns(TABLE[2:4], 2, 2, ERRORS[2:4]))
    assert joined.error is not None
    assert (joined.error.isnan() == (joined.which < 2)).all()


@pytest.mark.parametrize("block", [4, 512])
def test_neighbours_are_the_others_of_the_largest_cosines_by_any_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    seen: list[int] = []
    found = neighbours(TABLE, 5, seen.append)
    assert sum(seen) == 50
    unit = TABLE / TABLE.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    for row in range(50):
        others = cosines[row].clone()
        others[row] = -2
        assert row not in found.which[row].tolist()
        assert found.value[row].tolist() == pytest.approx(others.sort(descending=True).values[:5].tolist(), abs=0.01)
        assert cosines[row, found.which[row]].tolist() == pytest.approx(found.value[row].tolist(), abs=0.01)


def test_a_direction_of_length_zero_has_no_neighbours_and_is_none() -> None:
    directions = TABLE[:6].clone()
    directions[2] = 0
    found = neighbours(directions, 9, lambda _: None)
    assert found.value.shape == (6, 5)
    assert found.value[2].isnan().all()
    assert (found.value.isnan().sum(1)[[0, 1, 3, 4, 5]] == 1).all()
