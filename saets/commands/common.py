"""What commands share: the two consoles, the experiment that is named, and its session or finished run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.files.storage import Location, locate
from saets.terminal.display import shown_progress

if TYPE_CHECKING:
    from saets.explore import Run
    from saets.stages.session import Session

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Command = Callable[[argparse.Namespace], int | None]
"""Runs what was asked for; the exit code where it is not 0."""

Commands = argparse._SubParsersAction


def add_command(
    commands: Commands, name: str, command: Command, text: str, *, experiment: bool = True, page: str | None = None
) -> argparse.ArgumentParser:
    """A command with the options that all have; those about an experiment by `experiment`.

    Where it writes a `page`, which is then its name, `--out` is not the run folder but the page.
    """
    added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    added.set_defaults(command=command)
    if not experiment:
        return added
    added.add_argument("experiment", help="a preset name, a TOML file, or a run folder (path or URI)")
    if page is None:
        added.add_argument(
            "--out",
            help="run folder: a path, or a URI such as s3://bucket/folder; by default the run folder itself, else runs/NAME",
        )
    else:
        added.add_argument(
            "--out", dest="page", metavar="FILE", help=f"the page to write; by default {page} in the run folder, if there is one"
        )
        added.set_defaults(out=None)
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


def add_max_cost(command: argparse.ArgumentParser) -> None:
    """Give a command that asks a judge its ceiling."""
    command.add_argument(
        "--max-cost", type=_dollars, metavar="USD", help="what the judge's calls of this command may cost; by default no limit"
    )


def _dollars(text: str) -> float:
    try:
        usd = float(text)
    except ValueError:
        usd = float("nan")
    if not 0 <= usd < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of US dollars; expected a number such as 2.50")
    return usd


@contextlib.contextmanager
def session_of(
    options: argparse.Namespace, *, checked: bool = True, goals: bool = False, judge: bool = False, measure: bool = False
) -> Iterator[Session]:
    """The experiment in its run folder, made only after what the command needs of it has been checked."""
    from saets.checks import check_all, check_experiment
    from saets.stages.session import Session

    experiment, out = experiment_of(options)
    if goals:
        check_all(experiment, judged=judge)
    elif checked:
        check_experiment(experiment)
    with (
        shown_progress(errors, options.progress) as progress,
        Session.open(experiment, out, progress, measure=measure, verbose=options.verbose) as session,
    ):
        yield session


def opened_run(options: argparse.Namespace) -> Run:
    """The run folder to play with, after its experiment has been checked."""
    from saets.checks import check_experiment
    from saets.explore import Run

    experiment, out = experiment_of(options)
    check_experiment(experiment)
    return Run(out, experiment)


def experiment_of(options: argparse.Namespace) -> tuple[Experiment, Location]:
    """The experiment that is named, and its run folder."""
    out = locate(options.out) if options.out else None
    given = locate(options.experiment)
    experiment = load_experiment(given, options.overrides)
    return experiment, out or (given if given.is_folder() else locate(f"runs/{experiment.name}"))


def page_path(options: argparse.Namespace, folder: Location, name: str) -> Location:
    """Where a page is to be written: where --out says, else in the run folder, or here where there is none."""
    if options.page:
        return locate(options.page)
    return (folder if (folder / "experiment.toml").is_file() else locate(".")) / name


def show_path(what: str, path: Location) -> None:
    """Say where something is."""
    console.print(f"{what}: {path}", markup=False)
