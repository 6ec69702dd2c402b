"""Facts for an honest reading of the table: of each goal and method, what its vector was predicted to do and what it did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import polars as pl
import torch
from torch.nn.functional import cosine_similarity

from saets.experiment.goal import load_goal
from saets.methods.formulas import needs
from saets.methods.side_effects import SideEffects
from saets.records import UNSTEERED
from saets.stages.ingredients import Ingredients, Shared
from saets.stages.session import Session
from saets.stages.vectors import read_vectors
from saets.vector.vector import SteeringVector

TABLE = {
    "goal": pl.String,
    "method": pl.String,
    "column_and_row": pl.Float64,
    "column_and_bias": pl.Float64,
    "decoder_gain": pl.Float64,
    "gain": pl.Float64,
    "cost": pl.Float64,
    "calibrated": pl.Float64,
    "scale": pl.Float64,
    "behaviour": pl.Float64,
    "behaviour_se": pl.Float64,
    "coherence": pl.Float64,
    "coherence_se": pl.Float64,
    "lost": pl.Float64,
    "lost_se": pl.Float64,
    "measured_target": pl.Float64,
    "measured_others": pl.Float64,
    "noise": pl.Float64,
}
"""Columns of `reading`.

- `column_and_row`: cosine of M t with the goal's decoder rows; `column_and_bias`: of M t with M b. Both are of the goal alone.
- `decoder_gain`, `gain`: predicted effect on the target, t'M'x, of the unit decoder direction and of the method's vector.
- `cost`: its predicted effect on all other features, (M'x + b)' D (M'x + b), D as for `constrained`.
- `calibrated`: scale at which the loss on other text has risen as far as the experiment's rule says; `scale`: the chosen one.
  Both in units of the residual stream's median length.
- `behaviour`, `coherence`: means at the chosen scale. `lost`: mean of unsteered less steered coherence over prompts and sample
  numbers, which share their noise, for each such unit of scale. `*_se`: standard errors over prompts and sample numbers.
- `measured_target`, `measured_others`, `noise`: from `saets evaluate --side-effects`, at the chosen scale.
"""


def reading(session: Session, texts: pl.DataFrame, chosen: Mapping[tuple[str, str], float], length: float) -> pl.DataFrame:
    """The facts of one run folder; those about features only where its methods steer towards given ones.

    `texts` are those of `results.paired`, `chosen` the scales, `length` the residual stream's.
    """
    shared, vectors = Shared(session), read_vectors(session)
    aimed = any(needs(method, "target") for method in session.experiment.steering.methods)
    measured = _side_effects(session, aimed=aimed)
    rows = []
    for (goal, method), vector in vectors.items():
        scale = chosen.get((goal, method))
        rows.append(
            {
                "goal": goal,
                "method": method,
                **(_predicted(session, shared, goal, vector) if aimed else {}),
                "calibrated": _over(vector.provenance["scales"]["high"], length),
                "scale": _over(scale, length),
                **(_graded(texts, goal, method, scale, length) if scale is not None else {}),
                **measured.get((goal, method, scale), {}),
            }
        )
    return pl.DataFrame(rows, schema=TABLE)


def _predicted(session: Session, shared: Shared, goal_id: str, vector: SteeringVector) -> dict[str, float]:
    goal = next(goal for goal in map(load_goal, session.experiment.steering.goals) if goal.id == goal_id)
    ingredients = Ingredients(goal, session, shared, {})
    target, approximator = ingredients.target, shared.approximator
    column, row = approximator.M @ target, ingredients.decoder_target @ shared.W_dec
    trade = SideEffects(approximator, target, torch.where(target == 0, shared.stillness, 0.0))
    return {
        "column_and_row": cosine_similarity(column, row, dim=0).item(),
        "column_and_bias": cosine_similarity(column, approximator.M @ approximator.b, dim=0).item(),
        "decoder_gain": trade.gain(row / row.norm()),
        "gain": trade.gain(vector.direction),
        "cost": trade.cost(vector.direction),
    }


def _graded(texts: pl.DataFrame, goal: str, method: str, scale: float, length: float) -> dict[str, float]:
    """Means and standard errors at a scale, and what coherence each text loses against the unsteered one of its number."""
    of_goal = texts.filter((pl.col("goal") == goal) & ~pl.col("failed"))
    unsteered = of_goal.filter(pl.col("method") == UNSTEERED)
    steered = of_goal.filter((pl.col("method") == method) & (pl.col("scale") == scale)) if scale else unsteered
    found: dict[str, float] = {}
    for name in ("behaviour", "coherence"):
        found |= {name: _mean(steered[name]), f"{name}_se": _error(steered[name])}
    pairs = steered.join(unsteered, on=("prompt", "sample"), suffix="_before")
    if scale and len(pairs):
        lost = (pairs["coherence_before"] - pairs["coherence"]) / (scale / length)
        found |= {"lost": _mean(lost), "lost_se": _error(lost)}
    return found


def _mean(values: pl.Series) -> Any:
    return values.mean()


def _error(values: pl.Series) -> float | None:
    deviation: Any = values.std()
    return None if deviation is None else deviation / math.sqrt(len(values))


def _over(scale: float | None, length: float) -> float | None:
    return None if scale is None else scale / length


def _side_effects(session: Session, *, aimed: bool) -> dict[tuple[str, str, float], dict[str, float | None]]:
    path = session.run.path / "side_effects.parquet"
    if not path.is_file():
        return {}
    frame = pl.read_parquet(path.read_bytes())
    return {
        (row["goal"], row["method"], row["scale"]): {
            "measured_target": row["target"] if aimed else None,
            "measured_others": row["others"],
            "noise": row["noise"],
        }
        for row in frame.iter_rows(named=True)
    }
