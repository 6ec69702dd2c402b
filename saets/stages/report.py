"""The report of a finished run: everything that is there, as one HTML file; only read, on this machine alone."""

from __future__ import annotations

import json
from typing import Any

from saets.checks import check_goals
from saets.errors import InputError
from saets.files.storage import Location
from saets.report.contents import contents
from saets.report.findings import Findings
from saets.report.page import page
from saets.scores.agreement import agreement_table
from saets.scores.results import measure_table, results_table
from saets.stages.results import all_grades, battles_of, graded_texts, read_outcome, side_effects_of
from saets.stages.session import Session
from saets.stages.vectors import read_vectors


def write_report(session: Session, file: Location | None = None) -> Location:
    """Write the report, by default as report.html in the run folder; returns the file.

    Raises:
        InputError: nothing to report yet (says which stage is missing), or the file cannot be written.
    """
    file = file or session.run.path / "report.html"
    file.write_bytes(page(contents(findings(session))))
    return file


def findings(session: Session) -> Findings:
    """What the run folder has.

    Raises:
        InputError: vectors, completions or grades are missing; says which command makes them.
    """
    run, seed = session.run, session.experiment.seed
    outcome = read_outcome(session)
    measures = run.measures.read()
    by_scale = measure_table(outcome.generations, measures, ("goal", "method", "scale"))
    agreement = agreement_table(outcome.generations, all_grades(session), seed=seed)
    return Findings(
        session.experiment,
        run.manifest(),
        check_goals(session.experiment),
        outcome.generations,
        graded_texts(session)[1],
        outcome.texts,
        results_table(outcome.texts, seed=seed),
        outcome.compared,
        vectors={pair: {**vector.provenance, "id": vector.id} for pair, vector in read_vectors(session).items()},
        fit=_fit_report(session),
        measures=by_scale if len(by_scale) else None,
        side_effects=side_effects_of(session, outcome),
        battles=battles_of(session, outcome),
        agreement=agreement if len(agreement) else None,
        effects=run.effects.read(["vector_id", "scale", "calibration"]),
        failures=run.failures.read(["vector_id", "source", "index", "reason"]),
    )


def _fit_report(session: Session) -> dict[str, Any] | None:
    path = session.run.path / "fit.json"
    if not path.is_file():
        return None
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); move it away and run `saets fit` again") from error
    return report
