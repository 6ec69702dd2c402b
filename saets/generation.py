"""Steered text: completions of prompts, every row with its own vector and scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from saets.calibration_text import calibration_tokens
from saets.config import Experiment
from saets.effects import scale_rule
from saets.engine.batch import Row
from saets.engine.calibration import Calibrator, ScaleRange
from saets.engine.rollout import RolloutEngine
from saets.goal import Goal
from saets.hooks import blocks_below
from saets.model import load_model
from saets.records import Generation, GenerationItem
from saets.tokens import completion_text, encode

TEXTS_PER_BATCH = 512
"""Completions written together where `execution.rows` is `auto`."""


def texts_per_batch(experiment: Experiment) -> int:
    """Completions written together; part of the execution shape."""
    rows = experiment.execution.rows
    return TEXTS_PER_BATCH if rows == "auto" else rows


class SteeringWorker:
    """Holds one model, loaded once; completes prompts and reads residual streams. Knows nothing of where it runs."""

    def __init__(self, experiment: Experiment) -> None:
        """Raises `InputError`: see `load_model` and `RolloutEngine`."""
        settings = experiment.evaluation
        self.experiment = experiment
        self.model = load_model(experiment.model)
        self.engine = RolloutEngine(self.model, experiment.hook_name, top_k=settings.top_k, temperature=settings.temperature)

    @cached_property
    def calibrator(self) -> Calibrator:
        """Finds scales on the experiment's calibration text, as those of measured vectors were found."""
        settings = self.experiment.effects
        return Calibrator(self.engine.decoder, calibration_tokens(self.model.tokenizer, settings), scale_rule(settings))

    def scale_range(self, direction: NDArray[np.float32]) -> ScaleRange:
        """The scales between which a unit vector is of use. Raises `InputError`: see `Calibrator`."""
        return self.calibrator.ranges([torch.from_numpy(direction)])[0]

    def generate(self, items: Sequence[GenerationItem], directions: Mapping[str, NDArray[np.float32]]) -> list[Generation]:
        """Completions in order; `directions` holds the unit vector of every vector_id but `unsteered`.

        The batch always has the experiment's rows: the last one is filled up, so that no text depends on how many were missing.
        """
        settings, tokenizer = self.experiment.evaluation, self.model.tokenizer
        starts = {prompt: len(encode(tokenizer, prompt)) for prompt in {*settings.prompts, *(item.prompt for item in items)}}
        filled = [*items, *[items[-1]] * (texts_per_batch(self.experiment) - len(items))]
        steered = dict.fromkeys((item.vector_id, item.scale) for item in filled if item.vector_id in directions)
        which = {pair: number for number, pair in enumerate(steered)}
        vectors = [torch.from_numpy(directions[vector_id] * np.float32(scale)) for vector_id, scale in steered]
        tokens = self.engine.run(
            [Row(item.prompt, item.seed, which.get((item.vector_id, item.scale))) for item in filled],
            torch.stack(vectors) if vectors else None,
            max(starts.values()) + settings.new_tokens,
            share_prompts=False,
        ).tokens
        ends = [starts[item.prompt] + settings.new_tokens for item in items]
        return [
            Generation(**asdict(item), completion=completion_text(tokenizer, row[starts[item.prompt] : end].tolist()))
            for item, row, end in zip(items, tokens, ends, strict=False)
        ]

    @torch.no_grad()
    def contrast(self, goal: Goal) -> dict[str, NDArray[np.float32]]:
        """`positive` and `negative` [texts, d_model]: h_L of each contrast text, averaged over its tokens, BOS included."""
        return {
            side: np.stack([self._mean_residual(text) for text in getattr(goal.contrast, side)])
            for side in ("positive", "negative")
        }

    def _mean_residual(self, text: str) -> NDArray[np.float32]:
        tokens = torch.tensor([encode(self.model.tokenizer, text)], device=self.engine.device)
        hook_name = self.experiment.hook_name
        _, cache = self.model.run_with_cache(tokens, names_filter=hook_name, stop_at_layer=blocks_below(hook_name))
        mean: NDArray[np.float32] = cache[hook_name][0].float().mean(0).cpu().numpy()
        return mean
