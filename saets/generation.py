"""Steered text: completions of prompts, every row with its own vector and scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saets.effects.calibration_text import calibration_tokens, passages
from saets.effects.worker import scale_rule
from saets.engine.batch import Row
from saets.engine.calibration import Calibrator, ScaleRange
from saets.engine.rollout import RolloutEngine
from saets.experiment.config import Experiment
from saets.experiment.goal import SIDES, Goal, contrast_tokens
from saets.features.cards import pieces, shipped_cards, survey
from saets.features.contrast import FeatureContrast, feature_contrast
from saets.features.reading import SKIPPED, FeatureReader
from saets.hooks import blocks_below
from saets.model import load_model
from saets.records import Generation, GenerationItem
from saets.sae import load_sae
from saets.terminal.progress import Silent
from saets.tokens import completion_text, encode, end_tokens
from saets.vector.positions import Positions

DENSITY_TOKENS = 8192
"""Of the calibration text: enough to tell a density of one in a hundred from one in fifty."""

TEXTS_PER_BATCH = 512
"""Completions written together where `execution.rows` is `auto`."""


def texts_per_batch(experiment: Experiment) -> int:
    """Completions written together; part of the execution shape."""
    rows = experiment.execution.rows
    return TEXTS_PER_BATCH if rows == "auto" else rows


def steered_positions(experiment: Experiment) -> Positions:
    """Where the evaluation's texts are steered."""
    return Positions(experiment.evaluation.positions, experiment.evaluation.bos)


class SteeringWorker:
    """Holds one model, loaded once; completes prompts and reads residual streams. Knows nothing of where it runs."""

    def __init__(self, experiment: Experiment) -> None:
        """Raises `InputError`: see `load_model` and `RolloutEngine`."""
        settings = experiment.evaluation
        self.experiment = experiment
        self.model = load_model(experiment.model)
        self.engine = RolloutEngine(self.model, experiment.hook_name, top_k=settings.top_k, temperature=settings.temperature)
        self._ends = end_tokens(self.model.tokenizer, settings.prompt_format, self.model.original_model.generation_config)

    @cached_property
    def calibrator(self) -> Calibrator:
        """Finds scales on the experiment's calibration text, by the rule for measured vectors; BOS is steered as in texts."""
        settings, bos = self.experiment.effects, steered_positions(self.experiment).bos
        tokens = calibration_tokens(self.model.tokenizer, settings)
        return Calibrator(self.engine.decoder, tokens, scale_rule(settings), bos=bos)

    def scale_range(self, direction: NDArray[np.float32]) -> ScaleRange:
        """The scales between which a unit vector is of use. Raises `InputError`: see `Calibrator`."""
        return self.calibrator.ranges([torch.from_numpy(direction)])[0]

    def residual_length(self) -> float:
        """Median L2 length of the residual stream on the calibration text. Raises `InputError`: see `Calibrator`."""
        return self.calibrator.residual_length

    def generate(self, items: Sequence[GenerationItem], directions: Mapping[str, NDArray[np.float32]]) -> list[Generation]:
        """Completions in order; `directions` holds the unit vector of every vector_id but `unsteered`.

        The batch always has the experiment's rows: the last one is filled up, so that no text depends on how many were missing.
        """
        settings, tokenizer = self.experiment.evaluation, self.model.tokenizer
        texts = {*settings.prompts, *(item.prompt for item in items)}
        prompts = {text: tuple(encode(tokenizer, text, settings.prompt_format)) for text in texts}
        starts = {text: len(prompt) for text, prompt in prompts.items()}
        filled = [*items, *[items[-1]] * (texts_per_batch(self.experiment) - len(items))]
        steered = dict.fromkeys((item.vector_id, item.scale) for item in filled if item.vector_id in directions)
        which = {pair: number for number, pair in enumerate(steered)}
        vectors = [torch.from_numpy(directions[vector_id] * np.float32(scale)) for vector_id, scale in steered]
        tokens = self.engine.run(
            [Row(prompts[item.prompt], item.seed, which.get((item.vector_id, item.scale))) for item in filled],
            torch.stack(vectors) if vectors else None,
            max(starts.values()) + settings.new_tokens,
            share_prompts=False,
            positions=steered_positions(self.experiment),
        ).tokens
        ends = [starts[item.prompt] + settings.new_tokens for item in items]
        return [
            Generation(**asdict(item), completion=completion_text(tokenizer, row[starts[item.prompt] : end].tolist(), self._ends))
            for item, row, end in zip(items, tokens, ends, strict=False)
        ]

    @torch.no_grad()
    def contrast(self, goal: Goal) -> dict[str, NDArray[np.float32]]:
        """`positive` and `negative` [texts, d_model]: h_L of each contrast text, averaged over the tokens that count.

        Those of a plain text are all, BOS included; those of an exchange are the assistant's answer.

        Raises:
            InputError: see `contrast_tokens`.
        """
        tokenizer = self.model.tokenizer
        return {side: np.stack([self._mean_residual(*text) for text in contrast_tokens(tokenizer, goal, side)]) for side in SIDES}

    def feature_contrast(self, goal: Goal, *, skip_positions: int = SKIPPED) -> FeatureContrast:
        """The goal's contrast texts in the features of the experiment's SAE, which is loaded when first asked for.

        Raises:
            InputError: see `load_sae` and `saets.features.contrast.feature_contrast`.
        """
        return feature_contrast(FeatureReader(self.engine.decoder, self.sae, skip_positions), self.model.tokenizer, goal)

    def feature_density(self) -> NDArray[np.float32]:
        """Share of tokens on which each feature fires, [d_sae]: as shipped with the SAE, else on the calibration text.

        Raises:
            InputError: no calibration text.
        """
        cards = shipped_cards(self.experiment.sae)
        if cards is None:
            tokenizer, reader = self.model.tokenizer, FeatureReader(self.engine.decoder, self.sae)
            text = passages(self.experiment.effects.calibration_text)
            cards = survey(reader, tokenizer, pieces(tokenizer, text, DENSITY_TOKENS), Silent())
        return cards.density

    @cached_property
    def sae(self) -> Any:
        """The experiment's SAE, where the residual stream at the hook is."""
        return load_sae(self.experiment.sae, self.engine.decoder.d_model, self.engine.hook_device)

    def _mean_residual(self, text: list[int], start: int) -> NDArray[np.float32]:
        tokens = torch.tensor([text], device=self.engine.device)
        hook_name = self.experiment.hook_name
        _, cache = self.model.run_with_cache(tokens, names_filter=hook_name, stop_at_layer=blocks_below(hook_name))
        mean: NDArray[np.float32] = cache[hook_name][0, start:].float().mean(0).cpu().numpy()
        return mean
