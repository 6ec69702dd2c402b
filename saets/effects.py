"""What a steering vector does to every SAE feature.

The effect of a vector is the mean of f(h_L) over all rollouts and all positions, steered text minus unsteered text, where f
is the SAE encoder and h_L the unsteered model's residual stream of the text (paper, section 3). h_L is caught while the text is
generated. The BOS position is the same in both and cancels exactly; it counts in the mean's length but is left out of the
sums, where its large norm would only add rounding error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from saets.calibration import Calibration, Calibrator, NotFinite
from saets.config import DecoderRows, Effects, Experiment, RandomVectors
from saets.errors import InputError
from saets.model import check_hook, load_model, weights_hash
from saets.records import VectorItem, unit, vector_id
from saets.rollout import RolloutEngine, Row
from saets.sae import load_sae
from saets.sampling import row_seed

BASELINE = "baseline"
"""Source of the items that measure unsteered text; item i is block i of the run's one shared baseline."""


@dataclass(frozen=True)
class Measurement:
    """What one item gave: the mean feature activations of its rollouts, not yet minus the baseline."""

    item: VectorItem
    mean: NDArray[np.float32]
    """[d_sae], over rollouts and positions (BOS counted, its activations left out)."""
    error_variance: float
    """Squared standard error of `mean` over rollouts, averaged over features."""
    calibration: Calibration
    unsteered_loss: float
    n_rollouts: int
    n_tokens: int


class Failure(NamedTuple):
    """An item that could not be measured, and why."""

    item: VectorItem
    reason: str


class EffectWorker:
    """Holds one model and one SAE, loaded once; turns items into measurements. Knows nothing of where it runs."""

    def __init__(self, experiment: Experiment) -> None:
        """Loads the model and the SAE and runs the calibration text.

        Raises:
            InputError: see `load_model`, `load_sae`, `RolloutEngine` and `Calibrator`.
        """
        settings = experiment.effects
        self.experiment = experiment
        self.model = load_model(experiment.model)
        check_hook(self.model, experiment.hook_name)
        self.engine = RolloutEngine(self.model, experiment.hook_name, top_k=settings.top_k, temperature=settings.temperature)
        self.sae = load_sae(experiment.sae, self.model.cfg.d_model, self.engine.device)
        self.calibrator = Calibrator(self.model, experiment.hook_name, settings)

    def measure(self, items: Sequence[VectorItem]) -> list[Measurement | Failure]:
        """One result an item, in order. All items are rolled out together; the batch's shape is the experiment's.

        A vector whose loss or activations are not finite is a `Failure`, and leaves its neighbours alone.
        """
        calibrations = [self._calibrate(item) for item in items]
        scales = [found.scale if isinstance(found, Calibration) else 0.0 for found in calibrations]
        scaled = np.stack([item.direction * np.float32(scale) for item, scale in zip(items, scales, strict=True)])
        sums = self._feature_sums(items, torch.from_numpy(scaled))
        settings = self.experiment.effects
        per_rollout = sums.view(len(items), len(settings.prompts), settings.rollouts, -1) / settings.length
        results: list[Measurement | Failure] = []
        for item, calibration, rollouts in zip(items, calibrations, per_rollout, strict=True):
            if isinstance(calibration, Failure):
                results.append(calibration)
                continue
            mean = rollouts.mean(dim=(0, 1))
            if not torch.isfinite(mean).all():
                results.append(Failure(item, f"activations are not finite at scale {calibration.scale:.6g}"))
                continue
            results.append(
                Measurement(
                    item=item,
                    mean=mean.cpu().numpy(),
                    error_variance=_error_variance(rollouts),
                    calibration=calibration,
                    unsteered_loss=self.calibrator.unsteered_loss,
                    n_rollouts=rollouts_per_vector(settings),
                    n_tokens=rollouts_per_vector(settings) * settings.length,
                )
            )
        return results

    def _calibrate(self, item: VectorItem) -> Calibration | Failure:
        if item.source == BASELINE:
            return Calibration(0.0, self.calibrator.unsteered_loss, "fixed")
        try:
            return self.calibrator.calibrate(torch.from_numpy(item.direction))
        except NotFinite as error:
            return Failure(item, str(error))

    @torch.no_grad()
    def _feature_sums(self, items: Sequence[VectorItem], scaled: Float[Tensor, "items d_model"]) -> Float[Tensor, "rows d_sae"]:
        """Feature activations of every rollout summed over its positions but BOS; rows by item, prompt, sample.

        Rows run in pieces of one shape: the experiment's rows a step, with the last piece filled up, so that the last bits
        of a row do not depend on how many vectors it was measured with.
        """
        settings, total = self.experiment.effects, len(items) * rollouts_per_vector(self.experiment.effects)
        rows = [
            Row(prompt, row_seed(self.experiment.seed, "effects", item.vector_id, which, sample))
            for item in items
            for which, prompt in enumerate(settings.prompts)
            for sample in range(settings.rollouts)
        ]
        owner = torch.arange(len(items)).repeat_interleave(rollouts_per_vector(settings))
        shape = rows_per_step(self.experiment)
        sums = []
        for start in range(0, total, shape):
            take = torch.arange(start, start + shape).clamp(max=total - 1)
            acts = torch.zeros(shape, self.sae.cfg.d_sae, device=self.engine.device)

            def add(position: int, residual: Tensor, acts: Tensor = acts) -> None:
                if position > 0:
                    acts += self.sae.encode(residual.float())

            self.engine.run([rows[i] for i in take.tolist()], scaled[owner[take]], settings.length, add)
            sums.append(acts[: total - start])
        return torch.cat(sums)


def rollouts_per_vector(settings: Effects) -> int:
    """Prompts times rollouts a prompt: 896 in the paper."""
    return len(settings.prompts) * settings.rollouts


def vectors_per_batch(experiment: Experiment) -> int:
    """How many vectors share one batch, from the experiment's rows a step; at least one."""
    return max(1, experiment.execution.rows // rollouts_per_vector(experiment.effects))


def rows_per_step(experiment: Experiment) -> int:
    """Rows decoded in one step: whole vectors where they fit, else the experiment's rows."""
    return min(experiment.execution.rows, vectors_per_batch(experiment) * rollouts_per_vector(experiment.effects))


def effect_of(mean: NDArray[np.float32], baseline: NDArray[np.float32]) -> NDArray[np.float32]:
    """The effect y(v) [d_sae]: mean activations of steered text minus those of the shared baseline (paper, section 3)."""
    return mean - baseline


def baseline_items(experiment: Experiment, d_model: int) -> list[VectorItem]:
    """The blocks of the shared baseline, each with the rollouts of one vector and its own seeds."""
    zeros = np.zeros(d_model, dtype=np.float32)
    return [VectorItem(f"{BASELINE}-{i}", BASELINE, i, zeros) for i in range(experiment.effects.baseline_blocks)]


def vector_items(experiment: Experiment, d_model: int) -> list[VectorItem]:
    """The vectors of all sources, in order, each once even where two sources hold it.

    Raises:
        InputError: rows outside a decoder, a decoder of another width, a zero row.
    """
    found: dict[str, VectorItem] = {}
    for source in experiment.effects.sources:
        for item in _source_items(source, experiment, d_model):
            found.setdefault(item.vector_id, item)
    return list(found.values())


def _source_items(source: DecoderRows | RandomVectors, experiment: Experiment, d_model: int) -> Iterator[VectorItem]:
    if isinstance(source, RandomVectors):
        for index in range(source.count):
            generator = np.random.default_rng([experiment.seed, index])
            direction = unit(generator.standard_normal(d_model).astype(np.float32))
            yield VectorItem(vector_id(direction), "random", index, direction)
        return
    sae = load_sae(source.sae or experiment.sae, d_model)
    decoder = sae.W_dec.numpy()
    for index in _decoder_rows(source, len(decoder)):
        direction = unit(decoder[index], f"decoder row {index}")
        yield VectorItem(vector_id(direction), "decoder", index, direction)


def _decoder_rows(source: DecoderRows, d_sae: int) -> Sequence[int]:
    stop = d_sae if source.stop is None else source.stop
    rows: Sequence[int] = source.rows if source.rows is not None else range(source.start, stop)
    outside = [row for row in rows if not 0 <= row < d_sae]
    if outside or not rows:
        got = f"row {outside[0]}" if outside else f"no rows ({source.start} to {source.stop})"
        raise InputError(f"effects.sources asks for {got}; the SAE has rows 0 to {d_sae - 1}")
    return rows


def _error_variance(per_rollout: Float[Tensor, "prompts rollouts d_sae"]) -> float:
    """Squared standard error of the mean over prompts and rollouts, averaged over features.

    Prompts are fixed, so only the spread within a prompt counts; with one rollout a prompt there is none, and the spread over
    all rollouts stands in (too large rather than too small).
    """
    prompts, rollouts, _ = per_rollout.shape
    if rollouts > 1:
        return (per_rollout.var(dim=1) / rollouts / prompts).mean().item()
    return (per_rollout.flatten(0, 1).var(dim=0) / prompts).mean().item() if prompts > 1 else float("nan")


def describe(worker: EffectWorker) -> dict[str, Any]:
    """For the manifest: which weights these are, and the execution shape that decides a text's last bits."""
    return {
        "model_hash": weights_hash(worker.model.original_model),
        "sae_hash": weights_hash(worker.sae),
        "rows_per_step": rows_per_step(worker.experiment),
        "dtype": str(worker.engine.dtype).removeprefix("torch."),
        "device": worker.engine.device.type,
        "threads": torch.get_num_threads(),
    }
