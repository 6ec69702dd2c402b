"""Stage 2: fit the approximator to all measured effects, own and shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from saets.approximator import EffectApproximator
from saets.config import settings_hash
from saets.distributed import fit as distributed
from saets.errors import InputError
from saets.stages.session import Session, effect_settings
from saets.store import Table, read_shard


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
    with session.progress.stage("fitting the approximator", rows, 0, "rows") as advance:
        approximator, report = distributed.fit(
            measured_rows(tables),
            experiment.fit,
            session.cluster,
            seed=experiment.seed,
            gpus=min(experiment.execution.gpus_per_actor, 1),  # more are for a model spread over them
        )
        advance(rows)
    report = {**report, "rows_own": len(ids[0]), "rows_shipped": rows - len(ids[0])}
    provenance = {**effect_settings(experiment), "fit": report}
    EffectApproximator(approximator.M, approximator.b, provenance).save(run.approximator)
    (run.path / "fit.json").write_text(json.dumps(report, indent=1) + "\n")
    run.update_stage("fit", {"inputs": inputs})


def measured_rows(tables: Sequence[Table]) -> Iterator[pa.Table]:
    """Vectors, effects and their standard errors, a shard at a time, newest first and each vector once."""
    seen: set[str] = set()
    for table in tables:
        for shard in reversed(table.shards()):
            rows = read_shard(shard, ["vector_id", "vector", "effect", "standard_error"])
            fresh = pc.invert(pc.is_in(rows["vector_id"], pa.array(list(seen), pa.string())))
            seen |= set(rows["vector_id"].to_pylist())
            yield rows.filter(fresh)
