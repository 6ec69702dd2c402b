"""Actors by what nodes have: numbers worked out by hand for GPUs of several sizes, for CPUs, for nodes that may still come."""

from __future__ import annotations

import pytest

from saets.distributed import layout
from saets.distributed.layout import Growth, Layout, growth, laid_out, needed_bytes
from saets.distributed.nodes import Gpu, Node
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.model import weight_count

GIB = 2**30


def node(*, cpus: int = 8, gpus: int = 0, gpu_gib: float = 80, memory_gib: float = 512, slots: float | None = None) -> Node:
    cards = tuple(Gpu("card", int(gpu_gib * GIB)) for _ in range(gpus))
    resources = {"CPU": float(cpus if slots is None else slots), "GPU": float(gpus)}
    return Node("host", {}, cpus, int(memory_gib * GIB), cards, (), True, "", "", False, resources)


def automatic(*settings: str) -> Experiment:
    return load_experiment("tiny", ["execution.actors=auto", "execution.gpus_per_actor=auto", "model.dtype=float32", *settings])


def sizes(layout: Layout) -> tuple[int, float]:
    return layout.actors, layout.gpus_per_actor


def test_what_an_actor_needs_is_weights_sae_process_and_rows() -> None:
    experiment = automatic("execution.rows=auto")
    weights = 4 * weight_count(experiment.model)
    sae = 2 * 32 * 64 * 4
    row = 4 * (2 * 4 * 32) * 16 + 3 * 4 * 64
    assert needed_bytes(experiment, "cuda") == weights + sae + 2 * GIB + 8192 * row
    assert needed_bytes(experiment, "cpu") == weights + sae + 2 * GIB


def test_a_small_model_has_several_actors_on_a_gpu_and_a_large_one_has_one() -> None:
    small = automatic()
    assert sizes(laid_out(small, [node(slots=0), node(gpus=8)], None)) == (32, 0.25)
    assert sizes(laid_out(small, [node(gpus=1, gpu_gib=2.6 / 0.85 * 2)], None)) == (2, 0.5)
    assert sizes(laid_out(small, [node(gpus=2, gpu_gib=3)], None)) == (2, 1.0)


def test_the_smallest_gpu_of_all_nodes_decides() -> None:
    assert sizes(laid_out(automatic(), [node(gpus=4, gpu_gib=80), node(gpus=1, gpu_gib=3)], None)) == (5, 1.0)


def test_without_gpus_actors_fill_the_cpus_that_are_there_and_the_memory() -> None:
    assert sizes(laid_out(automatic(), [node(cpus=2, slots=6)], None)) == (2, 0.0)
    assert sizes(laid_out(automatic(), [node(cpus=64), node(cpus=8, slots=0)], None)) == (64, 0.0)
    assert sizes(laid_out(automatic(), [node(cpus=64, memory_gib=16)], None)) == (6, 0.0)
    assert sizes(laid_out(automatic("execution.cpus_per_actor=4"), [node(cpus=10)], None)) == (2, 0.0)


def test_nodes_that_may_come_count() -> None:
    more = growth("nodes=4, GPU=1, CPU=4, GPU_GiB=48")
    assert more == Growth(4, {"GPU": 1.0, "CPU": 4.0}, 48 * GIB)
    assert sizes(laid_out(automatic(), [node(slots=0)], more)) == (16, 0.25)
    unknown = growth("nodes=4,GPU=1")
    assert sizes(laid_out(automatic(), [node(slots=0)], unknown)) == (4, 1.0)
    assert growth("") is None
    with pytest.raises(InputError, match="expected how many nodes"):
        growth("GPU=1")


def test_numbers_that_are_given_stay() -> None:
    given = load_experiment("tiny", ["execution.actors=3"])
    assert sizes(laid_out(given, [node(gpus=8)], None)) == (3, 0.0)
    half = automatic("execution.gpus_per_actor=0.5")
    assert sizes(laid_out(half, [node(gpus=8)], None)) == (16, 0.5)


def test_a_model_too_slow_without_a_gpu_is_refused_with_the_time_it_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = automatic()
    operations = 2 * weight_count(experiment.model) * 3 * 4 * 16
    monkeypatch.setattr(layout, "_operations_a_second", lambda: operations / 600)
    with pytest.raises(InputError, match=r"no node has a GPU, and .* a vector of tiny would take about 10 minutes .*saets plan"):
        laid_out(experiment, [node()], None)
    on_cpu = automatic("execution.gpus_per_actor=0")
    assert sizes(laid_out(on_cpu, [node(cpus=2)], None)) == (2, 0.0)
