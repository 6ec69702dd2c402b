"""The command line: words to one stage. Logging, `.env` and progress are set up here and nowhere else."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saets.config import HUB_NAME, Experiment
from saets.errors import InputError
from saets.experiment import load_experiment, preset_names
from saets.storage import Location, locate
from saets.terminal import shown_progress

if TYPE_CHECKING:
    from saets.explore import Run
    from saets.stages.session import Session
    from saets.vector import SteeringVector

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where doctor found something, 2 for bad input, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not options.verbose:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it sets its own level when it is imported
        for name in ("transformers", "sae_lens"):
            logging.getLogger(name).setLevel(logging.ERROR)
    _read_env()
    command: Callable[[argparse.Namespace], int | None] = options.command
    try:
        return command(options) or 0
    except InputError as error:
        errors.print(f"saets: {' '.join(str(error).split())}", markup=False)
        return 2
    except KeyboardInterrupt:
        errors.print("saets: stopped; run the same command again to go on from here", markup=False)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saets", description="Steer language models by targeting the features of an SAE.")
    parser.add_argument("--verbose", action="store_true", help="show what Ray and the libraries say")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        if name != "presets":
            added.add_argument("experiment", help="a preset name, a TOML file, or a run folder (path or URI)")
            added.add_argument(
                "--out",
                help="run folder: a path, or a URI such as s3://bucket/folder; by default the run folder itself, else runs/NAME",
            )
            added.add_argument(
                "--progress",
                choices=("auto", "bars", "lines", "none"),
                default="auto",
                help="bars, or lines for a log file; by default bars in a terminal and lines in a Ray job's log",
            )
            added.add_argument(
                "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides", help="change one setting"
            )
        return added

    add("presets", _presets, "list the experiments that come with the package")
    run = add("run", _run, "every stage, skipping what is done")
    run.add_argument("--measure", action="store_true", help="fit only effects measured here, not those that come with the preset")
    effects = add("effects", _effects, "measure what each vector does to every feature")
    effects.add_argument("--retry-failed", action="store_true", help="try vectors again that could not be measured")
    add("fit", _fit, "fit the linear map from vectors to effects")
    add("vectors", _vectors, "build the vector of every goal and method")
    add("generate", _generate, "write steered text")
    add("grade", _grade, "grade the text that is there")
    add("evaluate", _evaluate, "write and grade steered text, both at once")
    add("plot", _plot, "draw the plots of what is graded")
    add("doctor", _doctor, "check that hooks, logits and effects are what the method takes for granted")
    pull = add("pull", _pull, "fetch the published files that an experiment names into its run folder")
    pull.add_argument("--effects", action="store_true", help="also the measured effects, which may take gigabytes")
    push = add("push", _push, "put a run's approximator, vectors, effects and results on the hub")
    push.add_argument("repo", metavar="OWNER/NAME")
    push.add_argument("--repo-type", choices=("dataset", "model"), default="dataset")
    push.add_argument("--private", action="store_true", help="where the repository is new, for you alone")
    push.add_argument("--no-effects", action="store_true", help="leave the measured effects out")
    steer = _add_vector_choice(add("steer", _steer, "show unsteered and steered text side by side"))
    steer.add_argument("--scale", type=float, action="append", required=True, help="L2 length to add; may be given several times")
    steer.add_argument("--prompt", default="I think")
    steer.add_argument("--samples", type=int, default=3)
    steer.add_argument("--seed", type=int, default=0)
    forecast = _add_vector_choice(add("forecast", _forecast, "predict a vector's effects before generating anything"))
    forecast.add_argument("--top", type=int, default=15)
    return parser


def _add_vector_choice(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--vector", help="a vector file (path or URI)")
    parser.add_argument("--goal", help="with --method: a vector of the run")
    parser.add_argument("--method", help="with --goal")
    parser.add_argument("--feature", action="append", default=[], metavar="ID:WEIGHT", help="SAE-TS for chosen features")
    return parser


def _presets(options: argparse.Namespace) -> None:
    table = Table("preset", "model", "SAE", "what it is", box=None, pad_edge=False)
    for name in preset_names():
        experiment = load_experiment(name)
        sae = experiment.sae.id or experiment.sae.path or f"random, {experiment.sae.d_sae} features"
        table.add_row(*(escape(text) for text in (name, experiment.model.name, sae, experiment.description)))
    console.print(table)


def _run(options: argparse.Namespace) -> None:
    from saets.pipeline import run_all

    with _session(options, goals=True, judge=True, measure=options.measure) as session:
        run_all(session)
        _show_outcome(session)


def _effects(options: argparse.Namespace) -> None:
    from saets.stages.effects import measure_effects

    with _session(options) as session:
        measure_effects(session, retry_failed=options.retry_failed)
        _show_path("effects", session.run.effects.folder)
        _show_storage(session.run.manifest()["effects"].get("storage"))


def _fit(options: argparse.Namespace) -> None:
    from saets.stages.fit import fit_approximator

    with _session(options) as session:
        fit_approximator(session)
        _show_fit(session)


def _pull(options: argparse.Namespace) -> None:
    from saets.stages.pull import pull

    with _session(options, checked=False) as session:
        pull(session, effects=options.effects)
        _show_fit(session)
        if session.run.published_effects.shards():
            _show_path("published effects", session.run.published_effects.folder)


def _push(options: argparse.Namespace) -> None:
    from saets.hub import Source
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

    with _session(options, goals=True) as session:
        build_vectors(session)
        _show_path("vectors", session.run.path / "vectors")


def _generate(options: argparse.Namespace) -> None:
    _texts(options, generate=True, grade=False)


def _grade(options: argparse.Namespace) -> None:
    _texts(options, generate=False, grade=True)


def _evaluate(options: argparse.Namespace) -> None:
    _texts(options, generate=True, grade=True)


def _texts(options: argparse.Namespace, *, generate: bool, grade: bool) -> None:
    from saets.stages.evaluate import evaluate
    from saets.stages.results import write_results
    from saets.stages.vectors import build_vectors, read_vectors

    with _session(options, goals=True, judge=grade) as session:
        vectors = build_vectors(session) if generate else read_vectors(session)
        evaluate(session, vectors, generate=generate, grade=grade)
        if grade:
            write_results(session)
            _show_outcome(session)
        else:
            _show_path("completions", session.run.generations.folder)


def _plot(options: argparse.Namespace) -> None:
    from saets.stages.results import write_plots

    with _session(options) as session:
        write_plots(session)
        _show_path("plots", session.run.path / "plots")


def _doctor(options: argparse.Namespace) -> int:
    from saets.checks import check_experiment
    from saets.doctor import examine

    experiment, _ = _experiment(options)
    check_experiment(experiment)
    failed = 0
    for finding in examine(experiment):
        failed += not finding.ok
        console.print(f"{'ok' if finding.ok else 'FAILED':<7} {finding.check:<15} {finding.detail}", markup=False)
    return 1 if failed else 0


def _steer(options: argparse.Namespace) -> None:
    run = _opened(options)
    vector = _chosen_vector(run, options)
    choice = {"samples": options.samples, "seed": options.seed, "new_tokens": run.experiment.evaluation.new_tokens}
    columns = [("unsteered", run.complete(options.prompt, **choice))]
    columns += [(f"scale {scale:g}", run.complete(options.prompt, vector, scale=scale, **choice)) for scale in options.scale]
    table = Table(*(name for name, _ in columns), show_lines=True)
    for texts in zip(*(texts for _, texts in columns), strict=True):
        table.add_row(*(escape(options.prompt + text) for text in texts))
    console.print(table)


def _forecast(options: argparse.Namespace) -> None:
    run = _opened(options)
    chosen = [feature for feature, _ in map(_feature, options.feature)]
    table = Table("feature", "predicted effect", box=None, pad_edge=False)
    for feature, predicted in run.forecast(_chosen_vector(run, options), top=options.top, features=chosen).iter_rows():
        table.add_row(str(feature), f"{predicted:+.4f}")
    console.print(table)


def _chosen_vector(run: Run, options: argparse.Namespace) -> SteeringVector:
    from saets.vector import SteeringVector

    given = [name for name in ("vector", "goal", "feature") if getattr(options, name)]
    if len(given) != 1 or bool(options.goal) != bool(options.method):
        raise InputError("choose one vector: --vector FILE, or --goal GOAL --method METHOD, or --feature ID:WEIGHT (repeatable)")
    if options.vector:
        return SteeringVector.load(options.vector)
    if options.goal:
        return run.vector(options.goal, options.method)
    return run.target(dict(map(_feature, options.feature)), bias_weight=run.experiment.steering.bias_weight)


def _feature(text: str) -> tuple[int, float]:
    number, _, weight = text.partition(":")
    try:
        return int(number), float(weight or 1)
    except ValueError as error:
        raise InputError(f"--feature {text!r}: expected ID:WEIGHT, e.g. --feature 123:0.5") from error


@contextlib.contextmanager
def _session(
    options: argparse.Namespace, *, checked: bool = True, goals: bool = False, judge: bool = False, measure: bool = False
) -> Iterator[Session]:
    """The experiment in its run folder, made only after what the command needs of it has been checked."""
    from saets.checks import check_all, check_experiment
    from saets.stages.session import Session

    experiment, out = _experiment(options)
    if goals:
        check_all(experiment, judged=judge)
    elif checked:
        check_experiment(experiment)
    with (
        shown_progress(errors, options.progress) as progress,
        Session.open(experiment, out, progress, measure=measure, verbose=options.verbose) as session,
    ):
        yield session


def _opened(options: argparse.Namespace) -> Run:
    from saets.checks import check_experiment
    from saets.explore import Run

    experiment, out = _experiment(options)
    check_experiment(experiment)
    return Run(out, experiment)


def _experiment(options: argparse.Namespace) -> tuple[Experiment, Location]:
    """The experiment and its run folder."""
    out = locate(options.out) if options.out else None
    given = locate(options.experiment)
    experiment = load_experiment(given, options.overrides)
    return experiment, out or (given if given.is_folder() else locate(f"runs/{experiment.name}"))


def _show_outcome(session: Session) -> None:
    from saets import plots
    from saets.stages.results import read_outcome, samples

    names = plots.display_names()
    outcome = read_outcome(session)
    table = Table("goal", "method", "score", "95% interval", "scale", "optimistic max", box=None, pad_edge=False)
    for row in outcome.summary.iter_rows(named=True):
        table.add_row(
            escape(row["goal"]),
            names.get(row["method"], row["method"]),
            _number(row["held_out"]),
            f"{_number(row['held_out_low'])} to {_number(row['held_out_high'])}",
            _number(row["scale"], ".0f"),
            _number(row["optimistic_max"]),
        )
    console.print("\nScore: mean behaviour x mean coherence, scale chosen on one half of the samples and scored on the other.")
    console.print(table)
    failed = int(outcome.texts["failed"].sum())
    if failed:
        console.print(f"{failed} of {len(outcome.texts)} texts could not be graded; they count in no score")
    console.print("\nSamples at each method's best scale:")
    for goal, method, scale, text in samples(session):
        console.print(f"  {goal} · {names.get(method, method)} · {scale:g}: {' '.join(text.split())}", markup=False)
    console.print()
    _show_fit(session)
    there = session.run.path.entries()
    for what in ("results.parquet", "results.md", "vectors", "plots"):
        if what in there:
            _show_path(what, session.run.path / what)


def _show_fit(session: Session) -> None:
    import json

    report = json.loads((session.run.path / "fit.json").read_text())
    if origin := report.get("published"):
        console.print(f"approximator: {origin['file']} of {origin['repo']}, commit {origin['commit'][:12]}", markup=False)
        _show_path("approximator", session.run.approximator)
        return
    held_out = report["held_out"]
    console.print(
        f"approximator: {report['rows_train'] + report['rows_held_out']} rows ({report['rows_own']} measured here, "
        f"{report['rows_shipped']} shipped), held-out R2 {_number(held_out['r2'])}, cosine {held_out['cosine']:.3f}"
    )
    _show_path("approximator", session.run.approximator)


def _show_path(what: str, path: Location) -> None:
    console.print(f"{what}: {path}", markup=False)


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


def _read_env() -> None:
    """Take keys from a `.env` file in or above the working folder; what the environment has already wins."""
    from dotenv import find_dotenv, load_dotenv

    load_dotenv(find_dotenv(usecwd=True))


if __name__ == "__main__":
    sys.exit(main())
