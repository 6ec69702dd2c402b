"""A fit to measurements as they are, without a run folder, and how well it predicts others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saets.effects.worker import Measurement, effect_of
from saets.fit.approximator import Moments, RidgePath, choose_penalty
from saets.fit.held_out import HeldOutScores
from saets.run_folder.rows import Baseline


def moments_of(rows: Sequence[Measurement], baseline: Baseline) -> Moments:
    """The sums of some rows, capped ones as others."""
    moments = Moments(len(rows[0].item.direction), len(baseline.mean))
    moments.add(*_tensors(rows, baseline))
    return moments


def held_out_report(
    train: Moments, held_out: Sequence[Measurement], baseline: Baseline, penalties: Sequence[float]
) -> dict[str, Any]:
    """How a fit to some rows predicts others, which have this baseline; the penalty is the best on those others."""
    others, path = moments_of(held_out, baseline), RidgePath(train)
    penalty, errors = choose_penalty(path, others, penalties)
    scores = HeldOutScores(train.y / train.n, others.y / others.n)
    errors_of_rows = torch.tensor([(one.error_variance + baseline.error_variance) ** 0.5 for one in held_out])
    scores.add(path.fit(penalty), *_tensors(held_out, baseline), errors_of_rows, torch.ones(len(held_out)))
    return {"penalty": penalty, "mse_by_penalty": errors, **scores.report()}


def _tensors(rows: Iterable[Measurement], baseline: Baseline) -> tuple[Tensor, Tensor]:
    pairs = [(one.item.direction, effect_of(one.mean, baseline.mean)) for one in rows]
    vectors, effects = (np.stack(column) for column in zip(*pairs, strict=True))
    return torch.from_numpy(vectors), torch.from_numpy(effects)
