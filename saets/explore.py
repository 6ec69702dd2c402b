"""A run to play with, in a notebook or from `saets steer`, `forecast` and `features`: no Ray, nothing written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import polars as pl
import torch

from saets.checks import check_vector
from saets.effects.calibration_text import calibration_tokens
from saets.effects.one_effect import MeasuredEffect, measure_vector
from saets.effects.worker import scale_rule
from saets.engine.batch import Row
from saets.engine.calibration import Calibration, Calibrator
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed
from saets.experiment.config import Experiment
from saets.experiment.goal import load_goal
from saets.experiment.loading import load_experiment
from saets.features.finder import FeatureFinder, Search
from saets.features.labels import feature_labels
from saets.files.storage import Where, shareable
from saets.fit.approximator import EffectApproximator
from saets.forecast.evidence import Evidence, evidence
from saets.forecast.prediction import Agreement, agreement, effect_table, target_weights
from saets.methods import formulas as methods
from saets.model import load_model
from saets.run_folder.fitted import Fitted, fitted
from saets.run_folder.store import RunFolder
from saets.sae import check_features
from saets.tokens import PromptFormat, completion_text, encode, end_tokens
from saets.vector.positions import EVERYWHERE
from saets.vector.vector import SteeringVector


class Run:
    """A run folder with its experiment; model and approximator are read when first used."""

    def __init__(self, path: Where, experiment: Experiment | None = None) -> None:
        """`path` is a local path or a URI. Raises `InputError` where the folder holds no experiment."""
        self.folder = RunFolder(path)
        self.experiment = experiment or load_experiment(self.folder.path)
        self._measured: dict[str, MeasuredEffect] = {}

    @cached_property
    def model(self) -> Any:
        """The language model as a `TransformerBridge`."""
        return load_model(self.experiment.model)

    @cached_property
    def engine(self) -> RolloutEngine:
        """Decodes as the evaluation samples."""
        settings = self.experiment.evaluation
        return RolloutEngine(self.model, self.experiment.hook_name, top_k=settings.top_k, temperature=settings.temperature)

    @cached_property
    def fit(self) -> Fitted:
        """The approximator and what is known of its fit. Raises `InputError`: see `fitted`."""
        return fitted(self.folder, self.experiment)

    @property
    def approximator(self) -> EffectApproximator:
        """The fitted map from vectors to effects: the run's, else one made of the effects that come with the experiment."""
        return self.fit.approximator

    @cached_property
    def evidence(self) -> Evidence:
        """What stands behind the approximator's predictions. Raises `InputError`: see `evidence`."""
        return evidence(self.folder, self.experiment, self.fit)

    @cached_property
    def _calibrator(self) -> Calibrator:
        settings = self.experiment.effects
        tokens = calibration_tokens(self.model.tokenizer, settings)
        return Calibrator(self.engine.decoder, tokens, scale_rule(settings))

    def vector(self, goal: str, method: str) -> SteeringVector:
        """The vector that `saets vectors` wrote for a goal and method."""
        return SteeringVector.load(self.folder.vector(goal, method))

    def target(self, features: Mapping[int, float], *, bias_weight: float = 1.0) -> SteeringVector:
        """The SAE-TS vector for chosen features: {feature id: weight}; `bias_weight` is the paper's lambda (equation 3).

        Raises:
            InputError: no features, ids outside the SAE, weights that are all zero or not finite.
        """
        target = target_weights(features, len(self.approximator.b))
        made = methods.sae_ts(target, self.approximator, bias_weight=bias_weight)
        facts = {"model": shareable(self.experiment.model.name), "method": "sae_ts", "features": dict(features)}
        return SteeringVector.from_tensor(made, self.experiment.hook_name, **facts)

    def calibrate(self, vector: SteeringVector) -> Calibration:
        """The scale that the experiment's rule gives a vector on its calibration text: some forward passes."""
        return self._calibrator.calibrate([vector.direction])[0]

    def complete(
        self,
        prompt: str,
        vector: SteeringVector | None = None,
        *,
        scale: float = 0.0,
        samples: int = 3,
        new_tokens: int = 30,
        seed: int = 0,
        prompt_format: PromptFormat | None = None,
        force: bool = False,
    ) -> list[str]:
        """Completions (new text only), steered by `scale` x the vector at the vector's positions, or unsteered.

        The same seed gives the same noise at every scale and for every vector. `prompt_format` is the evaluation's where none is
        given; in `chat` the template's positions are part of the prompt, and a completion is the assistant's answer.

        Raises:
            InputError: the vector has another width or, without `force`, belongs to another model or hook; `chat` without a chat
                template.
        """
        how: Any = {"samples": samples, "new_tokens": new_tokens, "seed": seed, "prompt_format": prompt_format, "force": force}
        return self.compare(prompt, vector, (scale,), **how)[0]

    def compare(
        self,
        prompt: str,
        vector: SteeringVector | None,
        scales: Sequence[float],
        *,
        samples: int = 3,
        new_tokens: int = 30,
        seed: int = 0,
        prompt_format: PromptFormat | None = None,
        force: bool = False,
    ) -> list[list[str]]:
        """Completions at each scale, written together; 0 is unsteered, and a sample has the same noise at all. See `complete`."""
        if vector is not None:
            check_vector(self.experiment, vector, force=force)
        how = prompt_format or self.experiment.evaluation.prompt_format
        tokenizer = self.model.tokenizer
        start = tuple(encode(tokenizer, prompt, how))
        ends = end_tokens(tokenizer, how, self.model.original_model.generation_config)
        added = None if vector is None else torch.tensor(scales)[:, None] * vector.direction
        seeds = [row_seed(seed, "complete", prompt, sample) for sample in range(samples)]
        rows = [Row(start, noise, None if vector is None else which) for which in range(len(scales)) for noise in seeds]
        positions = EVERYWHERE if vector is None else vector.positions
        tokens = self.engine.run(rows, added, len(start) + new_tokens, positions=positions).tokens
        texts = [completion_text(tokenizer, row[len(start) :].tolist(), ends) for row in tokens]
        return [texts[at : at + samples] for at in range(0, len(texts), samples)]

    def measure(self, vector: SteeringVector, *, force: bool = False) -> MeasuredEffect:
        """The vector's effect by the experiment's own effect settings; measured once for each vector. See `measure_vector`.

        Raises:
            InputError: as `complete`, and see `measure_vector`.
        """
        check_vector(self.experiment, vector, force=force)
        if vector.id not in self._measured:
            self._measured[vector.id] = measure_vector(self.folder, self.experiment, self.model, vector)
        return self._measured[vector.id]

    def forecast(
        self,
        vector: SteeringVector,
        *,
        top: int = 10,
        features: Sequence[int] = (),
        measure: bool = False,
        labels: Mapping[int, str] | None = None,
        force: bool = False,
    ) -> pl.DataFrame:
        """Predicted effects at the calibrated scale: columns `feature, predicted, common, feature_r2, label`.

        The given features come first, then the `top` others that change most. `common` is b, the part of a prediction that every
        vector has; `feature_r2` how well the feature is predicted for held-out vectors. `measure` adds the columns `measured` and
        `standard_error`. A label is the given one, or the context on which the feature fires most; null where neither is known.

        Raises:
            InputError: no such feature; as `measure`.
        """
        check_vector(self.experiment, vector, force=force)
        check_features(features, len(self.approximator.b))
        measured = self.measure(vector, force=force) if measure else None
        found = effect_table(self.approximator, vector, features, top, measured)
        known = feature_labels(self.experiment.sae, found["feature"], labels)
        return found.with_columns(pl.Series("label", [known.get(feature) for feature in found["feature"]], dtype=pl.String))

    def agreement(self, vector: SteeringVector, *, force: bool = False) -> Agreement:
        """How the prediction of a vector agrees with its effect, which is measured where it was not yet.

        Raises:
            InputError: as `measure` and `evidence`.
        """
        measured = self.measure(vector, force=force)
        return agreement(self.approximator.predict(vector.direction), measured, self.evidence.mean_effect)

    def features(self, goal: str, search: Search | None = None) -> pl.DataFrame:
        """Features of the SAE for a goal (packaged, or a goal file), best first: see `FeatureFinder.for_goal`.

        The run need hold nothing; effects and an approximator that it holds are shown.
        """
        wanted = load_goal(goal)
        return FeatureFinder(self.experiment, self.model, self.folder, search=search, goal=wanted).for_goal(wanted)
