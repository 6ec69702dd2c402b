"""The effect of one vector, measured in this process as `saets effects` measures it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saets.effects.worker import EffectWorker, Failure, Measurement, baseline_items, effect_of
from saets.engine.calibration import Calibration
from saets.engine.rollout import RolloutEngine
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.model import weights_hash
from saets.records import VectorItem
from saets.run_folder.rows import Baseline, measured_baseline, shared_baseline
from saets.run_folder.shipped import check_weights, shipped_effects
from saets.run_folder.store import RunFolder
from saets.vector.vector import SteeringVector


class MeasuredEffect(NamedTuple):
    """What a vector did to every feature."""

    effect: NDArray[np.float32]
    """[d_sae], at the calibrated scale, float32."""
    standard_error: NDArray[np.float32]
    """[d_sae], over rollouts. The baseline's own is in it where that is known of each feature, as in a baseline measured here."""
    calibration: Calibration
    n_rollouts: int


def measure_vector(run: RunFolder, experiment: Experiment, model: Any, vector: SteeringVector) -> MeasuredEffect:
    """The effect of a vector by the experiment's own effect settings, with the noise that `saets effects` gives it.

    The baseline is the run's, else the shipped one; where neither is complete it is measured too. `model` is the experiment's,
    as a `TransformerBridge`. Nothing is written.

    Raises:
        InputError: a baseline of other weights; a vector whose loss or activations are not finite; see `EffectWorker`.
    """
    settings = experiment.effects.model_copy(update={"standard_errors": "features"})
    engine = RolloutEngine(model, experiment.hook_name, top_k=settings.top_k, temperature=settings.temperature)
    worker = EffectWorker(experiment.model_copy(update={"effects": settings}), engine=engine)
    baseline = _baseline(run, experiment, model, worker)
    found = worker.measure([VectorItem(vector.id, "forecast", None, vector.direction.numpy())])[0]
    if isinstance(found, Failure):
        raise InputError(f"the vector could not be measured: {found.reason}")
    assert found.feature_error_variance is not None
    variance = found.feature_error_variance + (
        0.0 if baseline.feature_error_variance is None else baseline.feature_error_variance
    )
    return MeasuredEffect(effect_of(found.mean, baseline.mean), np.sqrt(variance), found.calibration, found.n_rollouts)


def _baseline(run: RunFolder, experiment: Experiment, model: Any, worker: EffectWorker) -> Baseline:
    for find in (lambda: run, lambda: shipped_effects(experiment)):
        there = find()
        if there is not None and len(there.baseline.ids()) == experiment.effects.baseline_blocks:
            dtype = str(worker.engine.dtype).removeprefix("torch.")
            hashes = {"model_hash": weights_hash(model.original_model), "sae_hash": weights_hash(worker.sae)}
            check_weights(there, {**hashes, "dtype": dtype})
            return shared_baseline(there.baseline)
    blocks = worker.measure(baseline_items(experiment, worker.engine.decoder.d_model))
    for block in blocks:
        if isinstance(block, Failure):
            raise InputError(f"the unsteered baseline could not be measured: {block.reason}; run `saets doctor`")
    measured = [block for block in blocks if isinstance(block, Measurement)]
    return measured_baseline(measured)
