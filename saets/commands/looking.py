"""What commands that look at one vector share: the options that name it, and the vector that they name."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from saets.commands.common import errors
from saets.errors import InputError

if TYPE_CHECKING:
    from saets.explore import Run
    from saets.vector.vector import SteeringVector


def add_vector_choice(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options that name one vector."""
    parser.add_argument("--vector", help="a vector file (path or URI)")
    parser.add_argument("--goal", help="with --method: a vector of the run")
    parser.add_argument("--method", help="with --goal")
    parser.add_argument("--feature", action="append", default=[], metavar="ID:WEIGHT", help="SAE-TS for chosen features")
    return parser


def chosen_vector(run: Run, options: argparse.Namespace) -> SteeringVector:
    """The vector that the options name; where its approximator had to be made first, that is said on stderr.

    Raises:
        InputError: none or several, or one that is not there.
    """
    from saets.vector.vector import SteeringVector

    given = [name for name in ("vector", "goal", "feature") if getattr(options, name)]
    if len(given) != 1 or bool(options.goal) != bool(options.method):
        raise InputError("choose one vector: --vector FILE, or --goal GOAL --method METHOD, or --feature ID:WEIGHT (repeatable)")
    if options.vector:
        return SteeringVector.load(options.vector)
    if options.goal:
        return run.vector(options.goal, options.method)
    features = weighted(options.feature)
    say_where_fitted(run)
    return run.target(features, bias_weight=run.experiment.steering.bias_weight)


def say_where_added(run: Run, vector: SteeringVector) -> None:
    """Say on stderr where a vector of another hook is added, which --force allows."""
    if vector.hook_name != run.experiment.hook_name:
        errors.print(f"the vector is for {vector.hook_name}; it is added at {run.experiment.hook_name}", markup=False)


def say_where_fitted(run: Run) -> None:
    """Say on stderr where the approximator is not the run's own."""
    if run.fit.here:
        errors.print(f"no approximator in {run.folder.path} yet; this one is fitted to {run.fit.here}", markup=False)


def weighted(words: list[str], option: str = "--feature") -> dict[int, float]:
    """Features and weights from words such as 123:0.5; a weight left out is 1.

    Raises:
        InputError: a word of another form.
    """
    found = {}
    for word in words:
        number, _, weight = word.partition(":")
        try:
            feature, value = int(number), float(weight or 1)
        except ValueError as error:
            raise InputError(f"{option} {word!r}: expected ID:WEIGHT, e.g. {option} 123:0.5") from error
        if feature in found:
            raise InputError(f"{option} names feature {feature} twice; give it one weight")
        found[feature] = value
    return found
