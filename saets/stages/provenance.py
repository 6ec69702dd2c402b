"""What a vector's file says of it: what it was made from, and between which scales it is of use."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from saets.distributed.pool import Call
from saets.engine.calibration import ONSET, ScaleRange
from saets.experiment.config import LOSS_RULES
from saets.experiment.goal import Goal, goal_features
from saets.files.storage import shareable
from saets.generation import steered_positions
from saets.methods import formulas as methods
from saets.stages.ingredients import made_from
from saets.stages.session import Session
from saets.vector.vector import SteeringVector


def provenance(session: Session, goal: Goal, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Facts that decide a vector: names, hashes and settings, without dates, and of paths the last part alone.

    Hashes of model and SAE are those of the weights with which effects were measured, where that was done here.
    """
    experiment = session.experiment
    facts: dict[str, Any] = {
        "model": experiment.model.name,
        "model_revision": experiment.model.revision,
        "goal": goal.id,
        "method": method,
        "options": options,
        "saets_version": metadata.version("saets"),
    }
    worker = session.run.manifest().get("effects", {}).get("worker", {})
    hashes = {"model_hash": worker.get("model_hash")}
    names = set(methods.ingredients_of(method))
    if names & {"target", "decoder_target"}:
        facts["features"] = goal_features(goal, experiment).model_dump(mode="json", exclude_none=True)
    if names - {"positive", "negative"}:
        facts["sae"] = experiment.sae.model_dump(mode="json", exclude_none=True)
        hashes["sae_hash"] = worker.get("sae_hash")
    if "approximator" in names:
        hashes["approximator_sha256"] = hashlib.sha256(session.run.approximator.read_bytes()).hexdigest()
    made = made_from(session, goal, method)
    facts |= {name: made[name] for name in ("max_density", "density_text", "stillness", "rotation") if made.get(name)}
    known: dict[str, Any] = shareable({**facts, **{name: text for name, text in hashes.items() if text}})
    return known


def recommended_scales(session: Session, vectors: Sequence[SteeringVector]) -> list[dict[str, Any]]:
    """The scales between which each vector is of use, found by the pool's actors on the experiment's calibration text.

    Raises:
        InputError: see `Calibrator`.
    """
    with session.progress.stage("calibrating vectors", len(vectors), 0, "vectors") as advance:

        async def main(call: Call) -> list[ScaleRange]:
            async def one(vector: SteeringVector) -> ScaleRange:
                found = await call("scale_range", vector.direction.numpy())
                advance(1)
                return found

            return await asyncio.gather(*(one(vector) for vector in vectors))

        found = session.pool.run(main, calls=len(vectors))
    settings = session.experiment.effects
    rule: dict[str, Any] = {name: value for name in LOSS_RULES if (value := getattr(settings, name)) is not None}
    if not steered_positions(session.experiment).bos:
        rule["bos"] = False
    return [{**_scales(each), **rule} for each in found]


def _scales(found: ScaleRange) -> dict[str, Any]:
    """`low`, `high`, how they were found and the losses measured, as JSON has them: None where there is no such scale."""
    low, high = (None if math.isnan(scale) else _rounded(scale) for scale in (found.low, found.high.scale))
    losses = [[_rounded(scale), _rounded(loss)] for scale, loss in found.losses]
    return {"low": low, "high": high, "outcome": found.high.outcome, "onset": ONSET, "losses": losses}


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")
