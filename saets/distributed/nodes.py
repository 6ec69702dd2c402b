"""What the nodes of the cluster have and see: packages, GPUs, folders, the hub's cache; and where an experiment would fail.

A node is asked by a task that takes no slot, so a busy cluster answers too.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import socket
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import saets
from saets.errors import InputError
from saets.experiment.config import DATASET, PACKAGED, Experiment
from saets.files.storage import Location
from saets.keys import exposed

SAME_EVERYWHERE = ("saets", "ray", "torch", "transformers", "transformer-lens", "sae-lens")
"""Packages that decide numbers or speak to each other."""

SAME_PACKAGES = "give every node the same image, or the same packages: pip install -c constraints.txt"

ANSWER_SECONDS = 120.0
"""A node that has not answered by then is of no use."""

MARKER = ".seen-by-all"
"""Start of the names of files that show whether a folder is shared; they are gone after a second."""


class Gpu(NamedTuple):
    """A GPU as the driver names it."""

    name: str
    memory: int
    """In bytes."""


class Node(NamedTuple):
    """One node, as it sees itself."""

    host: str
    versions: dict[str, str]
    cpus: int
    memory: int
    """In bytes."""
    gpus: tuple[Gpu, ...]
    missing: tuple[str, ...]
    """Of the things asked for, those that are not there."""
    sees: bool
    """Whether it read what the driver wrote into the shared folder."""
    refused: str
    """Why it could not write there; "" where it could or was not asked to."""
    cache: str
    """Folder of the hub's files."""
    cached: bool
    """Whether the model's weights are among them."""
    resources: Mapping[str, float] = {}
    """Slots that Ray gives out."""


class Asked(NamedTuple):
    """What a node is to look at."""

    folders: tuple[str, ...]
    packages: tuple[str, ...]
    model: str
    marker: Location | None
    write: bool


def survey(experiment: Experiment, shared: Location | None = None, *, write: bool = False) -> list[Node]:
    """Every node that is alive and stays so, the driver's first.

    With `shared` it says whether each sees that folder, with `write` whether each also writes there.

    Raises:
        InputError: the folder cannot be written from here, or a node does not answer.
    """
    token = uuid.uuid4().hex
    marker = shared / f"{MARKER}-{token}" if shared else None
    asked = Asked(*needed(experiment), experiment.model.name, marker, write)
    here = ray.get_runtime_context().get_node_id()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)
    try:
        if marker:
            marker.write_text(token)
        answers = [_ask(node["NodeID"], asked) for node in alive]
        done, _ = ray.wait(answers, num_returns=len(answers), timeout=ANSWER_SECONDS)
        silent = [node["NodeManagerHostname"] for node, ref in zip(alive, answers, strict=True) if ref not in done]
        if silent:
            raise InputError(
                f"no answer from {', '.join(silent)} in {ANSWER_SECONDS:g} s; `ray status` shows what is wrong there"
            )
        nodes = [_answered(ref) for ref in answers]
    finally:
        if shared:
            for name in [name for name in shared.entries() if token in name]:
                (shared / name).delete()
    return [node._replace(resources=info["Resources"]) for node, info in zip(nodes, alive, strict=True) if node is not None]


def _answered(answer: Any) -> Node | None:
    """What a node says of itself; None where it died meanwhile, or had before Ray noticed."""
    try:
        node: Node = ray.get(answer)
    except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError):
        return None
    return node


def _ask(node_id: str, asked: Asked) -> Any:
    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": here}
    return ray.remote(**options)(look).remote(asked)


def look(asked: Asked) -> Node:
    """The node that this runs on."""
    import psutil
    from huggingface_hub import constants, try_to_load_from_cache

    sees, refused = False, ""
    if asked.marker is not None:
        with contextlib.suppress(InputError):
            sees = asked.marker.is_file() and asked.marker.name.endswith(asked.marker.read_text())
        try:
            if sees and asked.write:
                asked.marker.beside(f"{asked.marker.name}-{uuid.uuid4().hex[:8]}").write_text("")
        except InputError as error:
            refused = str(error)
    missing = [folder for folder in asked.folders if not Path(folder).exists()]
    missing += [f"package {name}" for name in asked.packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    cached = False
    with contextlib.suppress(ValueError):  # a path is no name of the hub
        found = try_to_load_from_cache(asked.model, "config.json")  # which is fetched to check an experiment, without weights
        cached = isinstance(found, str) and any(Path(found).parent.glob("*.safetensors"))
    return Node(
        host=socket.gethostname(),
        versions=versions(),
        cpus=os.cpu_count() or 1,
        memory=int(psutil.virtual_memory().total),
        gpus=gpus(),
        missing=tuple(missing),
        sees=sees,
        refused=refused,
        cache=str(constants.HF_HUB_CACHE),
        cached=cached,
    )


def needed(experiment: Experiment) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Folders and files, and packages, that an actor of the experiment reads from its own node."""
    folders = [experiment.sae.path or "", experiment.effects.calibration_text]
    packages = []
    if experiment.model.loader == "transformers" and Path(experiment.model.name).is_dir():
        folders.append(experiment.model.name)
    if experiment.model.loader == "gguf":
        packages.append(experiment.model.name)
    if experiment.judge.kind == "local":
        embedder = experiment.judge.embedder
        if Path(embedder).is_dir():
            folders.append(embedder)
        elif "/" not in embedder:
            packages.append(embedder)
    own = [folder for folder in folders if folder and not folder.startswith((PACKAGED, DATASET))]
    return tuple(os.path.abspath(folder) for folder in own), tuple(packages)


def versions() -> dict[str, str]:
    """Versions of what must be the same on all nodes; that of saets ends in a hash of its code."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in SAME_EVERYWHERE:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(Path(saets.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {**found, "saets": f"{found.get('saets', '')}+{digest.hexdigest()}".removeprefix("+")}


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this node, whatever Ray lets a process see of them; none where there is no NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [line.rpartition(",") for line in said.splitlines() if line.strip()]
    return tuple(Gpu(name.strip(), int(memory) * 2**20) for name, _, memory in rows)


class Packages(NamedTuple):
    """What a process runs."""

    host: str
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Packages:
        """Of this process."""
        return cls(socket.gethostname(), versions())

    def unlike(self, other: Packages) -> list[str]:
        """What the other has in another version or not at all, a line each."""
        return [
            f"{other.host} has {package} {other.versions.get(package, 'not at all')}, {self.host} has {version}"
            for package, version in self.versions.items()
            if other.versions.get(package) != version
        ]


def check_packages(different: Sequence[str]) -> None:
    """Raise `InputError` where there are differences, as `Packages.unlike` names them."""
    if different:
        raise InputError(f"{different[0]}{_more(different)}; {SAME_PACKAGES}")


def different_versions(nodes: Sequence[Node]) -> list[str]:
    """What nodes have that the driver's has not, a line each."""
    first, *others = (Packages(node.host, node.versions) for node in nodes)
    return [line for other in others for line in first.unlike(other)]


def check_nodes(experiment: Experiment, nodes: Sequence[Node], shared: Location | None = None) -> None:
    """Raise `InputError` where work on these nodes would fail, or give other numbers on some than on others.

    `shared` is a folder that every node must see.
    """
    check_packages(different_versions(nodes))
    for node in nodes:
        if node.missing:
            raise InputError(
                f"{node.host} has no {node.missing[0]}, which every actor reads from its own node; put it on all nodes, at the "
                "same path, or on a file system that all share (a hub name needs neither)"
            )
        if shared and not node.sees:
            raise InputError(
                f"{node.host} does not see {shared}, where a fit on several nodes keeps its checkpoints; give --out a folder "
                "that all nodes share or a URI such as s3://bucket/folder, or take fit.solver = ridge or fit.workers = 0"
            )


def _more(lines: Sequence[str]) -> str:
    return f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""


def secrets_shown() -> list[str]:
    """Places in the cluster's list of jobs that hold a secret.

    Raises:
        InputError: the list cannot be read.
    """
    from ray.job_submission import JobSubmissionClient

    try:
        jobs = JobSubmissionClient().list_jobs()
    except (ConnectionError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        raise InputError(f"the list of jobs cannot be read: {str(error).splitlines()[0]}") from error
    return [
        f"job {job.submission_id or job.job_id}: {place}"
        for job in jobs
        for place in exposed({"entrypoint": job.entrypoint, "metadata": job.metadata, "runtime_env": job.runtime_env})
    ]
