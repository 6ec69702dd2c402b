"""Commands that run stages and write a run folder, and what they show at the end."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from saets.commands.common import Commands, add_command, add_max_cost, console, errors, experiment_of, session_of, show_path
from saets.errors import InputError
from saets.experiment.config import HUB_NAME
from saets.experiment.loading import load_experiment, preset_names
from saets.files.storage import locate
from saets.terminal.display import shown_progress

if TYPE_CHECKING:
    from saets.stages.session import Session
    from saets.vector.vector import SteeringVector


def add(commands: Commands) -> None:
    """Put these commands into the parser."""
    add_command(commands, "presets", _presets, "list the experiments that come with the package", experiment=False)
    run = add_command(commands, "run", _run, "every stage, skipping what is done")
    run.add_argument("--measure", action="store_true", help="fit only effects measured here, not those that come with the preset")
    effects = add_command(commands, "effects", _effects, "measure what each vector does to every feature")
    effects.add_argument("--retry-failed", action="store_true", help="try vectors again that could not be measured")
    add_command(commands, "fit", _fit, "fit the linear map from vectors to effects")
    add_command(commands, "vectors", _vectors, "build the vector of every goal and method")
    add_command(commands, "generate", _generate, "write steered text")
    grade = add_command(commands, "grade", _grade, "grade the text that is there")
    evaluate = add_command(commands, "evaluate", _evaluate, "write and grade steered text, both at once")
    evaluate.add_argument(
        "--side-effects", action="store_true", help="also measure what each method does at its scale to other text and features"
    )
    for grading in (grade, evaluate):
        grading.add_argument("--retry-failed", action="store_true", help="grade texts again whose grading failed")
    for grading in (run, grade, evaluate):
        add_max_cost(grading)
    plot = add_command(commands, "plot", _plot, "draw the plots of what is measured and graded")
    plot.add_argument("--goal", action="append", default=[], dest="goals", help="draw this goal alone; may be repeated")
    plot.add_argument("--method", action="append", default=[], dest="methods", help="draw this method alone; may be repeated")
    plot.add_argument(
        "--size",
        choices=("screen", "page", "column"),
        default="screen",
        help="for a screen, or 6.75 or 3.25 inches wide for a paper, with letters of 6.5 to 8 points and no title",
    )
    plot.add_argument(
        "--format",
        choices=("html", "svg", "png", "pdf"),
        action="append",
        default=[],
        dest="formats",
        help="may be repeated; by default html, svg and png",
    )
    plot.add_argument("--to", metavar="FOLDER", help="where to write them (path or URI); by default plots/ in the run folder")
    doctor = add_command(
        commands, "doctor", _doctor, "check that hooks, logits and effects are what the method takes for granted"
    )
    doctor.add_argument(
        "--cluster", action="store_true", help="check the nodes instead: GPUs, packages, shared storage, keys in the open"
    )
    pull = add_command(commands, "pull", _pull, "fetch the published files that an experiment names into its run folder")
    pull.add_argument("--effects", action="store_true", help="also the measured effects, which may take gigabytes")
    push = add_command(commands, "push", _push, "put a run's approximator, vectors, effects and results on the hub")
    push.add_argument("repo", metavar="OWNER/NAME")
    push.add_argument("--repo-type", choices=("dataset", "model"), default="dataset")
    push.add_argument("--private", action="store_true", help="where the repository is new, for you alone")
    push.add_argument("--no-effects", action="store_true", help="leave the measured effects out")


def _presets(options: argparse.Namespace) -> None:
    table = Table("preset", "model", "SAE", "what it is", box=None, pad_edge=False)
    for name in preset_names():
        experiment = load_experiment(name)
        sae = experiment.sae.id or experiment.sae.path or f"random, {experiment.sae.d_sae} features"
        table.add_row(*(escape(text) for text in (name, experiment.model.name, sae, experiment.description)))
    console.print(table)


def _run(options: argparse.Namespace) -> None:
    from saets.pipeline import run_all

    with session_of(options, goals=True, judge=True, measure=options.measure) as session:
        run_all(session, max_cost=options.max_cost)
        _show_outcome(session)


def _effects(options: argparse.Namespace) -> None:
    from saets.stages.effects import measure_effects

    with session_of(options) as session:
        measure_effects(session, retry_failed=options.retry_failed)
        show_path("effects", session.run.effects.folder)
        _show_storage(session.run.manifest()["effects"].get("storage"))


def _fit(options: argparse.Namespace) -> None:
    from saets.stages.fit import fit_approximator

    with session_of(options) as session:
        fit_approximator(session)
        _show_fit(session)


def _pull(options: argparse.Namespace) -> None:
    from saets.stages.pull import pull

    with session_of(options, checked=False) as session:
        pull(session, effects=options.effects)
        _show_fit(session)
        if session.run.published_effects.shards():
            show_path("published effects", session.run.published_effects.folder)


def _push(options: argparse.Namespace) -> None:
    from saets.hub.client import Source
    from saets.stages.push import push

    run = locate(options.out or options.experiment)
    if not re.fullmatch(HUB_NAME, options.repo):
        raise InputError(f"{options.repo!r} names no repository of the hub; expected OWNER/NAME")
    if not (run / "experiment.toml").is_file():
        raise InputError(f"no run folder at {run}; give one that a run has written, e.g. `saets push runs/smollm2 OWNER/NAME`")
    with shown_progress(errors, options.progress) as progress:
        target = Source(options.repo, options.repo_type)
        url = push(run, target, progress, private=options.private, effects=not options.no_effects)
    console.print(f"pushed to {url}", markup=False)


def _vectors(options: argparse.Namespace) -> None:
    from saets.stages.vectors import build_vectors

    with session_of(options, goals=True) as session:
        _show_scales(build_vectors(session))
        show_path("vectors", session.run.path / "vectors")


def _generate(options: argparse.Namespace) -> None:
    _texts(options, generate=True, grade=False)


def _grade(options: argparse.Namespace) -> None:
    _texts(options, generate=False, grade=True)


def _evaluate(options: argparse.Namespace) -> None:
    _texts(options, generate=True, grade=True)


def _texts(options: argparse.Namespace, *, generate: bool, grade: bool) -> None:
    from saets.stages.asking import Asking
    from saets.stages.evaluate import check_grading, evaluate
    from saets.stages.measures import measure_completions
    from saets.stages.results import write_results
    from saets.stages.side_effects import measure_side_effects
    from saets.stages.vectors import build_vectors, read_vectors

    with session_of(options, goals=True, judge=grade) as session:
        asking = Asking(options.max_cost, options.retry_failed) if grade else Asking()
        if generate and grade:
            asking = check_grading(session, asking)
        vectors = build_vectors(session) if generate else read_vectors(session)
        evaluate(session, vectors, generate=generate, grade=grade, asking=asking)
        if generate:
            measure_completions(session)
        if grade:
            write_results(session)
            if generate and options.side_effects:
                measure_side_effects(session)
            _show_outcome(session)
        else:
            show_path("completions", session.run.generations.folder)


def _plot(options: argparse.Namespace) -> None:
    from saets.plots import DEFAULT_FORMATS, SIZES
    from saets.stages.plot import Wanted, write_plots

    wanted = Wanted(
        options.goals,
        options.methods,
        SIZES[options.size],
        options.formats or DEFAULT_FORMATS,
        locate(options.to) if options.to else None,
    )
    with session_of(options) as session:
        show_path("plots", write_plots(session, wanted))


def _doctor(options: argparse.Namespace) -> int:
    from saets.checks import check_experiment
    from saets.distributed.cluster import on_cluster
    from saets.distributed.examination import examine_cluster, examine_secrets
    from saets.doctor import examine

    experiment, out = experiment_of(options)
    check_experiment(experiment)
    failed = 0
    if options.cluster:
        findings = examine_cluster(experiment, out, verbose=options.verbose)
    else:
        findings = itertools.chain(examine(experiment), [examine_secrets()] if on_cluster() else [])
    for finding in findings:
        failed += not finding.ok
        console.print(f"{'ok' if finding.ok else 'FAILED':<7} {finding.check:<15} {finding.detail}", markup=False)
    return 1 if failed else 0


def _show_outcome(session: Session) -> None:
    from saets.judge.failures import most_frequent
    from saets.plots.looks import display_names
    from saets.stages.results import graded_texts, read_outcome, samples

    outcome = read_outcome(session)
    names = display_names(outcome.scores["method"])
    table = Table("goal", "method", "score", "95% interval", "", "scale", "optimistic max", box=None, pad_edge=False)
    for row in outcome.scores.iter_rows(named=True):
        table.add_row(
            escape(row["goal"]),
            names.get(row["method"], row["method"]),
            _number(row["held_out"]),
            f"{_number(row['held_out_low'])} to {_number(row['held_out_high'])}",
            {"winner": "winner", "tie": "tie"}.get(row["standing"], ""),
            _number(row["scale"], ".0f"),
            _number(row["optimistic_max"]),
        )
    console.print("\nScore: mean behaviour x mean coherence, scale chosen on one half of the samples and scored on the other.")
    console.print(table)
    failed = int(outcome.texts["failed"].sum())
    if failed:
        texts, grades = graded_texts(session)
        reasons = grades.join(texts, on="generation_id", how="semi")["error"].drop_nulls()
        console.print(f"{failed} of {len(outcome.texts)} texts could not be graded; they count in no score:")
        for reason in most_frequent(reasons):
            console.print(f"  {reason}", markup=False)
    console.print("\nSamples at each method's best scale:")
    for goal, method, scale, text in samples(session):
        console.print(f"  {goal} · {names.get(method, method)} · {scale:g}: {' '.join(text.split())}", markup=False)
    console.print()
    _show_fit(session)
    there = session.run.path.entries()
    for what in ("results.parquet", "results.md", "vectors", "plots"):
        if what in there:
            show_path(what, session.run.path / what)


def _show_fit(session: Session) -> None:
    import json

    report = json.loads((session.run.path / "fit.json").read_text())
    if origin := report.get("published"):
        console.print(f"approximator: {origin['file']} of {origin['repo']}, commit {origin['commit'][:12]}", markup=False)
        show_path("approximator", session.run.approximator)
        return
    held_out = report["held_out"]
    console.print(
        f"approximator: {report['rows_train'] + report['rows_held_out']} rows ({report['rows_own']} measured here, "
        f"{report['rows_shipped']} shipped), held-out R2 {_number(held_out['r2'])}, cosine {held_out['cosine']:.3f}"
    )
    show_path("approximator", session.run.approximator)


def _show_scales(vectors: Mapping[tuple[str, str], SteeringVector]) -> None:
    table = Table("goal", "method", "scales", "", box=None, pad_edge=False)
    for (goal, method), vector in vectors.items():
        scales = vector.provenance.get("scales", {})
        ends = f"{_number(scales.get('low'), '.3g')} to {_number(scales.get('high'), '.3g')}"
        table.add_row(escape(goal), method, ends, "" if scales.get("outcome") in ("ok", None) else scales["outcome"])
    console.print(table)


def _show_storage(storage: Mapping[str, Any] | None) -> None:
    if storage is None:
        return
    share = storage["rounding_rms"] / storage["standard_error_rms"] if storage["standard_error_rms"] else float("nan")
    console.print(
        f"stored in {storage['dtype']}: {storage['megabytes_per_10000_vectors']:.3g} MB per 10,000 vectors; rounding errs by "
        f"{storage['rounding_rms']:.2g} (RMS), {share:.2%} of the effects' standard error",
        markup=False,
    )


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)
