"""Stage 3: the steering vector of every goal and method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saets import methods
from saets.approximator import EffectApproximator
from saets.checks import check_goals
from saets.config import settings_hash
from saets.distributed.pool import Call
from saets.errors import InputError
from saets.experiment import model_settings
from saets.goal import Features, Goal, goal_features
from saets.model import model_shape
from saets.sae import load_sae
from saets.stages.provenance import provenance, recommended_scales
from saets.stages.pull import stands_in, use_published
from saets.stages.session import Session
from saets.vector import SteeringVector

Pair = tuple[str, str]
"""(goal id, method id)"""


def build_vectors(session: Session) -> dict[Pair, SteeringVector]:
    """Vectors of every goal and method, in the experiment's order; those whose ingredients did not change are kept.

    Where the run has no approximator and no effects, the one that the experiment names on the hub is fetched. New vectors are
    calibrated: their files say between which scales they are of use.

    Raises:
        InputError: no approximator, features outside the SAE, a direction of length zero, or see `Calibrator`.
    """
    experiment, run = session.experiment, session.run
    goals = {goal.id: goal for goal in check_goals(experiment)}
    if any(methods.needs(method, "approximator") for method in experiment.steering.methods) and stands_in(session):
        use_published(session)
    wanted = {
        (name, method): _inputs(session, goal, method) for name, goal in goals.items() for method in experiment.steering.methods
    }
    kept = {pair: found for pair, inputs in wanted.items() if (found := _kept(session, pair, inputs)) is not None}
    todo = [pair for pair in wanted if pair not in kept]
    if not todo:
        return kept
    contrasted = {name: goals[name] for name, method in todo if methods.needs(method, "positive")}
    contrasts = _contrasts(session, contrasted.values()) if contrasted else {}
    approximator = functools.cache(lambda: EffectApproximator.load(run.approximator))
    W_dec = functools.cache(lambda: load_sae(experiment.sae, model_shape(experiment.model)[0]).W_dec)
    built: dict[Pair, SteeringVector] = {}
    with session.progress.stage("building vectors", len(wanted), len(kept), "vectors") as advance:
        for name, method in todo:
            options = experiment.steering.model_dump(include={"bias_weight"})
            made = methods.build(
                method, Ingredients(goals[name], session, contrasts.get(name, {}), approximator, W_dec), **options
            )
            facts = provenance(session, goals[name], method, options)
            built[name, method] = SteeringVector.from_tensor(made, experiment.hook_name, **facts, inputs=wanted[name, method])
            advance(1)
    for (pair, vector), scales in zip(built.items(), recommended_scales(session, list(built.values())), strict=True):
        built[pair] = replace(vector, provenance={**vector.provenance, "scales": scales})
        built[pair].save(run.vector(*pair))
    vectors = {pair: built.get(pair) or kept[pair] for pair in wanted}
    run.update_stage("vectors", {f"{goal}--{method}": vector.id for (goal, method), vector in vectors.items()})
    return vectors


def read_vectors(session: Session) -> dict[Pair, SteeringVector]:
    """The vectors that `build_vectors` wrote.

    Raises:
        InputError: some are missing.
    """
    steering = session.experiment.steering
    return {
        (goal.id, method): SteeringVector.load(session.run.vector(goal.id, method))
        for goal in check_goals(session.experiment)
        for method in steering.methods
    }


@dataclass(frozen=True)
class Ingredients:
    """What a method may name as a parameter, for one goal; read only when it does."""

    goal: Goal
    session: Session
    contrast: dict[str, Any]
    load_approximator: Callable[[], EffectApproximator]
    load_decoder: Callable[[], Tensor]

    @property
    def positive(self) -> Tensor:
        return torch.from_numpy(self.contrast["positive"])

    @property
    def negative(self) -> Tensor:
        return torch.from_numpy(self.contrast["negative"])

    @property
    def approximator(self) -> EffectApproximator:
        return self.load_approximator()

    @property
    def W_dec(self) -> Tensor:
        return self.load_decoder()

    @property
    def target(self) -> Tensor:
        """Weights of the features that should rise, [d_sae]."""
        return self._weights(goal_features(self.goal, self.session.experiment).target, len(self.approximator.b))

    @property
    def decoder_target(self) -> Tensor:
        """Weights of the features whose decoder rows are added, [d_sae]."""
        features = goal_features(self.goal, self.session.experiment)
        return self._weights(features.sae or features.target, len(self.W_dec))

    def _weights(self, features: Features, d_sae: int) -> Tensor:
        weights = torch.zeros(d_sae)
        for feature, weight in features:
            if not 0 <= feature < d_sae:
                raise InputError(f"goal {self.goal.id!r} names feature {feature}; the SAE has features 0 to {d_sae - 1}")
            weights[feature] += weight
        return weights


def _contrasts(session: Session, goals: Iterable[Goal]) -> dict[str, Any]:
    """Mean residual streams of the contrast texts, by goal id."""
    todo = list(goals)

    async def main(call: Call) -> dict[str, Any]:
        return {goal.id: await call("contrast", goal) for goal in todo}

    with session.progress.stage("reading contrast texts", len(todo), 0, "goals") as advance:
        found = session.pool.run(main, calls=len(todo))
        advance(len(todo))
    return found


def _inputs(session: Session, goal: Goal, method: str) -> str:
    """A hash of everything the vector is made from."""
    experiment = session.experiment
    made_from: dict[str, Any] = {
        "model": model_settings(experiment),
        "hook_name": experiment.hook_name,
        "method": method,
        "bias_weight": experiment.steering.bias_weight,
    }
    if methods.needs(method, "positive"):
        made_from["contrast"] = goal.contrast.model_dump()
    if methods.needs(method, "approximator") or methods.needs(method, "W_dec"):
        made_from["features"] = goal_features(goal, experiment).model_dump()
        made_from["sae"] = experiment.sae.model_dump()
    if methods.needs(method, "approximator"):
        made_from["fit"] = session.run.manifest().get("fit", {}).get("inputs")
    return settings_hash(made_from)


def _kept(session: Session, pair: Pair, inputs: str) -> SteeringVector | None:
    path = session.run.vector(*pair)
    if not path.is_file():
        return None
    vector = SteeringVector.load(path)
    return vector if vector.provenance.get("inputs") == inputs else None
