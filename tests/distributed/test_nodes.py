"""Several Ray nodes: all are looked at, and where one dies while they measure, every vector has its result, and the same one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster as Nodes
from ray.util.state import list_actors

from saets.distributed.cluster import Cluster
from saets.distributed.effects import measure
from saets.distributed.nodes import check_nodes, survey
from saets.distributed.rollcall import actors_alive, open_board
from saets.effects.pending import Pending
from saets.effects.worker import EffectWorker, Failure, Measurement
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.files.storage import locate

pytestmark = pytest.mark.ray

STORE = 100 * 2**20


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A head without room for actors, which the driver is connected to."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def experiment() -> Experiment:
    """Vectors in batches of two, on two actors."""
    laid_out = ("execution.rows=24", "execution.actors=2")
    return load_experiment("tiny", ["model.dtype=float32", "model.device=cpu", *laid_out, "effects.sources=[{ stop = 60 }]"])


def means(pending: Pending, experiment: Experiment) -> dict[str, np.ndarray]:
    worker = EffectWorker(experiment)
    items = list(pending)
    found = [worker.measure(items[i : i + 2]) for i in range(0, len(items), 2)]
    return {result.item.vector_id: result.mean for results in found for result in results if isinstance(result, Measurement)}


def test_every_node_says_what_it_has_and_sees(nodes: Nodes, experiment: Experiment, tmp_path: Path) -> None:
    nodes.add_node(num_cpus=1, object_store_memory=STORE)
    nodes.wait_for_nodes()
    head, worker = found = survey(experiment, locate(tmp_path), write=True)
    assert (head.resources.get("CPU", 0), worker.resources["CPU"]) == (0, 1)
    assert all(node.sees and not node.refused and not node.missing for node in found)
    assert list(tmp_path.iterdir()) == [], "the markers are gone"
    check_nodes(experiment, found, locate(tmp_path))
    text = load_experiment("tiny", [f"effects.calibration_text={tmp_path / 'text.txt'}"])
    assert [node.missing for node in survey(text)] == [(str(tmp_path / "text.txt"),)] * 2


def test_a_board_is_where_its_driver_is_whatever_other_nodes_there_are(nodes: Nodes) -> None:
    nodes.add_node(num_cpus=1, object_store_memory=STORE)
    nodes.wait_for_nodes()
    boards = [open_board() for _ in range(3)]
    assert [actors_alive(board) for board in boards] == [0] * 3
    here = ray.get_runtime_context().get_node_id()
    assert {actor.node_id for actor in list_actors(address=nodes.address, filters=[("class_name", "=", "_Board")])} == {here}


def test_a_node_that_dies_and_does_not_come_back_costs_nothing_but_time(nodes: Nodes, experiment: Experiment) -> None:
    first, _ = [nodes.add_node(num_cpus=1, object_store_memory=STORE) for _ in range(2)]
    nodes.wait_for_nodes()
    pending = Pending(experiment, 32)
    expected = means(pending, experiment)
    assert len(expected) == 62
    found: list[Measurement | Failure] = []
    with Cluster(experiment.execution) as cluster:
        for i, (results, _) in enumerate(measure(pending, experiment, cluster)):
            found += results
            if i == 4:
                nodes.remove_node(first, allow_graceful=False)
    assert sorted(result.item.vector_id for result in found) == sorted(expected)
    for result in found:
        assert isinstance(result, Measurement)
        assert np.array_equal(result.mean, expected[result.item.vector_id])
