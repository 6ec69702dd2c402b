"""Stage 2: fit the approximator to all measured effects, own and shipped."""

from __future__ import annotations

import json

import polars as pl

from saets.approximator import EffectApproximator
from saets.config import settings_hash
from saets.distributed import fit as distributed
from saets.errors import InputError
from saets.stages.session import Session, effect_settings
from saets.store import write_whole


def fit_approximator(session: Session) -> None:
    """Fit M and b as a Ray Train job; nothing is done where rows and settings are those of the last fit.

    Raises:
        InputError: no effects yet, or too few to fit and hold some out.
    """
    experiment, run, shipped = session.experiment, session.run, session.shipped()
    tables = [run.effects, *([shipped.effects] if shipped else [])]
    ids = [sorted(table.ids()) for table in tables]
    rows = sum(map(len, ids))
    inputs = settings_hash([experiment.fit.model_dump(mode="json", exclude={"workers"}), experiment.seed, ids])
    if run.manifest().get("fit", {}).get("inputs") == inputs and run.approximator.is_file():
        return
    if rows < 3:
        raise InputError(f"{rows} measured effects in {run.path}; run `saets effects` first: a fit needs at least 3 rows")
    shards = [shard for table in tables for shard in table.shards()]
    first = pl.read_parquet(shards[0], n_rows=1)
    with session.progress.stage("fitting the approximator", rows, 0, "rows") as advance:
        approximator, report = distributed.fit(
            shards,
            experiment.fit,
            session.cluster,
            seed=experiment.seed,
            d_model=first["vector"].to_numpy().shape[1],
            d_sae=first["effect"].to_numpy().shape[1],
            gpus=min(experiment.execution.gpus_per_actor, 1),  # more are for a model spread over them
        )
        advance(rows)
    report = {**report, "rows_own": len(ids[0]), "rows_shipped": rows - len(ids[0])}
    provenance = {**effect_settings(experiment), "fit": report}
    EffectApproximator(approximator.M, approximator.b, provenance).save(run.approximator)
    write_whole(run.path / "fit.json", json.dumps(report, indent=1) + "\n")
    run.update_stage("fit", {"inputs": inputs})
