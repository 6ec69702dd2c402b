"""The command that makes a finished run's report."""

from __future__ import annotations

import argparse

from saets.commands.common import Commands, add_command, show_path
from saets.errors import InputError
from saets.experiment.loading import load_experiment
from saets.files.storage import locate


def add(commands: Commands) -> None:
    """Put the command into the parser."""
    report = add_command(
        commands, "report", _report, "one HTML page of all that a run found: no server, no network", experiment=False
    )
    report.add_argument("run", help="run folder (path or URI)")
    report.add_argument("--out", metavar="FILE", help="where to write it (path or URI); by default report.html in the run folder")


def _report(options: argparse.Namespace) -> None:
    run = locate(options.run)
    run.check()
    if not (run / "experiment.toml").is_file():
        raise InputError(f"no run folder at {run}; give one that a run has written, e.g. `saets report runs/smollm2`")
    from saets.stages.report import write_report
    from saets.stages.session import Session

    file = locate(options.out) if options.out else None
    show_path("report", write_report(Session.looking(load_experiment(run), run), file))
