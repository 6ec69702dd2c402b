"""Which of many directions point the same way: cosines by blocks, of which the largest are kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saets.engine.machine import cpu_has_bfloat16
from saets.explorer.strongest import Lists
from saets.shapes import Float
from saets.terminal.progress import Advance

BLOCK = 512
"""Directions compared with all others at once: a block of cosines takes 100 MB where there are 50,000."""


def neighbours(directions: Float[Tensor, "things dims"], top: int, advance: Advance) -> Lists:
    """Of each direction the `top` others with the largest cosine, or as many as there are; one of length zero has none."""
    unit = unit_rows(directions)
    silent = ~unit.any(1)
    parts = []
    for start in range(0, len(unit), BLOCK):
        cosines = (unit[start : start + BLOCK] @ unit.T).float()
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = float("-inf")
        cosines[:, silent] = float("-inf")
        value, index = cosines.topk(min(top, len(unit) - 1), dim=1)
        none = value.isinf() | silent[start : start + BLOCK, None]
        parts.append(Lists(index.masked_fill(none, 0), value.masked_fill(none, float("nan"))))
        advance(len(cosines))
    return Lists.stacked(parts)


def unit_rows(directions: Float[Tensor, "things dims"]) -> Float[Tensor, "things dims"]:
    """Rows of unit length, in bfloat16 where the CPU multiplies it: cosines err by less than 0.01, and come sooner."""
    made = torch.empty(directions.shape, dtype=torch.bfloat16 if cpu_has_bfloat16() else torch.float32)
    for start in range(0, len(made), BLOCK):
        made[start : start + BLOCK] = normalize(directions[start : start + BLOCK].float(), dim=-1)
    return made
