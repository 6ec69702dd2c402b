"""The trade between a target's effect and what happens to all other features, solved exactly.

Over unit x, maximise m'x - gamma/2 (M'x + b)' D (M'x + b), where m = M t, and D is a diagonal matrix of how much each feature
should stay as it is. With K = M D M' and q = M D b the maximum is

    x = (gamma K + mu I)^-1 (m - gamma q),

mu the one number above -gamma times K's least eigenvalue for which ||x|| = 1. It is the global optimum: a trust-region
problem of a concave objective on the sphere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saets.fit.approximator import EffectApproximator
from saets.methods.spectrum import gram
from saets.shapes import Float

HALVINGS = 200
"""Of an interval of logarithms, until float64 has no more to give."""

GAMMA_HALVINGS = 60

MOST_GAMMA = 1e6
"""Largest and (inverse) smallest gamma looked at, in units of ||m|| / (mean eigenvalue of K + ||q||)."""


class SideEffects:
    """One target and one D, from one eigendecomposition; each gamma is then O(d_model^2)."""

    def __init__(
        self, approximator: EffectApproximator, target: Float[Tensor, " d_sae"], weights: Float[Tensor, " d_sae"]
    ) -> None:
        """`weights` is the diagonal of D, at least 0."""
        M, b, D = approximator.M, approximator.b.double(), weights.double()
        self._m = M.double() @ target.double()
        self._q = M.double() @ (D * b)
        self._rest = (D * b) @ b
        self._K = gram(M, weights)
        values, self._basis = torch.linalg.eigh(self._K)
        self._values = values.clamp(min=0)

    def gain(self, x: Float[Tensor, " d_model"]) -> float:
        """m'x: how much of the target a unit x is predicted to give, beside b."""
        return (self._m @ x.double()).item()

    def cost(self, x: Float[Tensor, " d_model"]) -> float:
        """(M'x + b)' D (M'x + b): what it is predicted to do to all that should stay still."""
        x = x.double()
        return (x @ self._K @ x + 2 * self._q @ x + self._rest).item()

    def best(self, gamma: float) -> Float[Tensor, " d_model"]:
        """The optimum, of unit length; at 0 it is u(m)."""
        wanted = self._basis.T @ (self._m - gamma * self._q)
        above = gamma * (self._values - self._values[0])
        high = torch.linalg.vector_norm(wanted)
        if high == 0:
            return torch.zeros_like(self._m)
        low = high * torch.finfo(torch.float64).eps
        if _length(wanted, above, low) < 1:
            return self._basis @ _filled(wanted, above, low)
        bounds = low.log(), high.log()
        for _ in range(HALVINGS):
            middle = (bounds[0] + bounds[1]) / 2
            bounds = (middle, bounds[1]) if _length(wanted, above, middle.exp()) > 1 else (bounds[0], middle)
        x = wanted / (above + bounds[1].exp())
        return self._basis @ (x / torch.linalg.vector_norm(x))

    def largest_gamma(self, gain: float) -> float:
        """The largest gamma, up to a cap, whose optimum has at least this gain; 0 where none has. The gain falls with gamma."""
        size, against = torch.linalg.vector_norm(self._m).item(), (self._values.mean() + torch.linalg.vector_norm(self._q)).item()
        if size == 0 or against == 0:
            return 0.0
        low, high = (math.log(size / against * bound) for bound in (1 / MOST_GAMMA, MOST_GAMMA))

        def enough(logarithm: float) -> bool:
            return self.gain(self.best(math.exp(logarithm))) >= gain

        if not enough(low):
            return 0.0
        if enough(high):
            return math.exp(high)
        for _ in range(GAMMA_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if enough(middle) else (low, middle)
        return math.exp(low)


def _length(wanted: Tensor, above: Tensor, shift: Tensor) -> Tensor:
    return torch.linalg.vector_norm(wanted / (above + shift))


def _filled(wanted: Tensor, above: Tensor, shift: Tensor) -> Tensor:
    """Where `wanted` has nothing along the least eigenvalue, no mu gives unit length: what is missing lies along it."""
    x = torch.where(above > shift, wanted / (above + shift), 0.0)
    x[0] = (1 - x @ x).clamp(min=0).sqrt()
    return x / torch.linalg.vector_norm(x)
