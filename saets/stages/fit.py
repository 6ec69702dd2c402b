"""Stage 2: fit the approximator to all measured effects, own and shipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from saets.distributed import fit as distributed
from saets.errors import InputError
from saets.experiment.config import Experiment, Fit, settings_hash
from saets.experiment.loading import effect_settings
from saets.run_folder.measured import MeasuredRows
from saets.run_folder.shipped import Sums, summed_rows
from saets.stages.pull import stands_in, use_published_effects
from saets.stages.session import Session


def fit_approximator(session: Session) -> None:
    """Fit M and b as a Ray Train job; nothing is done where rows and settings are those of the last fit.

    Where the run has no effects and the experiment names some on the hub, those are fetched and fitted.

    Raises:
        InputError: no effects yet, too few to fit and hold some out, of different shapes, or not finite.
    """
    experiment, run, shipped = session.experiment, session.run, session.shipped()
    tables = [run.effects, *([shipped.effects] if shipped else [])]
    sums = summed_rows(shipped) if shipped else None
    if stands_in(session):
        use_published_effects(session)
        tables = [run.published_effects]
    summed = sums.vector_ids if sums else set()
    ids = [sorted(table.ids() - summed) for table in tables]
    rows = sum(map(len, ids)) + len(summed)
    inputs = _inputs(experiment, ids, sums)
    if run.manifest().get("fit", {}).get("inputs") == inputs and run.approximator.is_file():
        return
    if rows < 3:
        raise InputError(f"{rows} measured effects in {run.path}; run `saets effects` first: a fit needs at least 3 rows")
    with session.progress.stage("fitting the approximator", rows, 0, "rows") as advance:
        approximator, report = distributed.fit(
            MeasuredRows.of(tables, leave_out=summed),
            experiment.fit,
            session.cluster,
            run.fitting,
            seed=experiment.seed,
            gpus=min(session.cluster.layout(experiment).gpus_per_actor, 1),  # more are for a model spread over them
            summed=sums.moments if sums else None,
        )
        advance(rows)
    failed = run.failures.ids() - set().union(*ids)
    published = run.manifest()["published"]["effects"] if tables[0] is run.published_effects else None
    own = 0 if published else len(ids[0])
    if sums:
        report["rows_capped"] += sums.capped
    report = {**report, "rows_own": own, "rows_shipped": rows - own, "rows_failed": len(failed)}
    if published:
        report["effects_from"] = published
        provenance = {"model": experiment.model.name, "hook_name": experiment.hook_name, "fit": report}
    else:
        provenance = {**effect_settings(experiment), "fit": report}
    replace(approximator, provenance=provenance).save(run.approximator)
    run.write_fit(report)
    run.update_manifest(fit={"inputs": inputs})


def is_fitted(session: Session) -> bool:
    """Whether the run's approximator is that of the rows it has, own and shipped, and of its settings."""
    run, shipped = session.run, session.shipped()
    sums = summed_rows(shipped) if shipped else None
    summed = sums.vector_ids if sums else set()
    ids = [sorted(table.ids() - summed) for table in (run.effects, *([shipped.effects] if shipped else []))]
    inputs = _inputs(session.experiment, ids, sums)
    return run.manifest().get("fit", {}).get("inputs") == inputs and run.approximator.is_file()


def _inputs(experiment: Experiment, ids: list[list[str]], sums: Sums | None) -> str:
    """A hash of everything the fit is made from."""
    return settings_hash([fit_settings(experiment.fit), experiment.seed, ids, *([sums.identity()] if sums else [])])


def fit_settings(fit: Fit) -> dict[str, Any]:
    """The settings that decide the fit; one that came later is left out where it changes nothing, so that old fits stay valid."""
    of_solver = {"ridge": {"penalties"}, "adam": {"solver", "learning_rate", "batch_size", "epochs"}}[fit.solver]
    settings = fit.model_dump(mode="json", include={"held_out", "capped_weight", *of_solver})
    if fit.capped_weight == 1:
        del settings["capped_weight"]
    return settings
