"""How far outside the vectors of a fit a vector lies, from the sums of those vectors alone."""

from __future__ import annotations

import torch
from torch import Tensor

from saets.fit.approximator import UNSEEN
from saets.shapes import Float


class Leverage:
    """h(x) = 1/n + (x - xm)' (G + penalty g I)^-1 (x - xm), for a ridge fit with b unpenalised.

    n is the sum of the rows' weights, xm their mean vector, G their centred Gram matrix and g its mean eigenvalue, so that
    `penalty` is in the units of `RidgePath`. With noise of variance s on each row, and a prior for M that the penalty stands for,
    h(x) s is the variance of the prediction at x: what the rows left open there.
    """

    def __init__(
        self, n: float, total: Float[Tensor, " d_model"], gram: Float[Tensor, "d_model d_model"], penalty: float
    ) -> None:
        """`total` is X'1 and `gram` X'X, not centred, in float64."""
        self._n, self.mean = n, total / n
        centred = gram - torch.outer(total, self.mean)
        centred.diagonal().add_(max(penalty, UNSEEN) * centred.diagonal().mean())
        self._factor = torch.linalg.cholesky(centred)

    def of(self, directions: Float[Tensor, "rows d_model"]) -> Float[Tensor, " rows"]:
        """h of unit vectors, in float64; for a row of the fit, with itself among the rows."""
        centred = directions.double() - self.mean
        return 1 / self._n + torch.linalg.solve_triangular(self._factor, centred.T, upper=False).square().sum(0)


def left_out(leverage: Float[Tensor, " rows"], weight: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """h of rows of the fit, each as if it had been left out: h / (1 - w h), exactly, at the same absolute penalty."""
    return leverage / (1 - weight * leverage)
