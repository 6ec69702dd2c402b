"""Strengths from pairwise battles with ties and an effect of the order in which texts are shown.

Davidson's model (1970), with the order effect of Davidson and Beaver (1977). Where text i is shown first and text j second,

    first : second : tie  =  exp(s_i + o/2) : exp(s_j - o/2) : exp((s_i + s_j)/2 + t)

with strengths s of mean 0, order effect o (0: none) and t, how readily the judge calls a tie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PRIOR = 3.0
"""Standard deviation of a normal prior on every parameter: so weak that tens of battles outweigh it, and a method that wins each
of its battles has a finite strength."""

STEPS = 50
_LONGEST = 2.0
"""No parameter moves further in one step."""


class Strengths(NamedTuple):
    """Parameters, each of shape [...] or [..., methods]."""

    strengths: NDArray[np.float64]
    """In log odds, mean 0: without ties a method beats another with odds exp(difference)."""
    order: NDArray[np.float64]
    """Log odds that the first of two equal texts is preferred to the second."""
    tie: NDArray[np.float64]


def fit_strengths(counts: NDArray[np.float64]) -> Strengths:
    """The most probable parameters, by Newton's method; many tables are fitted at once.

    `counts` [..., methods, methods, 3] says how often the row's text, shown first, won against the column's, lost, and tied.
    """
    methods = counts.shape[-2]
    pairs = ~np.eye(methods, dtype=bool)
    seen = counts[..., pairs, :].reshape(-1, methods * (methods - 1), 3)
    design = _design(methods)[pairs]
    totals = seen.sum(axis=-1)
    found = np.zeros((len(seen), design.shape[-1]))
    squares = np.einsum("ckp,ckq->ckpq", design, design).reshape(-1, design.shape[-1] ** 2)
    for _ in range(STEPS):
        logits = np.einsum("ckp,rp->rck", design, found)
        chance = np.exp(logits - logits.max(axis=-1, keepdims=True))
        chance /= chance.sum(axis=-1, keepdims=True)
        expected = totals[..., None] * chance
        gradient = np.einsum("rck,ckp->rp", seen - expected, design) - found / PRIOR**2
        means = np.einsum("rck,ckp->rcp", chance, design)
        curvature = (expected.reshape(len(seen), -1) @ squares).reshape(-1, *design.shape[-1:] * 2)
        curvature -= np.swapaxes(means * totals[..., None], -1, -2) @ means
        curvature += np.eye(design.shape[-1]) / PRIOR**2
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0].clip(-_LONGEST, _LONGEST)
        found += step
        if np.abs(step).max() < 1e-8:
            break
    parameters = found.reshape(*counts.shape[:-3], -1)
    return Strengths(parameters[..., :methods], parameters[..., methods], parameters[..., methods + 1])


def _design(methods: int) -> NDArray[np.float64]:
    """What each parameter adds to the logits of first, second and tie, [methods, methods, 3, methods + 2]."""
    design = np.zeros((methods, methods, 3, methods + 2))
    for i in range(methods):
        design[i, :, 0, i] += 1
        design[:, i, 1, i] += 1
        design[i, :, 2, i] += 0.5
        design[:, i, 2, i] += 0.5
    design[..., 0, methods], design[..., 1, methods] = 0.5, -0.5
    design[..., 2, methods + 1] = 1
    return design
