"""How the work lies on machines: how many actors, what each holds in memory, how many rows it decodes together."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch

from saets.effects.worker import rollouts_per_vector, rows_per_step
from saets.engine.machine import PROCESS_BYTES, most_rows, processes_on_gpu, row_bytes, rows_in
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.model import resolve_dtype
from saets.planning.machines import CPU, USABLE, Machine, gpu_here, machine
from saets.planning.sizes import ModelSize, SaeSize


class Hardware(NamedTuple):
    """What there is, or would be."""

    machine: Machine
    nodes: int
    devices: int
    """GPUs, or cores, of a node."""
    given: bool
    """Named by options; else this machine's."""


class Memory(NamedTuple):
    """Bytes that an actor takes on its device or devices."""

    weights: int
    sae: int
    rows: int
    """Keys, values, logits and activations of the rows that it decodes together."""
    device: float | None
    """What the actor's device or devices have; None where it is not known."""

    def total(self) -> int:
        """All of it."""
        return self.weights + self.sae + self.rows


class Layout(NamedTuple):
    """Actors on hardware."""

    hardware: Hardware
    dtype: torch.dtype
    actors: int
    actors_per_device: float
    threads: float
    """Cores that an actor really has; on a GPU the share of it, at most 1."""
    rows: int
    """Decoded together while effects are measured."""
    memory: Memory
    settings: tuple[str, ...]
    """Settings that make a run lie like this, where the experiment's are others."""
    notes: tuple[str, ...]


def hardware(experiment: Experiment, nodes: int | None, gpus_per_node: int | None, gpu: str | None) -> Hardware:
    """The hardware that options name, else this machine: its GPUs where actors ask for some, otherwise its cores.

    Raises:
        InputError: unknown kind of GPU (lists them), numbers below 1, GPUs of no kind.
    """
    for name, number in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}; expected 1 or more")
    wants_gpu = _number(experiment.execution.gpus_per_actor, 1.0) > 0 or gpus_per_node is not None
    kind = gpu or (gpu_here() if wants_gpu else None)
    if kind is None and gpus_per_node is not None:
        raise InputError("--gpus-per-node needs the kind of GPU, and torch sees none here; add --gpu, e.g. --gpu h100")
    if kind is None or kind == CPU:
        return Hardware(machine(CPU), nodes or 1, os.cpu_count() or 1, nodes is not None)
    given = any(option is not None for option in (nodes, gpus_per_node, gpu))
    return Hardware(machine(kind), nodes or 1, gpus_per_node or (1 if given else torch.cuda.device_count()), given)


def lay_out(experiment: Experiment, there: Hardware, model: ModelSize, sae: SaeSize) -> Layout:
    """Actors on all of the hardware where options named it, else as many as the experiment says."""
    return _on_gpus(experiment, there, model, sae) if there.machine.is_gpu else _on_cores(experiment, there, model, sae)


def _on_gpus(experiment: Experiment, there: Hardware, model: ModelSize, sae: SaeSize) -> Layout:
    dtype = resolve_dtype(experiment.model.dtype, torch.device("cuda"))
    execution = experiment.execution
    memory = (there.machine.memory or 0.0) * USABLE
    weights, of_sae = model.weights * dtype.itemsize, _sae_bytes(experiment, sae)
    row = row_bytes(model.bytes_per_row(experiment.effects.length, dtype), sae.d_sae)
    filling = row * (most_rows("cuda") if execution.rows == "auto" else execution.rows)
    by_nodes = 1 / processes_on_gpu(there.machine.memory or 0.0, weights + of_sae + PROCESS_BYTES + filling)
    asked = _number(execution.gpus_per_actor, by_nodes) or 1.0
    needed = weights + of_sae + row
    notes, settings = [], []
    if needed > memory * asked:
        least = math.ceil(needed / memory)
        notes.append(
            f"an actor needs {weights / 1e9:.1f} GB for weights and {of_sae / 1e9:.1f} GB for the SAE, which {asked:g} "
            f"{there.machine.name} does not hold: planned with {least} for each actor, one block after another"
        )
        asked = float(least)
        settings += ['model.device_map="balanced"'] if least > 1 else []
    if asked > there.devices:
        raise InputError(
            f"an actor needs {asked:g} GPUs of one node ({weights / 1e9:.1f} GB of weights), and a node has {there.devices}; "
            "plan with more (--gpus-per-node), or with GPUs of more memory"
        )
    if asked != _number(execution.gpus_per_actor, by_nodes):
        settings.append(f"execution.gpus_per_actor={asked:g}")
    on_node = int(there.devices / asked + 1e-9)
    whole = there.nodes * on_node
    actors = whole if there.given else int(_number(execution.actors, whole))
    if actors != _number(execution.actors, whole):
        settings.append(f"execution.actors={actors}")
    rows = _rows(experiment, memory * asked - weights - of_sae, row, "cuda")
    held = Memory(weights, of_sae, rows * row, memory * asked)
    return Layout(there, dtype, actors, 1 / asked, min(1.0, asked), rows, held, tuple(settings), tuple(notes))


def _on_cores(experiment: Experiment, there: Hardware, model: ModelSize, sae: SaeSize) -> Layout:
    dtype = resolve_dtype(experiment.model.dtype, torch.device("cpu"))
    execution, notes, settings = experiment.execution, [], []
    if _number(execution.gpus_per_actor, 1.0):
        notes.append(
            f"execution.gpus_per_actor is {execution.gpus_per_actor} and torch sees no GPU here: this is what CPU cores would "
            "take; name the GPUs you have in mind, e.g. --gpu h100"
        )
        settings.append("execution.gpus_per_actor=0")
    wanted = max(1.0, execution.cpus_per_actor)
    whole = there.nodes * max(1, int(there.devices / wanted))
    actors = whole if there.given else int(_number(execution.actors, whole))
    if actors != _number(execution.actors, whole):
        settings.append(f"execution.actors={actors}")
    threads = min(wanted, there.nodes * there.devices / actors)
    weights, of_sae = model.weights * dtype.itemsize, _sae_bytes(experiment, sae)
    row = row_bytes(model.bytes_per_row(experiment.effects.length, dtype), sae.d_sae)
    memory = _memory_here()
    rows = _rows(experiment, memory * there.nodes / actors - weights - of_sae, row, "cpu")
    held = Memory(weights, of_sae, rows * row, None)
    if held.total() * actors / there.nodes > memory:
        notes.append(f"{actors} actors of {held.total() / 1e9:.1f} GB do not fit into this machine's {memory / 1e9:.1f} GB")
    return Layout(there, dtype, actors, 1 / wanted, threads, rows, held, tuple(settings), tuple(notes))


def _number(setting: Any, by_nodes: int | float) -> float:
    """A setting's number, or another where nodes decide about it (`auto`)."""
    return float(by_nodes if setting == "auto" else setting)


def _rows(experiment: Experiment, free: float, row: int, device_type: str) -> int:
    """Rows that an actor decodes together; by `auto` those that fit."""
    rows = experiment.execution.rows
    wanted = rows_in(max(0.0, free), row, device_type) if rows == "auto" else rows
    return rows_per_step(wanted, rollouts_per_vector(experiment.effects))


def _sae_bytes(experiment: Experiment, sae: SaeSize) -> int:
    return sae.weights() * getattr(torch, experiment.sae.dtype).itemsize


def _memory_here() -> float:
    import psutil

    return float(psutil.virtual_memory().total)
