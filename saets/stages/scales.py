"""The scales of the evaluation as L2 lengths, whichever unit they are given in."""

from __future__ import annotations

from saets.distributed.pool import Call
from saets.experiment.config import settings_hash
from saets.experiment.loading import model_settings
from saets.stages.session import Session

DIGITS = 4
"""Significant digits of lengths that are measured: another machine's rounding must not make other scales."""


def scales_of(session: Session) -> tuple[float, ...]:
    """The L2 lengths at which the experiment steers, the same for every vector, in the order of its settings.

    Raises:
        InputError: multiples of the residual stream, and the actors that measure it cannot; see `Calibrator`.
    """
    settings = session.experiment.evaluation
    if settings.scale_unit == "length":
        return settings.scales
    length = residual_length(session)
    return tuple(dict.fromkeys(_rounded(multiple * length) for multiple in settings.scales))


def residual_length(session: Session) -> float:
    """Median L2 length of the residual stream at the hook on the calibration text; measured once a run, and in its manifest.

    Raises:
        InputError: see `Calibrator`.
    """
    experiment = session.experiment
    text = experiment.effects.model_dump(include={"calibration_text", "calibration_chunks", "calibration_length"})
    measured_on = settings_hash([model_settings(experiment), experiment.hook_name, text])
    known = session.run.manifest().get("residual", {})
    if known.get("measured_on") == measured_on:
        return float(known["length"])

    async def main(call: Call) -> float:
        found: float = await call("residual_length")
        return found

    length = _rounded(session.pool.run(main, calls=1))
    session.run.update_stage("residual", {"measured_on": measured_on, "length": length})
    return length


def _rounded(length: float) -> float:
    return float(f"{length:.{DIGITS}g}")
