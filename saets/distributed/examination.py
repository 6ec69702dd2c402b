"""Whether the cluster will do: nodes, packages, the storage that all share, the hub's cache, and keys left in the open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from saets.distributed.cluster import Cluster, check_resources, on_cluster
from saets.distributed.layout import growth, laid_out
from saets.distributed.nodes import SAME_PACKAGES, Node, different_versions, secrets_shown, survey
from saets.doctor import Finding
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.files.storage import Location


def examine_cluster(experiment: Experiment, out: Location, *, verbose: bool = False) -> Iterator[Finding]:
    """Every check in turn. Nothing is measured and no weights are read.

    Raises:
        InputError: no cluster can be reached, `out` cannot be written here, or a node does not answer.
    """
    with Cluster(experiment.execution, verbose=verbose) as cluster:
        cluster.join()
        nodes = survey(experiment, out, write=True)
        later = "; those that come when actors wait are looked at by their actors alone" if growth() else ""
        yield Finding("nodes", True, f"{len(nodes)} alive; the driver runs on {nodes[0].host}{later}")
        yield from map(_node, nodes)
        yield _versions(nodes)
        yield _storage(nodes, out, experiment)
        yield from (_cache(node, experiment) for node in nodes)
        yield _actors(nodes, experiment)
        if on_cluster():
            yield examine_secrets()


def examine_secrets() -> Finding:
    """Whether the list of jobs, which everybody who reaches the dashboard can read, holds a key."""
    try:
        shown = secrets_shown()
    except InputError as error:
        return Finding("keys", False, f"not looked at: {error}; see that `ray job list` works from here")
    if not shown:
        return Finding("keys", True, "none in the entry points, metadata and runtime_env of the jobs")
    return Finding(
        "keys",
        False,
        f"anybody who reaches the dashboard can read {', '.join(shown)}; take that key out of use, and give the new one to the "
        "head in its environment or in a .env file (cluster/README.md)",
    )


def _node(node: Node) -> Finding:
    cards = {gpu: node.gpus.count(gpu) for gpu in node.gpus}
    gpus = ", ".join(f"{number} x {gpu.name} of {gpu.memory / 2**30:.0f} GiB" for gpu, number in cards.items()) or "no GPU"
    slots = {kind: node.resources.get(kind, 0.0) for kind in ("CPU", "GPU")}
    detail = f"{node.host}: {gpus}, {node.cpus} CPUs, {node.memory / 2**30:.0f} GiB; Ray gives out {slots['CPU']:g} CPUs"
    if slots["GPU"] != len(node.gpus):
        detail += f" and {slots['GPU']:g} GPUs, but there are {len(node.gpus)}; start Ray with --num-gpus={len(node.gpus)}"
        return Finding("node", False, detail)
    if node.missing:
        return Finding("node", False, f"{detail}; {', '.join(node.missing)} not there: put it on every node")
    return Finding("node", True, f"{detail} and {slots['GPU']:g} GPUs")


def _versions(nodes: Sequence[Node]) -> Finding:
    if different := different_versions(nodes):
        return Finding("versions", False, f"{'; '.join(different)}: {SAME_PACKAGES}")
    return Finding("versions", True, ", ".join(f"{package} {version}" for package, version in nodes[0].versions.items()))


def _storage(nodes: Sequence[Node], out: Location, experiment: Experiment) -> Finding:
    blind = [node.host for node in nodes if not node.sees]
    refused = [f"{node.host}: {node.refused}" for node in nodes if node.refused]
    if refused:
        return Finding("storage", False, f"{'; '.join(refused)}. Give every node the right to write {out}")
    if not blind:
        return Finding("storage", True, f"{out} is the same from every node, and each may write there")
    detail = f"{out} is not the same from {', '.join(blind)}"
    if experiment.fit.workers and experiment.fit.solver == "adam":
        return Finding("storage", False, f"{detail}, where a fit on several nodes keeps its checkpoints: share it, or give a URI")
    return Finding(
        "storage", True, f"{detail}; that will do as long as the driver stays on {nodes[0].host}, the only one to write it"
    )


def _cache(node: Node, experiment: Experiment) -> Finding:
    name = experiment.model.name
    if experiment.model.loader != "transformers" or name.startswith(("/", ".")):
        return Finding("hub cache", True, f"{node.host}: {node.cache}; {name} does not come from the hub")
    there = "holds" if node.cached else "does not hold"
    return Finding(
        "hub cache", True, f"{node.host}: {node.cache} {there} the weights of {name}{'' if node.cached else ': one download'}"
    )


def _actors(nodes: Sequence[Node], experiment: Experiment) -> Finding:
    try:
        layout = laid_out(experiment, nodes, growth())
        check_resources(layout, growth())
    except InputError as error:
        return Finding("actors", False, str(error))
    on_gpus, slot = layout.gpus_per_actor > 0, layout.gpus_per_actor or layout.cpus_per_actor
    room = sum(int(node.resources.get("GPU" if on_gpus else "CPU", 0.0) / slot + 1e-9) for node in nodes)
    wait = f"; the nodes that are here have room for {room} of them" if room < layout.actors else ""
    return Finding("actors", True, f"{layout.actors} of {slot:g} {'GPU' if on_gpus else 'CPU'}s each{wait}")
