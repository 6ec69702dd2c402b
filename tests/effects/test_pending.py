"""What a run still has to measure, without keeping the vectors."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest

from saets.effects.pending import Pending, id_numbers
from saets.effects.sources import vector_items
from saets.errors import InputError
from saets.experiment.config import BASELINE, Experiment
from saets.experiment.loading import load_experiment


def ids(pending: Pending) -> list[str]:
    return [item.vector_id for item in pending]


def test_the_baseline_comes_first_then_every_vector_in_the_order_of_the_sources(tiny_experiment: Experiment) -> None:
    pending = Pending(tiny_experiment, 32)
    blocks = tiny_experiment.effects.baseline_blocks
    assert ids(pending) == [
        *(f"{BASELINE}-{i}" for i in range(blocks)),
        *(item.vector_id for item in vector_items(tiny_experiment, 32)),
    ]
    assert len(pending) == blocks + 64
    assert ids(pending) == ids(pending)


def test_what_is_known_or_done_is_left_out(tiny_experiment: Experiment) -> None:
    items = list(vector_items(tiny_experiment, 32))
    known = id_numbers([items[3].vector_id, items[60].vector_id, "ffffffffffffffff"])
    pending = Pending(tiny_experiment, 32, known, blocks=[f"{BASELINE}-1"])
    assert pending.vectors == 62
    assert pending.vectors_known == 2
    pending.done([items[0], items[3], next(iter(pending))])
    left = ids(pending)
    assert f"{BASELINE}-0" not in left
    assert f"{BASELINE}-1" not in left
    assert [one for one in left if not one.startswith(BASELINE)] == [
        item.vector_id for i, item in enumerate(items) if i not in (0, 3, 60)
    ]
    assert len(pending) == len(left)


def test_a_copy_sent_elsewhere_gives_the_same_items(tiny_experiment: Experiment) -> None:
    pending = Pending(tiny_experiment, 32)
    pending.done(list(vector_items(tiny_experiment, 32))[:10])
    assert ids(pickle.loads(pickle.dumps(pending))) == ids(pending)


def test_memory_hardly_grows_with_the_number_of_vectors() -> None:
    def kept(count: int) -> int:
        experiment = load_experiment("tiny", [f"effects.sources=[{{kind='random', count={count}}}]"])
        tracemalloc.start()
        pending = Pending(experiment, 512)
        for _ in pending:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pending.vectors == count
        return peak

    small, large = kept(200), kept(2000)
    assert (large - small) / 1800 < 64  # bytes a vector; the vectors themselves take 2048 each


def test_bad_sources_are_found_before_anything_else() -> None:
    with pytest.raises(InputError, match="row 64"):
        Pending(load_experiment("tiny", ["effects.sources=[{ stop = 65 }]"]), 32)


def test_ids_become_numbers_and_back() -> None:
    assert [f"{number:016x}" for number in id_numbers(["00000000000000ff", "fedcba9876543210"])] == [
        "00000000000000ff",
        "fedcba9876543210",
    ]
    assert id_numbers([]).dtype == np.uint64
