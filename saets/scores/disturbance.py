"""What steering at a chosen scale does besides: to the loss on text that was held out, and to every feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from saets.effects.calibration_text import held_out_tokens
from saets.effects.worker import EffectWorker, Failure, Measurement
from saets.engine.calibration import Calibration, Calibrator, ScaleRule
from saets.engine.rollout import RolloutEngine
from saets.experiment.config import Experiment
from saets.generation import steered_positions
from saets.records import VectorItem


class DisturbanceWorker:
    """Measures vectors at given scales as `EffectWorker` does at calibrated ones, with the loss on held-out text.

    Rollouts are steered where the evaluation's texts are. Held-out text is nobody's prompt and nobody's answer: it is steered at
    every position, at BOS only where that is steered in texts.
    """

    def __init__(self, experiment: Experiment, model: Any, rows: int | None = None) -> None:
        """`model` is a `TransformerBridge`; `rows` is the number of rows a step that the run's effects were measured with.

        Raises:
            InputError: see `EffectWorker`; no text beyond that on which scales are calibrated.
        """
        settings = experiment.effects
        engine = RolloutEngine(model, experiment.hook_name, top_k=settings.top_k, temperature=settings.temperature)
        positions = steered_positions(experiment)
        tokens = held_out_tokens(engine.tokenizer, settings)
        held_out = Calibrator(engine.decoder, tokens, ScaleRule(fixed_scale=0.0), bos=positions.bos)
        self._worker = EffectWorker(experiment, rows, engine=engine, calibrator=held_out, positions=positions)

    def measure(self, items: Sequence[VectorItem], scales: Sequence[float]) -> list[Measurement | Failure]:
        """One result an item, in order; its `loss` and `unsteered_loss` are those of the held-out text.

        The scale of an item of the baseline is 0.
        """
        steered = [(torch.from_numpy(item.direction), scale) for item, scale in zip(items, scales, strict=True)]
        losses = self._worker.calibrator.losses(steered)
        found = [Calibration(scale, loss, "fixed") for scale, loss in zip(scales, losses, strict=True)]
        return self._worker.measure_at(items, found)


class Shift(NamedTuple):
    """An effect, split into what was wanted and the rest."""

    target: float
    """Mean effect on the goal's features, by their weights: sum t_j y_j / sum |t_j|; NaN without features."""
    others: float
    """Length (L2) of the effect on all other features, less what noise alone adds: sqrt(max(0, sum y_j^2 - sum se_j^2))."""
    noise: float
    """sqrt(sum se_j^2) of the others: the length that noise alone would have."""
    largest: int
    """The other feature that moved most."""
    largest_effect: float


def shift_of(effect: NDArray[np.floating], weights: NDArray[np.floating], error_variance: float) -> Shift:
    """The shift of an effect [d_sae]; `weights` [d_sae] are zero off the target, `error_variance` is the mean over features."""
    y = np.asarray(effect, dtype=np.float64)
    aimed = weights != 0
    others = np.where(aimed, 0.0, y)
    noise = float((~aimed).sum() * error_variance)
    target = float(weights @ y / np.abs(weights).sum()) if aimed.any() else float("nan")
    largest = int(np.abs(others).argmax())
    length = float(others @ others)
    return Shift(target, max(0.0, length - noise) ** 0.5, noise**0.5, largest, float(others[largest]))
