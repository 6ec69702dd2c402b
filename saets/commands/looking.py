"""Commands that play with a finished run and write nothing: steer, forecast."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from saets.commands.common import Commands, add_command, console, opened_run
from saets.errors import InputError

if TYPE_CHECKING:
    from saets.explore import Run
    from saets.vector import SteeringVector


def add(commands: Commands) -> None:
    """Put these commands into the parser."""
    steer = add_vector_choice(add_command(commands, "steer", _steer, "show unsteered and steered text side by side"))
    steer.add_argument("--scale", type=float, action="append", required=True, help="L2 length to add; may be given several times")
    steer.add_argument("--prompt", default="I think")
    steer.add_argument("--samples", type=int, default=3)
    steer.add_argument("--seed", type=int, default=0)
    forecast = add_vector_choice(
        add_command(commands, "forecast", _forecast, "predict a vector's effects before generating anything")
    )
    forecast.add_argument("--top", type=int, default=15)


def add_vector_choice(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options that name one vector."""
    parser.add_argument("--vector", help="a vector file (path or URI)")
    parser.add_argument("--goal", help="with --method: a vector of the run")
    parser.add_argument("--method", help="with --goal")
    parser.add_argument("--feature", action="append", default=[], metavar="ID:WEIGHT", help="SAE-TS for chosen features")
    return parser


def _steer(options: argparse.Namespace) -> None:
    run = opened_run(options)
    vector = chosen_vector(run, options)
    choice = {"samples": options.samples, "seed": options.seed, "new_tokens": run.experiment.evaluation.new_tokens}
    columns = [("unsteered", run.complete(options.prompt, **choice))]
    columns += [(f"scale {scale:g}", run.complete(options.prompt, vector, scale=scale, **choice)) for scale in options.scale]
    table = Table(*(name for name, _ in columns), show_lines=True)
    for texts in zip(*(texts for _, texts in columns), strict=True):
        table.add_row(*(escape(options.prompt + text) for text in texts))
    console.print(table)


def _forecast(options: argparse.Namespace) -> None:
    run = opened_run(options)
    chosen = [feature for feature, _ in map(_feature, options.feature)]
    table = Table("feature", "predicted effect", box=None, pad_edge=False)
    for feature, predicted in run.forecast(chosen_vector(run, options), top=options.top, features=chosen).iter_rows():
        table.add_row(str(feature), f"{predicted:+.4f}")
    console.print(table)


def chosen_vector(run: Run, options: argparse.Namespace) -> SteeringVector:
    """The vector that the options name.

    Raises:
        InputError: none or several, or one that is not there.
    """
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
