"""Products and solutions with M M' [d_model, d_model], in float64, by blocks of features."""

from __future__ import annotations

import torch
from torch import Tensor

from saets.shapes import Float

BLOCK = 4096
"""Features multiplied at once."""


def gram(M: Float[Tensor, "d_model d_sae"], weights: Float[Tensor, " d_sae"] | None = None) -> Float[Tensor, "d_model d_model"]:
    """M diag(weights) M', or M M'."""
    total = M.new_zeros(len(M), len(M), dtype=torch.float64)
    for start in range(0, M.shape[1], BLOCK):
        block = M[:, start : start + BLOCK].double()
        total += (block if weights is None else block * weights[start : start + BLOCK].double()) @ block.T
    return total


def solve(
    matrix: Float[Tensor, "d_model d_model"], wanted: Float[Tensor, " d_model"], penalty: float = 0.0
) -> Float[Tensor, " d_model"]:
    """(matrix + penalty x mean eigenvalue x I)^-1 wanted, for a Gram matrix of float32 numbers.

    Where the penalty is 0, directions that such numbers cannot tell from unseen ones are left out, as a pseudoinverse does.
    """
    values, basis = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    shifted = values + penalty * values.mean()
    least = (len(matrix) * torch.finfo(torch.float32).eps) ** 2 * values.max() if penalty == 0 else 0.0
    return basis @ torch.where(shifted > least, basis.T @ wanted / shifted, 0.0)
