"""Stage 3: the steering vector of every goal and method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from saets.checks import check_goals
from saets.distributed.tasks import put, spread
from saets.errors import InputError
from saets.experiment.config import settings_hash
from saets.experiment.goal import Goal
from saets.generation import steered_positions
from saets.methods import formulas as methods
from saets.stages.ingredients import Ingredients, Shared, made_from, read_texts
from saets.stages.provenance import provenance, recommended_scales
from saets.stages.pull import stands_in, use_published, use_published_rotation
from saets.stages.session import Session
from saets.vector.vector import SteeringVector

Pair = tuple[str, str]
"""(goal id, method id, with options where it has some of its own)"""


def build_vectors(session: Session) -> dict[Pair, SteeringVector]:
    """Vectors of every goal and method, in the experiment's order; those whose ingredients did not change are kept.

    Where the run has no approximator and no effects, the one that the experiment names on the hub is fetched, and the rotation
    that belongs to it where a method needs one. New vectors are calibrated: their files say between which scales they are of use.

    Raises:
        InputError: no approximator, features outside the SAE, a direction of length zero, or see `Calibrator`; vectors that can
            be built are saved before.
    """
    experiment, run = session.experiment, session.run
    goals = {goal.id: goal for goal in check_goals(experiment)}
    needed = {name for method in experiment.steering.methods for name in methods.ingredients_of(method)}
    if "approximator" in needed and stands_in(session):
        use_published(session)
        if "Q" in needed:
            use_published_rotation(session)
    wanted = {
        (name, method): _inputs(session, goal, method) for name, goal in goals.items() for method in experiment.steering.methods
    }
    kept = _kept_of(session, wanted)
    todo = [pair for pair in wanted if pair not in kept]
    if not todo:
        return kept
    read = read_texts(session, [(goals[name], method) for name, method in todo])
    shared, options = Shared(session), experiment.steering.model_dump()
    ingredients = {name: Ingredients(goals[name], session, shared, read.get(name, {})) for name, _ in todo}
    shared_by_all = functools.cache(lambda name: put(getattr(shared, name)))
    with session.progress.stage("building vectors", len(wanted), len(kept), "vectors") as advance:
        works = [_work(method, options, ingredients[name], shared_by_all) for name, method in todo]
        directions = spread(_direction, works, advance)
    built: dict[Pair, SteeringVector] = {}
    failures: list[InputError] = []
    for (name, method), made in zip(todo, directions, strict=True):
        try:
            if isinstance(made, InputError):
                raise made
            facts = provenance(session, goals[name], method, methods.options_of(method, options))
            if method in methods.KEEPS_LENGTH:
                facts["raw_length"] = made.norm().item()
            built[name, method] = SteeringVector.from_tensor(made, experiment.hook_name, **facts, inputs=wanted[name, method])
        except InputError as error:
            failures.append(InputError(f"goal {name!r}, method {method!r}: {error}"))
    ranges = recommended_scales(session, list(built.values())) if built else []
    for (pair, vector), scales in zip(built.items(), ranges, strict=True):
        facts = {**vector.provenance, "scales": scales}
        built[pair] = replace(vector, provenance=facts, positions=steered_positions(experiment))
        built[pair].save(run.vector(*pair))
    if failures:
        raise failures[0]
    vectors = {pair: built.get(pair) or kept[pair] for pair in wanted}
    run.update_stage("vectors", {f"{goal}--{method}": vector.id for (goal, method), vector in vectors.items()})
    return vectors


def _work(method: str, options: dict[str, Any], ingredients: Ingredients, shared_by_all: Callable[[str], Any]) -> tuple[Any, ...]:
    """The arguments of `_direction`; an error where an ingredient cannot be had."""
    names = methods.ingredients_of(method)
    try:
        found = [shared_by_all(name) if hasattr(Shared, name) else getattr(ingredients, name) for name in names]
    except InputError as error:
        return method, options, error
    return method, options, None, names, *found


def _direction(
    method: str, options: dict[str, Any], error: InputError | None, names: Sequence[str] = (), *ingredients: Any
) -> Tensor | InputError:
    """The method's direction, or what is wrong, so that the other vectors are built all the same."""
    if error is not None:
        return error
    try:
        return methods.build(method, SimpleNamespace(**dict(zip(names, ingredients, strict=True))), **options)
    except InputError as wrong:
        return wrong


def kept_vectors(session: Session) -> dict[Pair, SteeringVector]:
    """The vectors that `build_vectors` would find made from what the run has now, and leave as they are."""
    methods_named = session.experiment.steering.methods
    wanted = {
        (goal.id, method): _inputs(session, goal, method) for goal in check_goals(session.experiment) for method in methods_named
    }
    return _kept_of(session, wanted)


def read_vectors(session: Session) -> dict[Pair, SteeringVector]:
    """The vectors that `build_vectors` wrote.

    Raises:
        InputError: some are missing.
    """
    steering = session.experiment.steering
    return {
        (goal.id, method): SteeringVector.load(session.run.vector(goal.id, method))
        for goal in check_goals(session.experiment)
        for method in steering.methods
    }


def _inputs(session: Session, goal: Goal, method: str) -> str:
    """A hash of everything the vector is made from."""
    return settings_hash(made_from(session, goal, method))


def _kept_of(session: Session, wanted: Mapping[Pair, str]) -> dict[Pair, SteeringVector]:
    return {pair: found for pair, inputs in wanted.items() if (found := _kept(session, pair, inputs)) is not None}


def _kept(session: Session, pair: Pair, inputs: str) -> SteeringVector | None:
    path = session.run.vector(*pair)
    if not path.is_file():
        return None
    vector = SteeringVector.load(path)
    return vector if vector.provenance.get("inputs") == inputs else None
