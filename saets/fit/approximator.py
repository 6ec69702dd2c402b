"""The linear map from unit steering vectors to feature effects: y ~ x M + b (paper, section 4).

Ridge regression with an unpenalised b, from sums that one pass over the rows collects and that add up over workers. One
eigendecomposition of the centred Gram matrix gives every penalty, and the held-out error of every penalty (method, section 2).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saets.errors import InputError
from saets.files.storage import Where
from saets.files.tensors import read_tensors, write_tensors
from saets.shapes import Bool, Float

BLOCK = 1024
"""Features worked on at once: 29 MB of float64 where d_model is 3,584. More than 32 MB Linux hands out anew each time, zeroed."""

SUMS = ("rows", "n", "x", "y", "xx", "xy", "yy")
"""Names of the sums of `Moments`."""

TRIANGLE_BLOCK = 512
"""Columns of a symmetric product made at once."""

UNSEEN = torch.finfo(torch.float32).eps
"""Directions whose share of the largest eigenvalue is no larger count as unseen, and M has nothing there.

X'Y is rounded as float32 products are, and is divided by eigenvalue plus penalty: below here rounding would be all that is left.
"""

CHOLESKY_PENALTY = 1e-3
"""Penalties from here on need no such care: unseen directions get 1e-7 / penalty of M, less than float16 rounds effects by."""


@dataclass(frozen=True)
class EffectApproximator:
    """Predicts the effect of any unit vector on every feature."""

    M: Float[Tensor, "d_model d_sae"]
    b: Float[Tensor, " d_sae"]
    provenance: dict[str, Any] = field(default_factory=dict)
    feature_r2: Float[Tensor, " d_sae"] | None = None
    """How well each feature's effect is predicted for held-out vectors, NaN where it never changes; None where nobody knows."""

    def predict(self, directions: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Predicted effects of vectors, which are normalised to unit length first (paper, section 4)."""
        return torch.nn.functional.normalize(directions.float(), dim=-1) @ self.M + self.b

    def save(self, path: Where) -> None:
        """Write M, b, the R2 of features and the provenance as safetensors, whole, to a local path or a URI."""
        header = {"format": "saets-approximator", "provenance": json.dumps(self.provenance, sort_keys=True)}
        known = {} if self.feature_r2 is None else {"feature_r2": self.feature_r2}
        write_tensors(path, {"M": self.M, "b": self.b, **known}, header)

    @classmethod
    def load(cls, path: Where) -> EffectApproximator:
        """Read a file written by `save`.

        Raises:
            InputError: missing or damaged file, wrong keys or shapes.
        """
        tensors, header = read_tensors(
            path, f"no approximator at {path}; run `saets fit` first, or `saets pull` where the experiment names a published one"
        )
        of_features = {name: tensor.shape for name, tensor in tensors.items() if name != "M"}
        if "M" not in tensors or "b" not in tensors or set(of_features.values()) != {tensors["M"].shape[1:]}:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise InputError(f"{path} holds {shapes}; expected M [d_model, d_sae] and b [d_sae]")
        return cls(tensors["M"], tensors["b"], json.loads(header.get("provenance", "{}")), tensors.get("feature_r2"))


class Moments:
    """Sums over rows that determine the fit: N, X'1, Y'1, X'X, X'Y and ||Y||^2, in float64, and how many rows they are.

    A row of weight w counts as w rows would, and N is the sum of the weights. Adding up the tensors of two `Moments` gives the
    moments of both sets of rows, so workers need only an all-reduce. X'Y takes 8 d_model d_sae bytes and is nowhere copied:
    all work goes by blocks of `block` features, of 8 d_model block bytes each. Each `add` reads and writes all of it, which a
    thousand rows or more at a time make up for.
    """

    def __init__(self, d_model: int, d_sae: int, device: torch.device | str = "cpu", *, block: int = BLOCK) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.rows, self.n, self.x, self.y = zeros(1), zeros(1), zeros(d_model), zeros(d_sae)
        self.xx, self.xy, self.yy = zeros(d_model, d_model), zeros(d_model, d_sae), zeros(1)
        self._block = block

    def save(self, path: Where) -> None:
        """Write the sums as safetensors, in float32, whole, to a local path or a URI."""
        sums = {name: tensor.float() for name, tensor in zip(SUMS, self.tensors(), strict=True)}
        write_tensors(path, sums, {"format": "saets-moments"})

    @classmethod
    def load(cls, path: Where) -> Moments:
        """Read a file written by `save`.

        Raises:
            InputError: missing or damaged file, wrong keys or shapes.
        """
        found, _ = read_tensors(path, f"no moments at {path}; the folder of measured effects is incomplete")
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        sizes = shapes.get("xy", ())
        loaded = cls(sizes[0], sizes[1]) if len(sizes) == 2 else None
        if loaded is None or shapes != {name: tuple(sums.shape) for name, sums in zip(SUMS, loaded.tensors(), strict=True)}:
            raise InputError(
                f"{path} holds {shapes}; expected {', '.join(SUMS)} of d_model and d_sae as `Moments.save` writes them"
            )
        for name, sums in zip(SUMS, loaded.tensors(), strict=True):
            sums.copy_(found[name])
        return loaded

    def tensors(self) -> list[Tensor]:
        """The sums themselves, to be added up in place; `SUMS` names them."""
        return [self.rows, self.n, self.x, self.y, self.xx, self.xy, self.yy]

    def blocks(self) -> Iterator[slice]:
        """Features, a block after the other."""
        for start in range(0, self.y.numel(), self._block):
            yield slice(start, start + self._block)

    def add(
        self,
        vectors: Float[Tensor, "rows d_model"],
        effects: Float[Tensor, "rows d_sae"],
        weights: Float[Tensor, " rows"] | None = None,
    ) -> None:
        """Take rows, with weights of at least 0; vectors are normalised to unit length (paper, section 4).

        Rows of weight 0 are left out. X'Y of these rows is a float32 product unless the effects are float64: its rounding is far
        below that of float16. X'X, which decides how much rounding matters, is float64 throughout.

        Raises:
            InputError: NaN or infinity in the rows.
        """
        bad = int((~finite_rows(vectors, effects)).sum())
        if bad:
            raise InputError(f"{bad} of {len(effects)} rows to fit hold NaN or infinity; measure those vectors again")
        x = torch.nn.functional.normalize(vectors.double(), dim=-1)
        weight = torch.ones_like(x[:, 0]) if weights is None else weights.double()
        weighted = weight[:, None] * x
        self.rows += (weight > 0).sum()
        self.n += weight.sum()
        self.x += weighted.sum(0)
        _add_symmetric(self.xx, weighted.T, x)
        precision = torch.promote_types(effects.dtype, torch.float32)
        left, weight_left = weighted.T.to(precision), weight.to(precision)
        for features in self.blocks():
            y = effects[:, features].to(precision)
            self.y[features] += weight_left @ y
            self.xy[:, features] += (left @ y).double()
            self.yy += weight @ torch.linalg.vector_norm(y, dim=1).double().square()

    def __iadd__(self, other: Moments) -> Moments:
        for mine, others in zip(self.tensors(), other.tensors(), strict=True):
            mine += others
        return self

    def gram(self, x_mean: Float[Tensor, " d_model"]) -> Float[Tensor, "d_model d_model"]:
        """X'X of these rows about the given mean."""
        return self.xx - torch.outer(self.x, x_mean) - torch.outer(x_mean, self.x) + self.n * torch.outer(x_mean, x_mean)

    def cross(
        self, x_mean: Float[Tensor, " d_model"], y_mean: Float[Tensor, " d_sae"], features: slice
    ) -> Float[Tensor, "d_model block"]:
        """X'Y of these rows about the given means, for some features."""
        left = torch.stack([self.x - self.n * x_mean, x_mean], 1)
        return torch.addmm(self.xy[:, features], left, torch.stack([y_mean[features], self.y[features]]), alpha=-1)

    def energy(self, y_mean: Float[Tensor, " d_sae"]) -> Float[Tensor, " 1"]:
        """||Y||^2 of these rows about the given mean."""
        return self.yy - 2 * self.y @ y_mean + self.n * y_mean @ y_mean


def finite_rows(vectors: Float[Tensor, "rows d_model"], effects: Float[Tensor, "rows d_sae"]) -> Bool[Tensor, " rows"]:
    """Which rows hold neither NaN nor infinity, by their largest and smallest numbers: a tenth of the time of looking at all."""
    extremes = [extreme for part in (vectors, effects) for extreme in (part.amax(1), part.amin(1))]
    return torch.stack([extreme.isfinite() for extreme in extremes]).all(0)


def _add_symmetric(total: Float[Tensor, "d d"], left: Float[Tensor, "d n"], right: Float[Tensor, "n d"]) -> None:
    """Add left @ right, which is symmetric, in place; what is far below the diagonal is copied, not computed."""
    for start in range(0, len(total), TRIANGLE_BLOCK):
        end = start + TRIANGLE_BLOCK
        part = left[:end] @ right[:, start:end]
        total[:end, start:end] += part
        total[start:end, :start] += part[:start].T


class RidgePath:
    """All penalties of one training set, from one eigendecomposition.

    It reads X'Y of `train` again for each fit, so it holds only as long as those sums are left as they are.

    Raises:
        InputError: fewer than two rows.
    """

    def __init__(self, train: Moments) -> None:
        if train.rows.item() < 2:
            raise InputError(f"{int(train.rows.item())} rows to fit; at least 2 are needed: measure more vectors")
        self._train = train
        self.x_mean, self.y_mean = train.x / train.n, train.y / train.n
        self.eigenvalues, self._basis = torch.linalg.eigh(train.gram(self.x_mean))
        self.eigenvalues = self.eigenvalues.clamp(min=0)
        self.unit = self.eigenvalues.mean()
        """A penalty of 1 is this much."""

    def _weights(self, penalty: float) -> Tensor:
        seen = self.eigenvalues > UNSEEN * self.eigenvalues.max()
        return torch.where(seen, 1 / (self.eigenvalues + penalty * self.unit), 0)

    def fit(self, penalty: float, **provenance: Any) -> EffectApproximator:
        """The approximator at one penalty; 0 is the least-squares solution of least norm."""
        weights = self._weights(penalty)[:, None]
        return _solved(self._train, lambda cross: self._basis @ (self._basis.T @ cross).mul_(weights), provenance)

    def held_out_errors(self, held_out: Moments, penalties: Iterable[float]) -> list[float]:
        """Squared error over the held-out rows and all features at each penalty, O(d^2) each after one pass over X'Y.

        With C and Cv the X'Y of the training and of the held-out rows, CC' and CCv' are summed over features before they are
        turned into the basis of eigenvectors: once, not for each block.
        """
        outer, mixed = torch.zeros_like(self._basis), torch.zeros_like(self._basis)
        for features in self._train.blocks():
            C, Cv = (rows.cross(self.x_mean, self.y_mean, features) for rows in (self._train, held_out))
            _add_symmetric(outer, C, C.T)
            mixed.addmm_(C, Cv.T)
        a = (self._basis * (mixed @ self._basis)).sum(0)
        curvature = self._turned(held_out.gram(self.x_mean)) * self._turned(outer)
        energy = held_out.energy(self.y_mean)
        errors = []
        for penalty in penalties:
            w = self._weights(penalty)
            errors.append((energy - 2 * w @ a + w @ curvature @ w).item())
        return errors

    def _turned(self, matrix: Float[Tensor, "d_model d_model"]) -> Float[Tensor, "d_model d_model"]:
        """In the basis of eigenvectors."""
        return self._basis.T @ matrix @ self._basis


def ridge(rows: Moments, penalty: float) -> EffectApproximator:
    """The approximator at one penalty alone, as `RidgePath(rows).fit` gives it; by Cholesky, half the work, where that will do.

    Raises:
        InputError: fewer than two rows.
    """
    if penalty < CHOLESKY_PENALTY or rows.rows.item() < 2:
        return RidgePath(rows).fit(penalty)
    gram = rows.gram(rows.x / rows.n)
    gram.diagonal().add_(penalty * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    return _solved(rows, lambda cross: torch.cholesky_solve(cross, factor), {})


def _solved(rows: Moments, solve: Callable[[Tensor], Tensor], provenance: dict[str, Any]) -> EffectApproximator:
    """M by blocks of features from X'Y about the rows' means, and the b that goes with it."""
    x_mean, y_mean = rows.x / rows.n, rows.y / rows.n
    M = torch.empty(rows.xy.shape, dtype=torch.float32, device=x_mean.device)
    b = torch.empty(rows.y.shape, dtype=torch.float32, device=x_mean.device)
    for features in rows.blocks():
        exact = solve(rows.cross(x_mean, y_mean, features))
        M[:, features] = exact
        b[features] = (y_mean[features] - x_mean @ exact).float()
    return EffectApproximator(M, b, provenance)


def choose_penalty(path: RidgePath, held_out: Moments, penalties: Sequence[float]) -> tuple[float, dict[str, float]]:
    """The penalty of least held-out error, and the mean squared error of each penalty by its text."""
    errors = path.held_out_errors(held_out, penalties)
    entries = held_out.n.item() * held_out.y.numel()
    best = min(range(len(penalties)), key=errors.__getitem__)
    return penalties[best], {f"{p:.6g}": e / entries for p, e in zip(penalties, errors, strict=True)}
