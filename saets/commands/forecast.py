"""`saets forecast`: what a vector will do to every feature, how sure that is, and with `--measure` what it does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import polars as pl
from rich.markup import escape
from rich.table import Table

from saets.commands.common import Commands, add_command, console, opened_run
from saets.commands.looking import add_vector_choice, chosen_vector, say_where_added, say_where_fitted, weighted
from saets.errors import InputError

if TYPE_CHECKING:
    from saets.explore import Run
    from saets.vector.vector import SteeringVector


def add(commands: Commands) -> None:
    """Put the command into the parser."""
    forecast = add_vector_choice(
        add_command(commands, "forecast", _forecast, "predict a vector's effects before generating anything")
    )
    forecast.add_argument("--top", type=int, default=15, help="features shown beside the target's")
    forecast.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="ID:WEIGHT",
        help="features whose gain is shown first; by default those that the vector was made for",
    )
    forecast.add_argument(
        "--labels", metavar="FILE", help=".csv or .parquet with columns feature and label, or .json by feature id"
    )
    forecast.add_argument("--measure", action="store_true", help="measure the vector too, by the experiment's effect settings")
    forecast.add_argument("--force", action="store_true", help="take a vector of another model or hook")


def _forecast(options: argparse.Namespace) -> None:
    from saets.checks import check_vector
    from saets.features.labels import read_labels
    from saets.forecast.prediction import target_of, target_weights

    if options.top < 0:
        raise InputError(f"--top is {options.top}; expected 0 or more")
    labels = read_labels(options.labels) if options.labels else {}
    wanted = weighted(options.target, "--target")
    run = opened_run(options)
    vector = chosen_vector(run, options)
    check_vector(run.experiment, vector, force=options.force)
    say_where_added(run, vector)
    if not options.feature:
        say_where_fitted(run)
    target = wanted or target_of(vector, run.experiment)
    if target:
        target_weights(target, len(run.approximator.b))
    found = run.forecast(
        vector, top=options.top, features=list(target), measure=options.measure, labels=labels, force=options.force
    )
    console.print(_table(found, target))
    for line in _facts(run, vector, target, measured=options.measure, force=options.force):
        console.print(line, markup=False)


def _table(found: pl.DataFrame, target: dict[int, float]) -> Table:
    """The target's features marked by their weights; the others, by size of their predicted effect."""
    measured = "measured" in found.columns
    labelled = found["label"].is_not_null().any()
    table = Table(box=None, pad_edge=False)
    for name in ("feature", "target", "predicted", "common", "R2", *(("measured", "s.e.") if measured else ())):
        table.add_column(name, no_wrap=True)
    if labelled:
        table.add_column("about")
    for row in found.iter_rows(named=True):
        weight = f"{target[row['feature']]:g}" if row["feature"] in target else ""
        r2 = "" if row["feature_r2"] is None else f"{row['feature_r2']:.2f}"
        cells = [str(row["feature"]), weight, f"{row['predicted']:+.4f}", f"{row['common']:+.4f}", r2]
        cells += [f"{row['measured']:+.4f}", f"{row['standard_error']:.4f}"] if measured else []
        table.add_row(*cells, *([escape(row["label"] or "")] if labelled else []))
    return table


def _facts(run: Run, vector: SteeringVector, target: dict[int, float], *, measured: bool, force: bool) -> list[str]:
    """What is known beside the table, a line each."""
    from saets.forecast.prediction import gain

    lines = []
    if not vector.positions.everywhere:
        lines.append(f"this vector steers {vector.positions}; its effects are those at every position")
    if target:
        found = gain(run.approximator, vector, target)
        share = f" ({found.predicted / found.best:.0%})" if found.best > 0 else ""
        lines.append(f"target: predicted {found.predicted:+.4f}, of at most {found.best:+.4f} for any vector{share}")
    try:
        lines += _standing(run, vector)
    except InputError as error:
        lines.append(f"reach: not known; {error}")
    if measured:
        lines.append(_measured(run, vector, force))
    return lines


def _standing(run: Run, vector: SteeringVector) -> list[str]:
    evidence = run.evidence
    reach = evidence.reach(vector)
    everywhere, near = evidence.record(), evidence.record(reach.leverage)
    lines = [
        f"reach: leverage {reach.leverage:.3f}, {reach.times_median:.2f} times the median of {everywhere.vectors} measured "
        f"vectors; {reach.share_nearer:.0%} of them lie nearer",
        f"such predictions on vectors left out of the fit: R2 {everywhere.r2:.2f}, cosine {everywhere.cosine:.2f} on all "
        f"{everywhere.vectors}; R2 {near.r2:.2f}, cosine {near.cosine:.2f} on the {near.vectors} nearest in leverage",
    ]
    if reach.fitted:
        lines.append("this vector is one of those fitted: what was measured of it is in its prediction")
    return lines


def _measured(run: Run, vector: SteeringVector, force: bool) -> str:
    found = run.measure(vector, force=force)
    capped = ", where the grid ended" if found.calibration.outcome == "capped" else ""
    line = f"measured: {found.n_rollouts} rollouts at scale {found.calibration.scale:.3g}{capped}"
    try:
        agreement = run.agreement(vector, force=force)
    except InputError:
        return line
    return f"{line}; this prediction's R2 {agreement.r2:.2f}, cosine {agreement.cosine:.2f}"
