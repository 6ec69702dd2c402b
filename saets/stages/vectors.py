"""Stage 3: the steering vector of every goal and method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from saets.checks import check_goals
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
    shared, settings = Shared(session), experiment.steering.model_dump()
    built: dict[Pair, SteeringVector] = {}
    failures: list[InputError] = []
    with session.progress.stage("building vectors", len(wanted), len(kept), "vectors") as advance:
        for name, method in todo:
            options = methods.options_of(method, settings)
            try:
                made = methods.build(method, Ingredients(goals[name], session, shared, read.get(name, {})), **options)
                facts = provenance(session, goals[name], method, options)
                if method in methods.KEEPS_LENGTH:
                    facts["raw_length"] = made.norm().item()
                vector = SteeringVector.from_tensor(made, experiment.hook_name, **facts, inputs=wanted[name, method])
            except InputError as error:
                failures.append(InputError(f"goal {name!r}, method {method!r}: {error}"))
            else:
                built[name, method] = vector
            advance(1)
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
