"""The strongest of many numbers, kept while the rest goes by: of each row of a table, and of each column."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saets.shapes import Float, Int


class Lists(NamedTuple):
    """For each of many things what is strongest, strongest first; unused places hold 0 and NaN."""

    which: Int[Tensor, "things top"]
    value: Float[Tensor, "things top"]
    error: Float[Tensor, "things top"] | None = None
    """Standard errors of the values, NaN where one is not known; None where none is."""

    @classmethod
    def empty(cls, things: int, top: int, *, errors: bool = False) -> Lists:
        """Nothing kept yet."""
        nothing = torch.full((things, top), float("nan"))
        return cls(torch.zeros(things, top, dtype=torch.long), nothing, nothing.clone() if errors else None)

    def joined(self, other: Lists) -> Lists:
        """Of each thing the strongest in either, by size; of equal ones those of this."""
        which, value = torch.cat([self.which, other.which], 1), torch.cat([self.value, other.value], 1)
        errors = None
        if self.error is not None or other.error is not None:
            errors = torch.cat([_errors(self), _errors(other)], 1)
        return Lists(which, value, errors).sorted(self.value.shape[1])

    def sorted(self, top: int) -> Lists:
        """The `top` strongest of each thing in order."""
        sizes = self.value.abs().nan_to_num(nan=-1.0)
        order = sizes.sort(dim=1, descending=True, stable=True).indices[:, :top]
        index, value = self.which.gather(1, order), self.value.gather(1, order)
        return Lists(index, value, None if self.error is None else self.error.gather(1, order))

    @staticmethod
    def stacked(parts: list[Lists]) -> Lists:
        """The lists of several groups of things, one group after the other."""
        errors = None if all(part.error is None for part in parts) else torch.cat([_errors(part) for part in parts])
        return Lists(torch.cat([part.which for part in parts]), torch.cat([part.value for part in parts]), errors)


def _errors(lists: Lists) -> Tensor:
    return torch.full_like(lists.value, float("nan")) if lists.error is None else lists.error


def of_rows(values: Float[Tensor, "things others"], top: int, errors: Float[Tensor, "things others"] | None = None) -> Lists:
    """Of each row the `top` largest in size, or as many as there are."""
    index = values.abs().nan_to_num(nan=-1.0).topk(min(top, values.shape[1]), dim=1).indices
    return Lists(index, values.gather(1, index), None if errors is None else errors.gather(1, index))


def of_columns(
    values: Float[Tensor, "others things"], start: int, top: int, errors: Float[Tensor, "others things"] | None = None
) -> Lists:
    """Of each column the same; the rows are numbered from `start`."""
    found = of_rows(values.T, top, None if errors is None else errors.T)
    return found._replace(which=found.which + start)
