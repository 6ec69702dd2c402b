"""Joining a Ray cluster, or starting a quiet one on this machine, when it is first needed."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
import ray.data  # sets up its loggers when imported, so before their levels are set here

from saets.distributed.layout import Growth, Layout, given_layout, growth, laid_out
from saets.distributed.nodes import check_nodes, survey
from saets.errors import InputError
from saets.experiment.config import Execution, Experiment
from saets.files.storage import Location

SPARE_CPUS = 2
"""Ray Data and Ray Train need free CPU slots of their own; without them they wait for ever."""

OBJECT_STORE_BYTES = 512 * 2**20

DRIVERS_OWN = ("OPENAI_API_KEY",)
"""Secrets that are used where the command runs and nowhere else."""


class Cluster:
    """A Ray session: the cluster that RAY_ADDRESS or the enclosing job names, else one on this machine.

    Nothing is started before `connect`. A session that exists already is used and left running. Given an experiment and its run
    folder, nodes are looked at before they are worked on.
    """

    def __init__(
        self, execution: Execution, *, experiment: Experiment | None = None, out: Location | None = None, verbose: bool = False
    ) -> None:
        self._experiment, self._out, self.verbose = experiment, out, verbose
        self._layout = None if experiment else given_layout(execution)
        self._started = False

    def connect(self) -> None:
        """Be connected; asking again does nothing.

        Raises:
            InputError: an actor needs more GPUs or CPUs than any node has or may come with, or nodes on which work would fail.
        """
        self.join()
        if self._experiment and not self._layout:
            self._layout = self._looked_at(self._experiment)
        if self._layout:
            check_resources(self._layout, growth())

    def join(self) -> None:
        """Be connected, whatever the nodes are."""
        if not ray.is_initialized():
            self._start()

    def layout(self, experiment: Experiment) -> Layout:
        """Numbers for an experiment on these nodes, connected to them."""
        self.connect()
        if given := given_layout(experiment.execution):
            return given
        assert self._layout is not None, "a cluster without an experiment has no `auto`"
        return self._layout

    def _looked_at(self, experiment: Experiment) -> Layout:
        """Its layout; several nodes are checked."""
        several = sum(node["Alive"] for node in ray.nodes()) > 1
        if not several and (given := given_layout(experiment.execution)):
            return given
        shared = self._out if several and experiment.fit.workers and experiment.fit.solver == "adam" else None
        nodes = survey(experiment, shared)
        check_nodes(experiment, nodes, shared)
        return laid_out(experiment, nodes, growth())

    def _start(self) -> None:
        level = logging.INFO if self.verbose else logging.ERROR
        options: dict[str, Any] = {"log_to_driver": self.verbose, "logging_level": level}
        if not on_cluster():
            cpus = max(4, os.cpu_count() or 1) + SPARE_CPUS
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(cpus))  # else it warns of four processes a core
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # else it starts a process a CPU before any is needed
            options |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
            options |= {"num_cpus": cpus}
        with _without_keys(), contextlib.nullcontext() if self.verbose else _without_ray_core_logs():
            ray.init(**options)
        self._started = True
        for name in ("ray", "ray.data", "ray.train"):
            logging.getLogger(name).setLevel(level)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            ray.shutdown()


def on_cluster() -> bool:
    """Whether the environment names a cluster, or this process is a job on one."""
    return "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ


def cores() -> int:
    """How many processes can compute at once: CPUs of the cluster, or cores of this machine where Ray runs on it alone."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) if on_cluster() else os.cpu_count() or 1)


@contextlib.contextmanager
def _without_keys() -> Iterator[None]:
    """Processes that are started meanwhile do not inherit `DRIVERS_OWN`."""
    held = {name: os.environ.pop(name) for name in DRIVERS_OWN if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


@contextlib.contextmanager
def _without_ray_core_logs() -> Iterator[None]:
    """Ray's C++ core tells this process nothing, neither now nor later; what it finds wrong still travels as an exception."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)  # the core announces the setting itself
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def check_resources(layout: Layout, more: Growth | None = None) -> None:
    """Raise `InputError` where no node, and none that may come, could ever hold one actor; Ray itself would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kinds = [*nodes, *([more.resources] if more else [])]
    for kind, asked in (("GPU", layout.gpus_per_actor), ("CPU", 0 if layout.gpus_per_actor else layout.cpus_per_actor)):
        largest = max((node.get(kind, 0.0) for node in kinds), default=0.0)
        if asked > largest:
            setting = f"execution.{kind.lower()}s_per_actor"
            raise InputError(
                f"{setting} is {asked:g}, but the largest of {len(nodes)} nodes has {largest:g} {kind}s; "
                f"lower it (--set {setting}={0 if kind == 'GPU' else 1}) or use another cluster; see `saets plan`"
            )


def actor_count(layout: Layout, batches: int) -> int:
    """How many actors to start: those of the layout, but never more than there is work for."""
    return min(layout.actors, batches)


def input_error(error: BaseException) -> InputError | None:
    """The `InputError` inside an error that Ray wrapped, however deep, or None."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        if isinstance(inner, InputError) and not isinstance(inner, ray.exceptions.RayError):  # Ray's copy reads as a traceback
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__ or inner.__context__
    for line in reversed(str(error).splitlines()):
        before, found, message = line.partition("InputError: ")
        if found and before.strip() in ("", "saets.errors."):
            return InputError(message)
    return None
