"""The approximator of a run: the one that was fitted, or one made in this process of effects that come with the experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.fit.approximator import EffectApproximator, Moments, RidgePath, choose_penalty, ridge
from saets.fit.held_out import HeldOutScores, is_held_out
from saets.run_folder.measured import MeasuredRows, RowBatch
from saets.run_folder.shipped import Sums, shipped_effects, summed_rows
from saets.run_folder.store import RunFolder


@dataclass(frozen=True)
class Fitted:
    """An approximator and what is known of its fit."""

    approximator: EffectApproximator
    report: Mapping[str, Any]
    """What `fit.json` says of it; empty where that is not known."""
    here: str | None = None
    """To what it was fitted in this process; None where it was read."""


@dataclass(frozen=True)
class KnownRows:
    """The measured rows that a fit of a run reads."""

    rows: MeasuredRows
    sums: Sums | None

    @classmethod
    def of(cls, run: RunFolder, shipped: RunFolder | None) -> KnownRows:
        """The run's and the shipped ones, as `saets fit` takes them. Raises `InputError`: see `MeasuredRows.of`."""
        sums = summed_rows(shipped) if shipped else None
        tables = [run.effects, *([shipped.effects] if shipped else [])]
        return cls(MeasuredRows.of(tables, leave_out=sums.vector_ids if sums else ()), sums)

    def __len__(self) -> int:
        return len(self.rows) + (len(self.sums.vector_ids) if self.sums else 0)


def fitted(run: RunFolder, experiment: Experiment) -> Fitted:
    """The run's approximator, or what `saets fit` would make of the shipped effects and the run's own.

    Nothing is written. Only the exact fit is made here, and only where effects come with the experiment.

    Raises:
        InputError: no approximator and no effects to make one of (says how to get one); see `shipped_effects`.
    """
    settings = experiment.fit
    if run.approximator.is_file() or settings.solver != "ridge" or settings.capped_weight != 1:
        approximator = EffectApproximator.load(run.approximator)
        return Fitted(approximator, approximator.provenance.get("fit", {}))
    shipped = shipped_effects(experiment, run.manifest().get("effects", {}).get("worker"))
    if shipped is None:
        raise InputError(
            f"no approximator at {run.approximator}, and no measured effects come with {experiment.name}; run `saets effects` "
            "and `saets fit` first, or `saets pull` where the experiment names a published one"
        )
    return _fit(KnownRows.of(run, shipped), experiment, len(run.effects.ids()))


def _fit(known: KnownRows, experiment: Experiment, own: int) -> Fitted:
    """Ridge at the penalty of least held-out error, from one pass over the rows; those held out are kept in memory."""
    settings = experiment.fit
    train, held_out = (Moments(known.rows.d_model, known.rows.d_sae) for _ in range(2))
    if known.sums:
        train += known.sums.moments
    scored: list[RowBatch] = []
    for batch in known.rows.batches():
        out = torch.from_numpy(is_held_out(batch.vector_ids, experiment.seed, settings.held_out))
        train.add(batch.vectors[~out], batch.effects[~out])
        held_out.add(batch.vectors[out], batch.effects[out])
        scored.append(batch.some(out))
    counts = int(train.rows.item()), int(held_out.rows.item())
    if counts[0] < 2 or counts[1] < 1:
        raise InputError(f"{counts[0]} rows to fit and {counts[1]} held out; run `saets effects` and `saets fit` first")
    penalty, errors = choose_penalty(RidgePath(train), held_out, settings.penalties)
    alone = ridge(train, penalty)
    scores = HeldOutScores(train.y / train.n, held_out.y / held_out.n)
    for batch in scored:
        one = torch.ones(len(batch.vectors))
        scores.add(alone, batch.vectors, batch.effects.float(), batch.standard_errors, one)
    train += held_out
    report = {
        "solver": "ridge",
        "rows_train": counts[0],
        "rows_held_out": counts[1],
        "penalty": penalty,
        "held_out_mse_by_penalty": errors,
        "held_out": scores.report(),
        "rows_shipped": sum(counts) - own,
    }
    approximator = replace(ridge(train, penalty), feature_r2=scores.feature_r2().float())
    come_with = f"{sum(counts) - own:,} measured vectors that come with {experiment.name}"
    return Fitted(approximator, report, f"{come_with} and {own:,} of its own" if own else come_with)
