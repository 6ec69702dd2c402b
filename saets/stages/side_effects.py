"""Side effects of every goal and method at its chosen scale, each measured once, on the actors that hold the model."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from saets.checks import check_goals
from saets.distributed.pool import Call
from saets.effects.worker import Failure, Measurement, baseline_items, vectors_per_batch
from saets.errors import InputError
from saets.experiment.config import settings_hash
from saets.experiment.goal import Goal, goal_features
from saets.experiment.loading import effect_settings
from saets.model import model_shape
from saets.records import VectorItem, content_id
from saets.run_folder.rows import measured_baseline, shared_baseline, side_effect_rows
from saets.scores.disturbance import Shift, shift_of
from saets.stages.effects import recorded_rows
from saets.stages.results import read_outcome, write_results, write_table
from saets.stages.session import Session
from saets.stages.vectors import Pair, read_vectors

CALIBRATION = ("loss_increase", "target_loss", "fixed_scale", "scale_grid", "scale_search")
"""Settings of effects that say nothing here, where scales are given."""


def measure_side_effects(session: Session) -> None:
    """Measure what is missing, and write side_effects.parquet and results.md. A method that chose scale 0 has none.

    Raises:
        InputError: nothing graded yet; too little text; activations that are not finite.
    """
    chosen = _chosen(session)
    identity = _identity(session)
    vectors = read_vectors(session)
    keys = {pair: content_id(identity, vectors[pair].id, scale) for pair, scale in chosen.items() if scale}
    done = session.run.side_effects.ids()
    todo = {key: pair for pair, key in keys.items() if key not in done}
    if todo:
        d_model = model_shape(session.experiment.model)[0]
        items = [VectorItem(key, "chosen", None, vectors[pair].direction.numpy()) for key, pair in todo.items()]
        _measure(session, items, [chosen[pair] for pair in todo.values()], d_model)
    rows = _table(session, keys, {pair: vector.id for pair, vector in vectors.items()})
    if rows is not None:
        write_table(session, "side_effects", rows)
    write_results(session)


def _chosen(session: Session) -> dict[Pair, float]:
    summary = read_outcome(session).summary
    rows = summary.drop_nulls("scale").select("goal", "method", "scale").iter_rows()
    pairs = {(goal.id, method) for goal in check_goals(session.experiment) for method in session.experiment.steering.methods}
    return {(goal, method): scale for goal, method, scale in rows if (goal, method) in pairs}


def _identity(session: Session) -> str:
    """A hash of all that a measurement depends on besides vector and scale."""
    settings = effect_settings(session.experiment)
    settings["effects"] = {name: value for name, value in settings["effects"].items() if name not in CALIBRATION}
    return settings_hash(settings)


def _measure(session: Session, items: list[VectorItem], scales: list[float], d_model: int) -> None:
    run, experiment = session.run, session.experiment
    blocks = [] if run.baseline.shards() else baseline_items(experiment, d_model)
    todo = list(zip([*blocks, *items], [*[0.0] * len(blocks), *scales], strict=True))
    size = vectors_per_batch(experiment)
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]
    rows = recorded_rows(run) if experiment.execution.rows == "auto" else None

    async def main(call: Call) -> list[Measurement | Failure]:
        with session.progress.stage("measuring side effects", len(todo), 0, "vectors") as advance:

            async def measure(batch: list[tuple[VectorItem, float]]) -> list[Measurement | Failure]:
                found: list[Measurement | Failure] = await call("disturb", *map(list, zip(*batch, strict=True)), rows)
                advance(len(found))
                return found

            return [one for batch in await asyncio.gather(*map(measure, batches)) for one in batch]

    found = session.pool.run(main, calls=len(batches))
    for one in found:
        if isinstance(one, Failure):
            raise InputError(f"side effects cannot be measured: {one.reason}; leave that scale out of evaluation.scales")
    measured = [one for one in found if isinstance(one, Measurement)]
    baseline = measured_baseline(measured[: len(blocks)]) if blocks else shared_baseline(run.baseline)
    run.side_effects.write(side_effect_rows(measured[len(blocks) :], baseline))


def _table(session: Session, keys: dict[Pair, str], ids: dict[Pair, str]) -> pl.DataFrame | None:
    """One row a goal and method: loss on held-out text, effect on the target and on all other features."""
    frame = session.run.side_effects.read()
    if frame is None:
        return None
    goals = {goal.id: goal for goal in check_goals(session.experiment)}
    found = {row["vector_id"]: row for row in frame.iter_rows(named=True)}
    rows = []
    for (goal, method), key in keys.items():
        row = found[key]
        effect = np.asarray(row["effect"], dtype=np.float64)
        shift = shift_of(effect, _weights(session, goals[goal], len(effect)), row["standard_error"] ** 2)
        rows.append(
            {"goal": goal, "method": method, "vector_id": ids[goal, method], **_figures(row, shift), "effect": row["effect"]}
        )
    return pl.DataFrame(rows, schema_overrides={"effect": frame.schema["effect"]}) if rows else None


def _figures(row: dict[str, Any], shift: Shift) -> dict[str, Any]:
    return {
        "scale": row["scale"],
        "perplexity": float(np.exp(row["loss"])),
        "unsteered_perplexity": float(np.exp(row["unsteered_loss"])),
        **shift._asdict(),
        "n_rollouts": row["n_rollouts"],
    }


def _weights(session: Session, goal: Goal, d_sae: int) -> NDArray[np.float64]:
    """Weights of the goal's features [d_sae]; all zero where it has none for this experiment."""
    weights = np.zeros(d_sae)
    try:
        features = goal_features(goal, session.experiment).target
    except InputError:
        return weights
    for feature, weight in features:
        weights[feature] += weight
    return weights
