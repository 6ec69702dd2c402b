"""What a cluster is asked before work begins: room for an actor, and nodes that will do. Ray is not started here."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from saets.distributed import cluster as module
from saets.distributed.cluster import Cluster
from saets.distributed.layout import GROWTH, Layout
from saets.distributed.nodes import Node
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.files.storage import Location, locate


def node(**resources: float) -> dict[str, Any]:
    return {"Alive": True, "Resources": resources}


def asked(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, Any], sees: bool = True) -> list[Location | None]:
    """The folders for which nodes are looked at from now on."""
    found: list[Location | None] = []

    def survey(experiment: Experiment, shared: Location | None) -> list[Node]:
        found.append(shared)
        return [Node("n", {}, 4, 2**36, (), (), sees, "", "", False, each["Resources"]) for each in nodes]

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: list(nodes))
    monkeypatch.setattr(module, "survey", survey)
    monkeypatch.delenv(GROWTH, raising=False)
    return found


def of(experiment: Experiment) -> Cluster:
    return Cluster(experiment.execution, experiment=experiment, out=locate("/shared/run"))


def test_one_node_and_numbers_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, node(CPU=4))
    experiment = load_experiment("tiny")
    assert of(experiment).layout(experiment) == Layout(1, 0.0, 1.0)
    assert found == []


def test_several_nodes_are_looked_at_once_and_for_the_storage_only_where_workers_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, node(CPU=0), node(CPU=4))
    cluster = of(load_experiment("tiny"))
    cluster.connect()
    cluster.connect()
    assert found == [None]
    of(load_experiment("tiny", ["fit.solver=adam", "fit.workers=2"])).connect()
    assert [str(shared) for shared in found[1:]] == ["/shared/run"]


def test_storage_that_the_head_alone_sees_is_found_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, node(CPU=0), node(CPU=4), sees=False)
    of(load_experiment("tiny")).connect()
    with pytest.raises(InputError, match="does not see /shared/run"):
        of(load_experiment("tiny", ["fit.solver=adam", "fit.workers=2"])).connect()


def test_auto_becomes_numbers_and_travels_with_the_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, node(CPU=6))
    experiment = load_experiment("tiny", ["execution.actors=auto"])
    layout = of(experiment).layout(experiment)
    assert found == [None]
    assert layout == Layout(4, 0.0, 1.0), "no more than the machine's own CPUs, whatever Ray gives out"
    assert layout.applied(experiment).execution.actors == 4
    assert layout.applied(experiment).execution.rows == experiment.execution.rows


def test_an_actor_that_fits_on_no_node_is_refused_unless_one_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, node(CPU=4))
    experiment = load_experiment("tiny", ["execution.gpus_per_actor=1"])
    with pytest.raises(InputError, match=r"execution.gpus_per_actor is 1, but the largest of 1 nodes has 0 GPUs"):
        of(experiment).connect()
    monkeypatch.setenv(GROWTH, "nodes=2,GPU=1,CPU=4")
    of(experiment).connect()
