"""Which rows a fit leaves out, and how well it predicts them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saets.fit.approximator import EffectApproximator
from saets.shapes import Float


def is_held_out(vector_ids: Sequence[str], seed: int, share: float) -> np.ndarray:
    """Which rows are held out: a pure function of seed and vector_id, True for about `share` of them."""

    def draw(vector_id: str) -> float:
        digest = hashlib.blake2b(f"{seed}:{vector_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") / 2**64

    return np.array([draw(vector_id) < share for vector_id in vector_ids], dtype=bool)


class HeldOutScores:
    """Sums over the held-out rows that tell how a fit to the training rows predicts them.

    Every worker scores its own rows; adding up `tensors()` over workers gives the scores of all.
    """

    def __init__(self, mean_effect: Float[Tensor, " d_sae"], held_out_mean: Float[Tensor, " d_sae"]) -> None:
        """`mean_effect` is that of all training rows, `held_out_mean` that of all rows held out, both in float64."""
        self._mean, self._own_mean = mean_effect, held_out_mean
        self._sums = mean_effect.new_zeros(4)  # weights; cosines of the fit, of the mean effect; squared standard errors
        self._features = mean_effect.new_zeros(4, len(mean_effect))  # squares: errors, about both means, about zero

    def tensors(self) -> list[Tensor]:
        """The sums themselves, to be added up in place."""
        return [self._sums, self._features]

    def add(
        self,
        approximator: EffectApproximator,
        vectors: Float[Tensor, "rows d_model"],
        effects: Float[Tensor, "rows d_sae"],
        standard_errors: Float[Tensor, " rows"],
        weights: Float[Tensor, " rows"],
    ) -> None:
        """Score rows, each as often as its weight says.

        A standard error is the root mean square over features of one row's, NaN where it is not known.
        """
        predicted = approximator.predict(vectors)
        cosine, weight = torch.nn.functional.cosine_similarity, weights.double()
        self._sums[0] += weight.sum()
        self._sums[1] += weight @ cosine(predicted, effects, dim=-1).double()
        self._sums[2] += weight @ cosine(self._mean.float()[None], effects, dim=-1).double()
        self._sums[3] += weight @ standard_errors.double().square()
        means = (self._mean.float(), self._own_mean.float())
        for i, difference in enumerate((predicted - effects, *(effects - mean for mean in means), effects)):
            self._features[i] += weights.float() @ difference.square()

    def report(self) -> dict[str, Any]:
        """Figures of the fit beside those of two trivial predictors, and what the measurement's noise leaves.

        `r2` is against the training rows' mean effect. `mse_noise` is the mean squared standard error: what a perfect map would
        still miss; `noise_share` is its part of `mse`, and `r2_ceiling` the R2 that it allows. All three are estimates, and None
        where standard errors are not known. The one baseline of all rows has noise too, which b takes up: `mse_noise` is a little
        too large, `r2_ceiling` a little too low. `feature_r2` sums up the R2 of each feature that varies among the held-out rows.
        """
        n, cosine, cosine_mean_effect, variance = self._sums.tolist()
        mse, mean_effect, _, zero = (self._features.mean(1) / n).tolist()
        noise = variance / n
        return {
            "mse": mse,
            "r2": 1 - mse / mean_effect if mean_effect else None,
            "cosine": cosine / n,
            "mse_mean_effect": mean_effect,
            "cosine_mean_effect": cosine_mean_effect / n,
            "mse_zero": zero,
            "mse_noise": noise if math.isfinite(noise) else None,
            "noise_share": noise / mse if math.isfinite(noise) and mse else None,
            "r2_ceiling": 1 - noise / mean_effect if math.isfinite(noise) and mean_effect else None,
            "feature_r2": self._quartiles(),
        }

    def feature_r2(self) -> Float[Tensor, " d_sae"]:
        """R2 of each feature, against the training rows' mean effect; NaN where it does not vary among the held-out rows."""
        errors, around_mean, around_own, squares = self._features
        return torch.where(around_own > 1e-12 * squares, 1 - errors / around_mean, torch.nan)

    def _quartiles(self) -> dict[str, Any]:
        found = self.feature_r2()
        found = found[~found.isnan()]
        if not len(found):
            return {"features": 0}
        quartiles = torch.quantile(found, found.new_tensor([0.25, 0.5, 0.75])).tolist()
        return {
            "features": len(found),
            **dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles, strict=True)),
            "share_above_half": (found > 0.5).double().mean().item(),
        }
