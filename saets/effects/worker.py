"""What a steering vector does to every SAE feature.

The effect of a vector is the mean of f(h_L) over all rollouts and all positions, steered text minus unsteered text, where f
is the SAE encoder and h_L the unsteered model's residual stream of the text (paper, section 3). h_L is caught while the text is
generated. BOS and prompt positions, those of a chat template among them, are the same in both and cancel exactly; they count in
the mean's length but are left out of the sums, where BOS with its large norm would only add rounding error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saets.effects.calibration_text import calibration_tokens
from saets.engine.batch import Row
from saets.engine.calibration import Calibration, Calibrator, ScaleRule
from saets.engine.machine import is_out_of_memory, most_rows, rows_that_fit
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed
from saets.experiment.config import BASELINE, Effects, Experiment
from saets.model import load_model, weights_hash
from saets.records import VectorItem
from saets.sae import load_sae
from saets.shapes import Float
from saets.tokens import encode
from saets.vector.positions import EVERYWHERE, Positions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """What one item gave: the mean feature activations of its rollouts, not yet minus the baseline."""

    item: VectorItem
    mean: NDArray[np.float32]
    """[d_sae], over rollouts and positions; BOS and prompt positions count in the length, their activations are left out."""
    error_variance: float
    """Squared standard error of `mean` over rollouts, averaged over features."""
    feature_error_variance: NDArray[np.float32] | None
    """The same for each feature, [d_sae]; None unless `effects.standard_errors` asks for it."""
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

    def __init__(
        self,
        experiment: Experiment,
        rows: int | None = None,
        *,
        engine: RolloutEngine | None = None,
        calibrator: Calibrator | None = None,
        positions: Positions = EVERYWHERE,
    ) -> None:
        """Loads the model and the SAE and runs the calibration text.

        `rows` is the number of rows a step that an earlier run recorded; by default `execution.rows`, and where that is `auto`
        as many as the free memory holds. An `engine` given stands for the experiment's model, its hook and its sampling, a
        `calibrator` for its calibration text. Rollouts are steered at `positions`.

        Raises:
            InputError: see `load_model`, `load_sae`, `RolloutEngine`, `calibration_tokens` and `Calibrator`.
        """
        settings = experiment.effects
        self.experiment, self._positions = experiment, positions
        self.model: Any = None if engine else load_model(experiment.model)
        """The model as a `TransformerBridge`; None where an engine was given."""
        self.engine = engine or RolloutEngine(
            self.model, experiment.hook_name, top_k=settings.top_k, temperature=settings.temperature
        )
        self.sae = load_sae(experiment.sae, self.engine.decoder.d_model, self.engine.hook_device)
        self.calibrator = calibrator or Calibrator(
            self.engine.decoder, calibration_tokens(self.engine.tokenizer, settings), scale_rule(settings)
        )
        self._prompts = [tuple(encode(self.engine.tokenizer, prompt, settings.prompt_format)) for prompt in settings.prompts]
        self.rows = rows_per_step(rows or self._rows(), rollouts_per_vector(settings))
        """Rows decoded in one step; halved each time memory runs out."""

    def _rows(self) -> int:
        execution = self.experiment.execution
        if execution.rows != "auto":
            return execution.rows
        if self.engine.device.type == "cpu":
            share = 1.0 if execution.actors == "auto" else 1.0 / execution.actors
        else:
            share = 1.0 if execution.gpus_per_actor == "auto" else min(execution.gpus_per_actor or 1.0, 1.0)
        return rows_that_fit(self.engine.decoder, self.experiment.effects.length, self.sae.cfg.d_sae, share=share)

    def measure(self, items: Sequence[VectorItem]) -> list[Measurement | Failure]:
        """One result an item, in order, each at the scale found for it. See `measure_at`."""
        return self.measure_at(items, self._calibrate(items))

    def measure_at(self, items: Sequence[VectorItem], calibrations: Sequence[Calibration]) -> list[Measurement | Failure]:
        """One result an item, in order, at given scales. The shape of every step is `rows`, whatever the number of items.

        A vector whose loss or activations are not finite is a `Failure`, and leaves its neighbours alone. Where memory runs
        out, `rows` is halved for good and the items are rolled out again.
        """
        scales = [0.0 if found.outcome == "not_finite" else found.scale for found in calibrations]
        while True:
            try:
                sums = self._feature_sums(items, scales)
                break
            except RuntimeError as error:
                if self.rows == 1 or not is_out_of_memory(error):
                    raise
                halved = rows_per_step(self.rows // 2, rollouts_per_vector(self.experiment.effects))
                logger.warning("out of memory at %d rows a step; going on with %d", self.rows, halved)
                self.rows = halved
        return [
            self._result(item, calibration, rollouts)
            for item, calibration, rollouts in zip(items, calibrations, sums, strict=True)
        ]

    def _calibrate(self, items: Sequence[VectorItem]) -> list[Calibration]:
        unsteered = Calibration(0.0, self.calibrator.unsteered_loss, "fixed")
        steered = [item for item in items if item.source != BASELINE]
        found = iter(self.calibrator.calibrate([torch.from_numpy(item.direction) for item in steered]))
        return [unsteered if item.source == BASELINE else next(found) for item in items]

    def _result(
        self, item: VectorItem, calibration: Calibration, sums: Float[Tensor, "prompts rollouts d_sae"]
    ) -> Measurement | Failure:
        settings = self.experiment.effects
        if calibration.outcome == "not_finite":
            return Failure(item, f"the model's loss is not finite at scale {calibration.failed_at:g}")
        rollouts = sums / settings.length
        mean = rollouts.mean(dim=(0, 1))
        if not torch.isfinite(mean).all():
            return Failure(item, f"activations are not finite at scale {calibration.scale:.6g}")
        variance = _error_variance(rollouts)
        return Measurement(
            item=item,
            mean=mean.cpu().numpy(),
            error_variance=variance.mean().item(),
            feature_error_variance=variance.cpu().numpy() if settings.standard_errors == "features" else None,
            calibration=calibration,
            unsteered_loss=self.calibrator.unsteered_loss,
            n_rollouts=rollouts_per_vector(settings),
            n_tokens=rollouts_per_vector(settings) * settings.length,
        )

    def _feature_sums(self, items: Sequence[VectorItem], scales: Sequence[float]) -> list[Tensor]:
        """For each item the feature activations of its rollouts, summed over generated positions, [prompts, rollouts, d_sae].

        Steps have one shape: whole vectors where they fit, with the last vector repeated to fill up; else pieces of one vector,
        with its last row repeated. So the last bits of a row do not depend on how many vectors it was measured with.
        """
        settings = self.experiment.effects
        each = rollouts_per_vector(settings)
        together = max(1, self.rows // each)
        sums: list[Tensor] = []
        for start in range(0, len(items), together):
            some = range(start, min(start + together, len(items)))
            filled = [*some, *[some[-1]] * (together - len(some))]
            vectors = torch.from_numpy(np.stack([items[i].direction * np.float32(scales[i]) for i in filled]))
            rows = [row for place, i in enumerate(filled) for row in self._rollouts(items[i], place)]
            pieces = [rows[at : at + self.rows] for at in range(0, len(rows), self.rows)]
            pieces[-1] += [pieces[-1][-1]] * (self.rows - len(pieces[-1]))
            acts = [self._run(piece, vectors) for piece in pieces]
            whole = torch.cat([part for part in acts if part is not None])[: len(some) * each]
            sums.extend(whole.view(len(some), len(settings.prompts), settings.rollouts, -1))
        return sums

    def _run(self, rows: Sequence[Row], vectors: Tensor) -> Tensor | None:
        return self.engine.run(rows, vectors, self.experiment.effects.length, self._encode, positions=self._positions).sums

    def _rollouts(self, item: VectorItem, place: int) -> list[Row]:
        settings = self.experiment.effects
        owner = noise_owner(item, settings)
        return [
            Row(prompt, row_seed(self.experiment.seed, "effects", owner, which, sample), place)
            for which, prompt in enumerate(self._prompts)
            for sample in range(settings.rollouts)
        ]

    def _encode(self, residual: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_sae"]:
        encoded: Tensor = self.sae.encode(residual.to(self.sae.W_dec.dtype))
        return encoded.float()


def noise_owner(item: VectorItem, settings: Effects) -> str:
    """Whose noise the item's rollouts use: their own, or by `effects.noise = "baseline"` that of one block of the baseline."""
    if item.source == BASELINE or settings.noise == "own":
        return item.vector_id
    return f"{BASELINE}-{int(item.vector_id, 16) % settings.baseline_blocks}"


def scale_rule(settings: Effects) -> ScaleRule:
    """The settings that say how scales are found."""
    return ScaleRule(
        settings.loss_increase, settings.target_loss, settings.fixed_scale, settings.scale_grid, settings.scale_search
    )


def rollouts_per_vector(settings: Effects) -> int:
    """Prompts times rollouts a prompt: 896 in the paper."""
    return len(settings.prompts) * settings.rollouts


def vectors_per_batch(experiment: Experiment) -> int:
    """How many vectors a worker is given at once, from the experiment's rows a step; at least one."""
    rows = experiment.execution.rows
    if rows == "auto":
        rows = most_rows("cuda" if experiment.execution.gpus_per_actor else "cpu")
    return max(1, rows // rollouts_per_vector(experiment.effects))


def rows_per_step(rows: int, rollouts: int) -> int:
    """At most this many rows, in whole vectors of so many rollouts where one fits."""
    return max(1, rows if rows < rollouts else rows // rollouts * rollouts)


def effect_of(mean: NDArray[np.float32], baseline: NDArray[np.float32]) -> NDArray[np.float32]:
    """The effect y(v) [d_sae]: mean activations of steered text minus those of the shared baseline (paper, section 3)."""
    return mean - baseline


def baseline_items(experiment: Experiment, d_model: int) -> list[VectorItem]:
    """The blocks of the shared baseline, each with the rollouts of one vector and its own seeds."""
    zeros = np.zeros(d_model, dtype=np.float32)
    return [VectorItem(f"{BASELINE}-{i}", BASELINE, i, zeros) for i in range(experiment.effects.baseline_blocks)]


def _error_variance(per_rollout: Float[Tensor, "prompts rollouts d_sae"]) -> Float[Tensor, " d_sae"]:
    """Squared standard error of each feature's mean over prompts and rollouts.

    Prompts are fixed, so only the spread within a prompt counts; with one rollout a prompt there is none, and the spread over
    all rollouts stands in (too large rather than too small).
    """
    prompts, rollouts, _ = per_rollout.shape
    if rollouts > 1:
        return per_rollout.var(dim=1).sum(dim=0) / rollouts / prompts**2
    spread = per_rollout.flatten(0, 1)
    return spread.var(dim=0) / prompts if prompts > 1 else torch.full_like(spread[0], torch.nan)


def describe(worker: EffectWorker) -> dict[str, Any]:
    """For the manifest: which weights these are, and the execution shape that decides a text's last bits."""
    return {
        "model_hash": weights_hash(worker.model.original_model),
        "sae_hash": weights_hash(worker.sae),
        "decoder": type(worker.engine.decoder).__name__,
        "rows_per_step": worker.rows,
        "dtype": str(worker.engine.dtype).removeprefix("torch."),
        "device": worker.engine.device.type,
        "threads": torch.get_num_threads(),
    }
