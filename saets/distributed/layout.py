"""How many actors, and how much of a GPU each: settings, or `auto`, which is what the nodes have room for.

An actor needs room for the weights, the SAE and the rows that it decodes together. Where a GPU holds several times that, it is
given several actors; one never gets less than the rows that fill it need.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from saets.distributed.nodes import Node
from saets.engine.machine import FILLED, PROCESS_BYTES, most_rows, processes_on_gpu
from saets.errors import InputError
from saets.experiment.config import Execution, Experiment
from saets.sae import sae_width

GROWTH = "SAETS_CLUSTER_GROWS"
"""Variable that says what an autoscaler may add, since Ray tells nobody: `nodes=4,GPU=1,CPU=4,GPU_GiB=48`."""

UNKNOWN_WIDTH = 16_384
"""Features of an SAE whose width is not known before it is downloaded."""

TOO_SLOW = 300.0
"""Seconds a vector from which `auto` refuses to go without a GPU."""


class Growth(NamedTuple):
    """Nodes that may come when actors wait for them."""

    nodes: int
    resources: Mapping[str, float]
    gpu_memory: int
    """In bytes; 0 where it is not known."""


class Place(NamedTuple):
    """Room for actors on one node."""

    cpus: float
    gpus: float
    memory: int
    gpu_memory: int


class Layout(NamedTuple):
    """How the work is laid out."""

    actors: int
    gpus_per_actor: float
    cpus_per_actor: float

    def applied(self, experiment: Experiment) -> Experiment:
        """The experiment with these numbers in place of `auto`."""
        return experiment.model_copy(update={"execution": experiment.execution.model_copy(update=self._asdict())})


def growth(text: str | None = None) -> Growth | None:
    """What the environment says an autoscaler may add; None where it says nothing.

    Raises:
        InputError: it says it in another form.
    """
    text = os.environ.get(GROWTH, "") if text is None else text
    if not text:
        return None
    try:
        given = {name.strip(): float(value) for name, _, value in (part.partition("=") for part in text.split(","))}
        nodes, memory = int(given.pop("nodes")), int(given.pop("GPU_GiB", 0) * 2**30)
    except (KeyError, ValueError) as error:
        expected = "how many nodes may come and what each has, e.g. nodes=4,GPU=1,CPU=4,GPU_GiB=48"
        raise InputError(f"{GROWTH} is {text!r}; expected {expected}") from error
    return Growth(nodes, given, memory)


def laid_out(experiment: Experiment, nodes: Sequence[Node], more: Growth | None) -> Layout:
    """Numbers for these nodes and those that may come.

    Raises:
        InputError: no GPU where work without one would take too long.
    """
    execution = experiment.execution
    if given := given_layout(execution):
        return given
    places = [_place(node) for node in nodes]
    if more:
        cpus, gpus = (more.resources.get(name, 0.0) for name in ("CPU", "GPU"))
        places += [Place(cpus, gpus, 0, more.gpu_memory)] * max(0, more.nodes - len(nodes) + 1)
    asked, actors = execution.gpus_per_actor, execution.actors
    share = _share(experiment, [place for place in places if place.gpus]) if asked == "auto" else asked
    room = sum(_room(experiment, place, share) for place in places)
    return Layout(max(1, room) if actors == "auto" else actors, share, execution.cpus_per_actor)


def given_layout(execution: Execution) -> Layout | None:
    """The numbers of the settings; None where one of them is `auto`."""
    actors, gpus = execution.actors, execution.gpus_per_actor
    return None if actors == "auto" or gpus == "auto" else Layout(actors, gpus, execution.cpus_per_actor)


def _place(node: Node) -> Place:
    slots = node.resources.get
    return Place(
        cpus=min(slots("CPU", 0.0), node.cpus),
        gpus=slots("GPU", 0.0),
        memory=node.memory,
        gpu_memory=min((gpu.memory for gpu in node.gpus), default=0),
    )


def _share(experiment: Experiment, places: Sequence[Place]) -> float:
    """Of a GPU, for each actor: 1, or what so many actors have that the smallest GPU holds."""
    if isinstance(experiment.model.device_map, dict):
        return float(experiment.model.gpus_named())
    if not places:
        _refuse_slow(experiment)
        return 0.0
    smallest = min(place.gpu_memory for place in places)
    if not smallest:
        return 1.0
    return 1.0 / processes_on_gpu(float(smallest), needed_bytes(experiment, "cuda"))


def _room(experiment: Experiment, place: Place, gpus: float) -> int:
    if gpus >= 1:
        return int(place.gpus // gpus)
    if gpus:
        return int(place.gpus) * int(1 / gpus + 1e-9)
    slots = int(place.cpus // experiment.execution.cpus_per_actor)
    return min(slots, int(FILLED * place.memory / needed_bytes(experiment, "cpu"))) if place.memory else slots


def needed_bytes(experiment: Experiment, device: str) -> int:
    """Memory of an actor: weights, SAE, the process itself, and on a GPU as many rows as fill it."""
    from saets.model import cached_numbers, model_shape, resolve_dtype, weight_count  # takes a second: a fit's workers go without

    d_model = model_shape(experiment.model)[0]
    bytes_a_number = resolve_dtype(experiment.model.dtype, torch.device(device)).itemsize
    d_sae = sae_width(experiment.sae) or UNKNOWN_WIDTH
    fixed = weight_count(experiment.model) * bytes_a_number + 2 * 4 * d_model * d_sae + PROCESS_BYTES
    if device == "cpu":
        return fixed
    row = bytes_a_number * cached_numbers(experiment.model) * experiment.effects.length + 3 * 4 * d_sae
    return fixed + row * (most_rows(device) if experiment.execution.rows == "auto" else experiment.execution.rows)


def _refuse_slow(experiment: Experiment) -> None:
    """Raise `InputError` where a vector would take too long on CPUs, by arithmetic on what this one multiplies a second."""
    from saets.model import weight_count

    effects = experiment.effects
    tokens = len(effects.prompts) * effects.rollouts * effects.length
    seconds = 2 * weight_count(experiment.model) * tokens / _operations_a_second()
    if seconds > TOO_SLOW:
        raise InputError(
            f"no node has a GPU, and on this CPU a vector of {experiment.model.name} would take about {seconds / 60:.0f} minutes "
            "(by arithmetic on what it multiplies a second). Use nodes with GPUs; see with `saets plan` what a run takes; or say "
            "--set execution.gpus_per_actor=0 to go on without"
        )


def _operations_a_second() -> float:
    a = torch.ones(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * 1024**3 / (time.perf_counter() - start)
