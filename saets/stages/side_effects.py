"""Side effects of every goal and method at its chosen scale, each measured once and written when it is there.

The actors that hold the model measure them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from saets.checks import check_goals
from saets.distributed.pool import Call
from saets.effects.worker import Failure, Measurement, baseline_items, vectors_per_batch
from saets.errors import InputError
from saets.experiment.config import SCALE_RULE, settings_hash
from saets.experiment.goal import Goal, goal_features
from saets.experiment.loading import effect_settings
from saets.generation import steered_positions
from saets.model import model_shape
from saets.records import VectorItem, content_id
from saets.run_folder.rows import baseline_rows, mean_of_blocks, shared_baseline, side_effect_rows
from saets.scores.disturbance import Shift, shift_of
from saets.stages.effects import recorded_rows
from saets.stages.results import read_outcome, write_results, write_table
from saets.stages.session import Session
from saets.stages.vectors import Pair, read_vectors
from saets.terminal.progress import Advance
from saets.vector.positions import EVERYWHERE


def measure_side_effects(session: Session) -> None:
    """Measure what is missing, and write side_effects.parquet and results.md. A method that chose scale 0 has none.

    Raises:
        InputError: nothing graded yet; too little text; activations that are not finite.
    """
    chosen = _chosen(session)
    identity = measurement_identity(session)
    vectors = read_vectors(session)
    keys = {pair: content_id(identity, vectors[pair].id, scale) for pair, scale in chosen.items() if scale}
    done = session.run.side_effects.ids()
    todo = {key: pair for pair, key in keys.items() if key not in done}
    if todo:
        items = [VectorItem(key, "chosen", None, vectors[pair].direction.numpy()) for key, pair in todo.items()]
        _measure(session, list(zip(items, map(chosen.__getitem__, todo.values()), strict=True)), identity)
    rows = _table(session, keys, {pair: vector.id for pair, vector in vectors.items()})
    if rows is not None:
        write_table(session, "side_effects", rows)
    write_results(session)


def _chosen(session: Session) -> dict[Pair, float]:
    summary = read_outcome(session).summary
    rows = summary.drop_nulls("scale").select("goal", "method", "scale").iter_rows()
    pairs = {(goal.id, method) for goal in check_goals(session.experiment) for method in session.experiment.steering.methods}
    return {(goal, method): scale for goal, method, scale in rows if (goal, method) in pairs}


def measurement_identity(session: Session) -> str:
    """A hash of all that a measurement depends on besides vector and scale."""
    settings = effect_settings(session.experiment)
    settings["effects"] = {name: value for name, value in settings["effects"].items() if name not in SCALE_RULE}
    if (positions := steered_positions(session.experiment)) != EVERYWHERE:  # as all were measured before there was a choice
        settings["positions"] = positions.to_json()
    return settings_hash(settings)


def _measure(session: Session, items: list[tuple[VectorItem, float]], identity: str) -> None:
    """Measure items at their scales, each written when it is there; before them what is missing of the baseline."""
    run = session.run
    of_run = not run.baseline.is_empty()
    blocks = [] if of_run else _missing_blocks(session, identity)

    def keep_blocks(found: list[Measurement]) -> None:
        rows = baseline_rows(found)
        run.unsteered.write(rows.append_column("settings", pa.array([identity] * len(found))))

    def keep(found: list[Measurement]) -> None:
        run.side_effects.write(side_effect_rows(found, baseline))

    with session.progress.stage("measuring side effects", len(blocks) + len(items), 0, "vectors") as advance:
        _disturb(session, [(block, 0.0) for block in blocks], keep_blocks, advance)
        baseline = shared_baseline(run.baseline) if of_run else mean_of_blocks(_blocks(session, identity))
        _disturb(session, items, keep, advance)


def _blocks(session: Session, identity: str) -> pl.DataFrame:
    """The side effects' own baseline, as far as it is measured."""
    frame = session.run.unsteered.read()
    return pl.DataFrame(schema={"vector_id": pl.String}) if frame is None else frame.filter(pl.col("settings") == identity)


def _missing_blocks(session: Session, identity: str) -> list[VectorItem]:
    there = set(_blocks(session, identity)["vector_id"])
    d_model = model_shape(session.experiment.model)[0]
    return [block for block in baseline_items(session.experiment, d_model) if block.vector_id not in there]


def _disturb(
    session: Session, todo: list[tuple[VectorItem, float]], keep: Callable[[list[Measurement]], None], advance: Advance
) -> None:
    """Have the actors measure items at their scales, and keep what they find.

    Raises:
        InputError: some could not be measured; the others are kept.
    """
    experiment = session.experiment
    size = vectors_per_batch(experiment)
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]
    rows = recorded_rows(session.run) if experiment.execution.rows == "auto" else None
    failures: list[Failure] = []

    async def main(call: Call) -> None:
        async def measure(batch: list[tuple[VectorItem, float]]) -> None:
            found: list[Measurement | Failure] = await call("disturb", *map(list, zip(*batch, strict=True)), rows)
            if measured := [one for one in found if isinstance(one, Measurement)]:
                keep(measured)
            failures.extend(one for one in found if isinstance(one, Failure))
            advance(len(found))

        async with asyncio.TaskGroup() as group:
            for batch in batches:
                group.create_task(measure(batch))

    if batches:
        session.pool.run(main, calls=len(batches))
    if failures:
        raise InputError(f"side effects cannot be measured: {failures[0].reason}; leave that scale out of evaluation.scales")


def _table(session: Session, keys: dict[Pair, str], ids: dict[Pair, str]) -> pl.DataFrame | None:
    """One row a goal and method: loss on held-out text, effect on the target and on all other features."""
    frame = session.run.side_effects.read()
    if frame is None:
        return None
    goals = {goal.id: goal for goal in check_goals(session.experiment)}
    positions = str(steered_positions(session.experiment))
    found = {row["vector_id"]: row for row in frame.iter_rows(named=True)}
    rows = []
    for (goal, method), key in keys.items():
        row = found[key]
        effect = np.asarray(row["effect"], dtype=np.float64)
        shift = shift_of(effect, _weights(session, goals[goal], len(effect)), row["standard_error"] ** 2)
        place = {"goal": goal, "method": method, "vector_id": ids[goal, method], "positions": positions}
        rows.append({**place, **_figures(row, shift), "effect": row["effect"]})
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
