"""What a steering vector will do, before any text is written: predicted effects, and how much of its target it reaches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
import torch

from saets.effects.one_effect import MeasuredEffect
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.goal import goal_features, load_goal
from saets.fit.approximator import EffectApproximator
from saets.sae import check_features
from saets.shapes import Float
from saets.vector.vector import SteeringVector


class Gain(NamedTuple):
    """What becomes of the target features, weighted and added up: t'y."""

    predicted: float
    best: float
    """The most that the approximator predicts for any unit vector, ||M t|| + t'b, which is that of u(M t)."""


class Agreement(NamedTuple):
    """How the prediction of one vector agrees with its measured effect."""

    r2: float
    """1 - squared error / squared difference of the measured effect from the mean effect, over features."""
    cosine: float


def gain(approximator: EffectApproximator, vector: SteeringVector, target: Mapping[int, float]) -> Gain:
    """The predicted gain of a target."""
    t = target_weights(target, len(approximator.b))
    at_best = (approximator.M @ t).norm() + t @ approximator.b
    return Gain((approximator.predict(vector.direction) @ t).item(), at_best.item())


def agreement(
    predicted: Float[torch.Tensor, " d_sae"], measured: MeasuredEffect, mean: Float[torch.Tensor, " d_sae"]
) -> Agreement:
    """Of a prediction with a measurement; `mean` is what every vector does on average."""
    effect = torch.from_numpy(measured.effect)
    r2 = 1 - (effect - predicted).square().sum() / (effect - mean).square().sum()
    return Agreement(r2.item(), torch.nn.functional.cosine_similarity(predicted, effect, dim=0).item())


def effect_table(
    approximator: EffectApproximator,
    vector: SteeringVector,
    features: Sequence[int],
    top: int,
    measured: MeasuredEffect | None = None,
) -> pl.DataFrame:
    """The features given, then the `top` others whose predicted effect is largest in size.

    Columns: `feature`; `predicted`, x M + b; `common`, the b in it, which every vector has; `feature_r2`, how well the feature is
    predicted for held-out vectors, null where that is not known; with a measurement `measured` and `standard_error`.
    """
    predicted = approximator.predict(vector.direction)
    others = [feature for feature in predicted.abs().argsort(descending=True).tolist() if feature not in set(features)]
    order = [*dict.fromkeys(features), *others[:top]]
    columns: dict[str, Any] = {
        "feature": order,
        "predicted": predicted[order].tolist(),
        "common": approximator.b[order].tolist(),
        "feature_r2": [None if math.isnan(r2) else r2 for r2 in _r2(approximator)[order].tolist()],
    }
    if measured is not None:
        columns |= {"measured": measured.effect[order], "standard_error": measured.standard_error[order]}
    return pl.DataFrame(columns, schema_overrides={"feature_r2": pl.Float64})


def _r2(approximator: EffectApproximator) -> Float[torch.Tensor, " d_sae"]:
    return torch.full_like(approximator.b, torch.nan) if approximator.feature_r2 is None else approximator.feature_r2


def target_weights(target: Mapping[int, float], d_sae: int) -> Float[torch.Tensor, " d_sae"]:
    """Weights as a vector over all features.

    Raises:
        InputError: no features, ids outside the SAE, weights that are all zero or not finite.
    """
    check_features(target, d_sae)
    weights = torch.zeros(d_sae)
    for feature, weight in target.items():
        weights[feature] = weight
    if not weights.any() or not weights.isfinite().all():
        given = ", ".join(f"{feature}: {weight:g}" for feature, weight in target.items()) or "no features"
        raise InputError(f"got {given}; give at least one feature, with a weight that is a number and not zero")
    return weights


def target_of(vector: SteeringVector, experiment: Experiment) -> dict[int, float]:
    """The features that a vector was made for: those it names itself, else those of its goal; empty where neither is known."""
    named: Any = vector.provenance.get("features")
    if isinstance(named, Mapping) and "target" in named:
        named = named["target"]
    if named:
        return {int(feature): float(weight) for feature, weight in (named.items() if isinstance(named, Mapping) else named)}
    goals = {goal.id: goal for goal in map(load_goal, experiment.steering.goals)}
    goal = goals.get(str(vector.provenance.get("goal")))
    try:
        return dict(goal_features(goal, experiment).target) if goal else {}
    except InputError:
        return {}
