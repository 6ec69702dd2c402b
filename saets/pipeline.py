"""A whole run: effects, fit, vectors, steered text, grades, results, plots; whatever is done already is skipped."""

from __future__ import annotations

from saets.stages.asking import Asking
from saets.stages.effects import measure_effects
from saets.stages.evaluate import check_grading, evaluate
from saets.stages.fit import fit_approximator
from saets.stages.measures import measure_completions
from saets.stages.plot import write_plots
from saets.stages.pull import stands_in, use_published
from saets.stages.results import write_results
from saets.stages.session import Session
from saets.stages.vectors import build_vectors


def run_all(session: Session, *, max_cost: float | None = None) -> None:
    """Every stage in order, or published files instead of the first two where the run has none of its own.

    `max_cost` is what the judge's calls may cost, in US dollars. `checks.check_all` finds most of what is wrong with an
    experiment before this is begun; that a judge's server takes key and model is found out first of all.
    """
    asking = check_grading(session, Asking(max_cost))
    if stands_in(session):
        use_published(session)
    else:
        measure_effects(session)
        fit_approximator(session)
    evaluate(session, build_vectors(session), asking=asking)
    measure_completions(session)
    write_results(session)
    write_plots(session)
