"""What stands behind a prediction: where the vector lies among those of the fit, and how vectors left out are predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.fit.approximator import EffectApproximator
from saets.fit.held_out import is_held_out
from saets.fit.leverage import Leverage, left_out
from saets.run_folder.fitted import Fitted, KnownRows
from saets.run_folder.measured import MeasuredRows, RowBatch
from saets.run_folder.shipped import shipped_effects
from saets.run_folder.store import RunFolder
from saets.shapes import Float
from saets.vector.vector import SteeringVector

MOST_SCORED = 400
"""Vectors left out one at a time, where more rows are held out than this."""

SIMILAR = 5
"""A fifth of the vectors left out, those nearest in leverage, count as similar."""


class Reach(NamedTuple):
    """Where a vector lies among those of the fit."""

    leverage: float
    """See `Leverage`; of a vector that is among the rows of the fit, as if it were not."""
    times_median: float
    """Leverage over the median of the vectors left out."""
    share_nearer: float
    """Share of the vectors left out that have less leverage, 0..1."""
    fitted: bool
    """Whether the vector is a row of the fit, so that its own effect is in the prediction."""


class Record(NamedTuple):
    """How predictions held on some vectors, each left out of the fit in its turn."""

    vectors: int
    r2: float
    """1 - squared error / squared difference from the mean effect, over vectors and features."""
    cosine: float
    """Mean over vectors, between predicted and measured effect."""


@dataclass(frozen=True)
class Evidence:
    """The vectors of a fit by their sums, and some of them left out one at a time.

    Leaving out row i of weight w is exact without another fit, at the same absolute penalty: its error is (y_i - prediction) /
    (1 - w h_i), h_i its leverage.
    """

    leverage: Leverage
    mean_effect: Float[Tensor, " d_sae"]
    """Of all rows of the fit."""
    vector_ids: frozenset[str]
    """All rows of the fit."""
    leverages: Float[Tensor, " vectors"]
    """Of the vectors left out, ascending."""
    squares: Float[Tensor, "vectors 2"]
    """Of each the squared error over features, and the squared difference from the mean effect."""
    cosines: Float[Tensor, " vectors"]

    def reach(self, vector: SteeringVector) -> Reach:
        """Where a vector lies."""
        found, fitted = self.leverage.of(vector.direction[None]), vector.id in self.vector_ids
        leverage = (left_out(found, torch.ones(1)) if fitted else found).item()
        nearer = (self.leverages < leverage).double().mean().item()
        return Reach(leverage, leverage / self.leverages.median().item(), nearer, fitted)

    def record(self, near: float | None = None) -> Record:
        """How predictions held: on all vectors left out, or on those whose leverage is nearest."""
        chosen = torch.arange(len(self.leverages))
        if near is not None:
            chosen = (self.leverages.log() - torch.tensor(near).log()).abs().argsort()[: -(-len(chosen) // SIMILAR)]
        error, spread = self.squares[chosen].sum(0).tolist()
        return Record(len(chosen), 1 - error / spread if spread else float("nan"), self.cosines[chosen].mean().item())


def evidence(run: RunFolder, experiment: Experiment, fit: Fitted) -> Evidence:
    """What stands behind a fit, from the rows that it was made of; they are read once.

    Raises:
        InputError: the rows are not known, or no longer those of the fit, or the fit is not the exact one.
    """
    _check_own(fit)
    if fit.report.get("solver") != "ridge":
        raise InputError("the leverage of a vector is known for the exact fit alone (fit.solver = 'ridge')")
    leverage, vector_ids, scored = _exact_fit(_known_rows(run, experiment, fit), experiment, fit.report)
    mean = fit.approximator.M.T @ leverage.mean.float() + fit.approximator.b
    parts = [_scores(batch, fit.approximator, leverage, mean, experiment.fit.capped_weight) for batch in scored]
    leverages, squares, cosines = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = leverages.argsort()
    return Evidence(leverage, mean, vector_ids, leverages[order], squares[order], cosines[order])


def left_out_effects(
    run: RunFolder, experiment: Experiment, fit: Fitted
) -> Iterator[tuple[Float[Tensor, "vectors d_sae"], Float[Tensor, "vectors d_sae"]]]:
    """Predicted and measured effects of vectors that were held out, `MOST_SCORED` at most, some at a time.

    The exact fit is of all rows in the end, so each vector is left out of it in its turn; Adam's never saw them.

    Raises:
        InputError: the rows are not known, or no longer those of the fit.
    """
    _check_own(fit)
    known = _known_rows(run, experiment, fit)
    if fit.report.get("solver") == "ridge":
        leverage, _, held_out = _exact_fit(known, experiment, fit.report)
        for batch in held_out:
            _, _, error = _errors(batch, fit.approximator, leverage, experiment.fit.capped_weight)
            yield batch.effects.float() - error, batch.effects.float()
        return
    for batch in known.rows.batches():
        some = _held_out(batch, experiment, known)
        yield fit.approximator.predict(some.vectors), some.effects.float()


def _check_own(fit: Fitted) -> None:
    if "published" in fit.approximator.provenance:
        raise InputError("the approximator was published without the vectors that it was fitted to")


def _known_rows(run: RunFolder, experiment: Experiment, fit: Fitted) -> KnownRows:
    if "effects_from" in fit.report:
        return KnownRows(MeasuredRows.of([run.published_effects]), None)
    return KnownRows.of(run, shipped_effects(experiment) if fit.report.get("rows_shipped") else None)


def _held_out(batch: RowBatch, experiment: Experiment, known: KnownRows) -> RowBatch:
    share = min(experiment.fit.held_out, MOST_SCORED / len(known))
    return batch.some(torch.from_numpy(is_held_out(batch.vector_ids, experiment.seed, share)))


def _exact_fit(
    known: KnownRows, experiment: Experiment, report: Mapping[str, Any]
) -> tuple[Leverage, frozenset[str], list[RowBatch]]:
    """Sums of the rows, which they are, and those held out; `report` is what is known of the fit."""
    sums = known.sums.moments if known.sums else None
    n, total, gram = (sums.n.item(), sums.x.clone(), sums.xx.clone()) if sums else (0.0, *_zeros(known.rows.d_model))
    rows, ids, scored = (int(sums.rows.item()) if sums else 0), set(known.sums.vector_ids if known.sums else ()), []
    for batch in known.rows.batches():
        weight = torch.where(batch.capped, experiment.fit.capped_weight, 1.0).double()
        x = torch.nn.functional.normalize(batch.vectors.double(), dim=-1)
        n, rows = n + weight.sum().item(), rows + int((weight > 0).sum())
        total += weight @ x
        gram += (weight[:, None] * x).T @ x
        ids |= set(batch.vector_ids)
        scored.append(_held_out(batch, experiment, known))
    if rows != report["rows_train"] + report["rows_held_out"]:
        fitted_rows = report["rows_train"] + report["rows_held_out"]
        raise InputError(
            f"the approximator was fitted to {fitted_rows} vectors and {rows} are measured now; run `saets fit` again"
        )
    return Leverage(n, total, gram, report["penalty"]), frozenset(ids), scored


def _zeros(d_model: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(d_model, dtype=torch.float64), torch.zeros(d_model, d_model, dtype=torch.float64)


def _errors(
    rows: RowBatch, approximator: EffectApproximator, leverage: Leverage, capped_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and leverage of each row, and its measured effect minus the one predicted by the fit without it."""
    weight = torch.where(rows.capped, capped_weight, 1.0).double()
    h = leverage.of(torch.nn.functional.normalize(rows.vectors.double(), dim=-1))
    error = (rows.effects.float() - approximator.predict(rows.vectors)) / (1 - weight * h).float()[:, None]
    return weight, h, error


def _scores(
    rows: RowBatch, approximator: EffectApproximator, leverage: Leverage, mean: Tensor, capped_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Leverage, squares and cosine of each row, left out of the fit."""
    weight, h, error = _errors(rows, approximator, leverage, capped_weight)
    measured = rows.effects.float()
    squares = torch.stack([error.square().sum(1), (measured - mean).square().sum(1)], 1).double()
    return left_out(h, weight), squares, torch.nn.functional.cosine_similarity(measured - error, measured, dim=-1).double()
