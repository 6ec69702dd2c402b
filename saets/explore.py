"""A run to play with, in a notebook or from `saets steer`, `forecast` and `features`: no Ray, nothing written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import polars as pl
import torch

from saets import methods
from saets.approximator import EffectApproximator
from saets.checks import check_vector
from saets.config import Experiment
from saets.engine.batch import Row
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed
from saets.errors import InputError
from saets.experiment import load_experiment
from saets.features import FeatureFinder, Search
from saets.goal import load_goal
from saets.model import load_model
from saets.positions import EVERYWHERE
from saets.storage import Where
from saets.store import RunFolder
from saets.tokens import completion_text, encode
from saets.vector import SteeringVector


class Run:
    """A run folder with its experiment; model and approximator are read when first used."""

    def __init__(self, path: Where, experiment: Experiment | None = None) -> None:
        """`path` is a local path or a URI. Raises `InputError` where the folder holds no experiment."""
        self.folder = RunFolder(path)
        self.experiment = experiment or load_experiment(self.folder.path)

    @cached_property
    def model(self) -> Any:
        """The language model as a `TransformerBridge`."""
        return load_model(self.experiment.model)

    @cached_property
    def approximator(self) -> EffectApproximator:
        """The fitted map from vectors to effects."""
        return EffectApproximator.load(self.folder.approximator)

    def vector(self, goal: str, method: str) -> SteeringVector:
        """The vector that `saets vectors` wrote for a goal and method."""
        return SteeringVector.load(self.folder.vector(goal, method))

    def target(self, features: Mapping[int, float], *, bias_weight: float = 1.0) -> SteeringVector:
        """The SAE-TS vector for chosen features: {feature id: weight}; `bias_weight` is the paper's lambda (equation 3).

        Raises:
            InputError: no features, ids outside the SAE, weights that are all zero.
        """
        d_sae = len(self.approximator.b)
        target = torch.zeros(d_sae)
        for feature, weight in features.items():
            if not 0 <= feature < d_sae:
                raise InputError(f"no feature {feature}; the SAE has features 0 to {d_sae - 1}")
            target[feature] = weight
        if not target.any():
            raise InputError("give at least one feature with a weight that is not zero")
        made = methods.sae_ts(target, self.approximator, bias_weight=bias_weight)
        facts = {"model": self.experiment.model.name, "method": "sae_ts", "features": dict(features)}
        return SteeringVector.from_tensor(made, self.experiment.hook_name, **facts)

    def complete(
        self,
        prompt: str,
        vector: SteeringVector | None = None,
        *,
        scale: float = 0.0,
        samples: int = 3,
        new_tokens: int = 30,
        seed: int = 0,
    ) -> list[str]:
        """Completions (new text only), steered by `scale` x the vector at the vector's positions, or unsteered.

        The same seed gives the same noise at every scale and for every vector.

        Raises:
            InputError: the vector belongs to another model or hook.
        """
        if vector is not None:
            check_vector(self.experiment, vector)
        settings = self.experiment.evaluation
        engine = RolloutEngine(self.model, self.experiment.hook_name, top_k=settings.top_k, temperature=settings.temperature)
        added = None if vector is None else scale * vector.direction[None]
        start = len(encode(self.model.tokenizer, prompt))
        which = None if vector is None else 0
        rows = [Row(prompt, row_seed(seed, "complete", prompt, sample), which) for sample in range(samples)]
        positions = EVERYWHERE if vector is None else vector.positions
        tokens = engine.run(rows, added, start + new_tokens, positions=positions).tokens
        return [completion_text(self.model.tokenizer, row[start:].tolist()) for row in tokens]

    def forecast(self, vector: SteeringVector, *, top: int = 10, features: Sequence[int] = ()) -> pl.DataFrame:
        """Predicted effects at the calibrated scale: columns `feature, predicted`.

        The given features come first, then the `top` largest by size.
        """
        predicted = self.approximator.predict(vector.direction)
        largest = predicted.abs().argsort(descending=True)[: top + len(features)].tolist()
        order = list(dict.fromkeys([*features, *largest]))[: top + len(features)]
        return pl.DataFrame({"feature": order, "predicted": predicted[order].tolist()})

    def features(self, goal: str, search: Search | None = None) -> pl.DataFrame:
        """Features of the SAE for a goal (packaged, or a goal file), best first: see `saets.features.FeatureFinder.for_goal`.

        The run need hold nothing; effects and an approximator that it holds are shown.
        """
        wanted = load_goal(goal)
        return FeatureFinder(self.experiment, self.model, self.folder, search=search, goal=wanted).for_goal(wanted)
