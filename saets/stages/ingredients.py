"""What the steering methods are made from: each ingredient is computed when the first method names it, and once for all goals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from saets.distributed.pool import Call
from saets.errors import InputError
from saets.experiment.config import SCALE_RULE
from saets.experiment.goal import Features, Goal, goal_features
from saets.experiment.loading import model_settings
from saets.features.contrast import MAINLY_EARLY
from saets.files.tensors import read_tensors
from saets.fit.approximator import EffectApproximator
from saets.generation import steered_positions
from saets.methods import formulas as methods
from saets.methods.rotation import procrustes
from saets.model import model_shape
from saets.run_folder.store import RunFolder
from saets.sae import load_sae
from saets.shapes import Float
from saets.stages.session import Session
from saets.vector.positions import EVERYWHERE

READ_BY_ACTORS = {
    "positive": ("contrast",),
    "negative": ("contrast",),
    "feature_contrast": ("feature_contrast",),
}
"""Ingredients that come from a goal's contrast texts, and the methods of `SteeringActor` that read them."""

SCALES = (*SCALE_RULE, "calibration_text", "calibration_chunks", "calibration_length")
"""Settings of effects by which scales are found."""


class Shared:
    """What all goals have in common."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @cached_property
    def approximator(self) -> EffectApproximator:
        """The run's."""
        return EffectApproximator.load(self._session.run.approximator)

    @cached_property
    def W_dec(self) -> Float[Tensor, "d_sae d_model"]:
        """The SAE's decoder."""
        experiment = self._session.experiment
        rows: Tensor = load_sae(experiment.sae, model_shape(experiment.model)[0]).W_dec.float()
        return rows

    @cached_property
    def Q(self) -> Float[Tensor, "d_model d_model"]:
        """The published rotation where the run has it beside the published approximator; else the best one for this M."""
        run = self._session.run
        if run.rotation.is_file() and "published" in self.approximator.provenance:
            return read_tensors(run.rotation, f"no rotation at {run.rotation}").tensors["Q"]
        return procrustes(self.W_dec, self.approximator.M)

    @cached_property
    def stillness(self) -> Float[Tensor, " d_sae"]:
        """How much each feature should stay as it is, for `constrained`; see `stillness_of`."""
        ones = torch.ones_like(self.approximator.b)
        if self._session.experiment.steering.stillness == "equal":
            return ones
        r2 = self.approximator.feature_r2
        reliable = ones if r2 is None else r2.nan_to_num(0.0).clamp(min=0)
        variance = self._variance()
        return reliable if variance is None else stillness_of(reliable, variance)

    def _variance(self) -> Tensor | None:
        """Over unsteered rollouts, of each feature's mean activation in a rollout; None where no baseline is at hand.

        From the blocks of the baseline: a block is the mean of as many rollouts as a vector has, so its variance times that.
        """
        run = self._session.run
        folders = [run, *([shipped] if (shipped := self._session.shipped()) else [])]
        blocks = next((found for folder in folders if (found := _blocks(folder)) is not None), None)
        return None if blocks is None else torch.from_numpy(blocks.var(axis=0, ddof=1)).float()


def stillness_of(reliable: Float[Tensor, " d_sae"], variance: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """r_j / (v_j + v0): features whose effect is predicted well and which are quiet in unsteered text count most.

    r_j is the held-out R2 where it is above 0, v_j the variance of what a feature does in unsteered text, and v0 the median of
    v_j over live features, without which dead features would count for everything. A common factor of v_j changes nothing.
    """
    live = variance[variance > 0]
    typical = live.median() if len(live) else variance.new_tensor(1.0)
    return reliable / (variance + typical) * typical


def _blocks(folder: RunFolder) -> np.ndarray | None:
    """Means of the unsteered blocks, [blocks, d_sae], where there are two or more."""
    frame = folder.baseline.read(["vector_id", "index", "mean"])
    if frame is None or len(frame) < 2:
        return None
    return np.asarray(frame.sort(pl.col("index"))["mean"].to_numpy(), dtype=np.float64)


class Ingredients:
    """What a method may name as a parameter, for one goal."""

    def __init__(self, goal: Goal, session: Session, shared: Shared, read: Mapping[str, Any]) -> None:
        """`read` is what `read_texts` gives for the goal."""
        self._goal, self._session, self._shared, self._read = goal, session, shared, read

    def __getattr__(self, name: str) -> Any:
        """An ingredient of all goals."""
        return getattr(self._shared, name)

    @property
    def positive(self) -> Float[Tensor, "texts d_model"]:
        """Mean residual stream of each contrast text with the behaviour."""
        return torch.tensor(self._read["contrast"]["positive"])

    @property
    def negative(self) -> Float[Tensor, "texts d_model"]:
        """The same of those without."""
        return torch.tensor(self._read["contrast"]["negative"])

    @property
    def feature_contrast(self) -> Float[Tensor, " d_sae"]:
        """mean f(h+) - mean f(h-) over tokens, then texts; 0 for features that are dense or fire mainly at the start of texts."""
        found, density = self._read["feature_contrast"], self._read["feature_density"]
        left_out = (density > self._session.experiment.steering.max_density) | (found.early > MAINLY_EARLY)
        return torch.from_numpy(np.where(left_out, np.float32(0), found.mean))

    @property
    def target(self) -> Float[Tensor, " d_sae"]:
        """Weights of the features that should rise."""
        return self._weights(goal_features(self._goal, self._session.experiment).target, len(self._shared.approximator.b))

    @property
    def decoder_target(self) -> Float[Tensor, " d_sae"]:
        """Weights of the features whose decoder rows are added."""
        features = goal_features(self._goal, self._session.experiment)
        return self._weights(features.sae or features.target, len(self._shared.W_dec))

    def _weights(self, features: Features, d_sae: int) -> Tensor:
        weights = torch.zeros(d_sae)
        for feature, weight in features:
            if not 0 <= feature < d_sae:
                raise InputError(f"goal {self._goal.id!r} names feature {feature}; the SAE has features 0 to {d_sae - 1}")
            weights[feature] += weight
        return weights


def read_texts(session: Session, wanted: Iterable[tuple[Goal, str]]) -> dict[str, dict[str, Any]]:
    """By goal id, what actors find in the contrast texts that methods need: pairs of goal and method."""
    todo = {
        (goal.id, call): goal
        for goal, method in wanted
        for ingredient, calls in READ_BY_ACTORS.items()
        if methods.needs(method, ingredient)
        for call in calls
    }
    if not todo:
        return {}
    dense = any(call == "feature_contrast" for _, call in todo)

    async def main(call: Call) -> list[Any]:
        density = [call("feature_density")] if dense else []
        return await asyncio.gather(*density, *(read(call, name, goal) for (_, name), goal in todo.items()))

    async def read(call: Call, name: str, goal: Goal) -> Any:
        result = await call(name, goal)
        advance(1)
        return result

    with session.progress.stage("reading contrast texts", len(todo), 0, "sets") as advance:
        found = session.pool.run(main, calls=len(todo) + dense)
    density = {"feature_density": found.pop(0)} if dense else {}
    results: dict[str, dict[str, Any]] = {goal: dict(density) for goal, _ in todo}
    for (goal, call), result in zip(todo, found, strict=True):
        results[goal][call] = result
    return results


def made_from(session: Session, goal: Goal, method: str) -> dict[str, Any]:
    """All that decides a vector and the scales that its file recommends: settings, texts, features, and the fit."""
    experiment = session.experiment
    names = set(methods.ingredients_of(method))
    facts: dict[str, Any] = {
        "model": model_settings(experiment),
        "hook_name": experiment.hook_name,
        "method": method,
        "options": methods.options_of(method, experiment.steering.model_dump()),
    }
    facts["scales"] = experiment.effects.model_dump(include=set(SCALES))
    if (positions := steered_positions(experiment)) != EVERYWHERE:  # as all vectors were before there was a choice
        facts["positions"] = positions.to_json()
    if names & READ_BY_ACTORS.keys():
        facts["contrast"] = goal.contrast.model_dump()
    if names - {"positive", "negative"}:
        facts["sae"] = experiment.sae.model_dump()
    if names & {"target", "decoder_target"}:
        facts["features"] = goal_features(goal, experiment).model_dump()
    if "feature_contrast" in names:
        facts["max_density"] = experiment.steering.max_density
        facts["density_text"] = experiment.effects.calibration_text
    if "stillness" in names:
        facts["stillness"] = experiment.steering.stillness
    if "approximator" in names:
        facts["fit"] = session.run.manifest().get("fit", {}).get("inputs")
    if "Q" in names:
        facts["rotation"] = session.run.manifest().get("published", {}).get("rotation")
    return facts
