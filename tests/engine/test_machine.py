"""How many rows a step has: chosen from memory, halved where it runs out, and the same afterwards."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from saets.effects.sources import vector_items
from saets.effects.worker import EffectWorker, Measurement, describe, rows_per_step
from saets.engine import machine
from saets.engine.bridge import BridgeDecoder
from saets.engine.plain import PlainDecoder
from saets.engine.rollout import RolloutEngine
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment

PIN = ["model.dtype=float32", "model.device=cpu"]
HOOK = "blocks.2.hook_resid_post"


def test_more_free_memory_fits_more_rows_and_never_none(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = PlainDecoder(tiny.plain, HOOK)
    row = decoder.bytes_per_row(16) + 3 * 4 * 64
    for free, expected in ((0, 1), (100 * row, 70), (1000 * row, 700), (1 << 50, 1024)):
        monkeypatch.setattr(machine, "free_bytes", lambda device, free=free: free)
        assert machine.rows_that_fit(decoder, 16, 64) == expected
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000 * row)
    assert machine.rows_that_fit(decoder, 16, 64, share=0.5) == 350


def test_a_rows_memory_is_keys_values_logits_and_activations(tiny: Any) -> None:
    keys_and_values = 2 * 4 * 4 * 8 * 10  # both, blocks, heads, numbers a head, positions
    assert PlainDecoder(tiny.plain, HOOK).bytes_per_row(10) == 4 * (keys_and_values + 4 * 64 + 2 * 258)
    assert BridgeDecoder(tiny, HOOK).bytes_per_row(10) == 2 * PlainDecoder(tiny.plain, HOOK).bytes_per_row(10)


def test_this_machine_has_free_memory() -> None:
    assert machine.free_bytes(torch.device("cpu")) > 1 << 26


def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert machine.is_out_of_memory(caught.value)
    assert machine.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not machine.is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not machine.is_out_of_memory(MemoryError())


@pytest.mark.parametrize(("rows", "rollouts", "expected"), [(100, 12, 96), (12, 12, 12), (11, 12, 11), (1, 12, 1), (0, 12, 1)])
def test_a_step_has_whole_vectors_where_one_fits(rows: int, rollouts: int, expected: int) -> None:
    assert rows_per_step(rows, rollouts) == expected


def test_auto_takes_whole_vectors_of_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saets.effects.worker.rows_that_fit", lambda *_, **__: 31)
    assert EffectWorker(load_experiment("tiny", [*PIN, "execution.rows='auto'"])).rows == 24
    assert EffectWorker(load_experiment("tiny", [*PIN, "execution.rows='auto'"]), rows=36).rows == 36
    assert EffectWorker(load_experiment("tiny", [*PIN, "execution.rows=13"])).rows == 12


def test_out_of_memory_halves_the_rows_for_good_and_the_effects_are_the_same(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items = list(itertools.islice(vector_items(tiny_experiment, 32), 3))
    expected = EffectWorker(tiny_experiment).measure(items)
    run, tried = RolloutEngine.run, []

    def small_machine(self: RolloutEngine, rows: Any, *rest: Any, **options: Any) -> Any:
        tried.append(len(rows))
        if len(rows) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, rows, *rest, **options)

    monkeypatch.setattr(RolloutEngine, "run", small_machine)
    worker = EffectWorker(tiny_experiment)
    found = worker.measure(items)
    assert tried[:3] == [24, 12, 6]
    assert set(tried[3:]) == {6}
    assert (worker.rows, describe(worker)["rows_per_step"]) == (6, 6)
    assert "out of memory at 24 rows a step; going on with 12" in caplog.text
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Measurement)
        assert isinstance(other, Measurement)
        assert np.allclose(one.mean, other.mean, rtol=1e-5, atol=1e-6)


def test_other_errors_and_memory_that_runs_out_at_one_row_are_not_hidden(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [next(vector_items(tiny_experiment, 32))]
    for error, message in ((RuntimeError("shapes do not fit"), "shapes"), (torch.OutOfMemoryError("no memory"), "no memory")):
        worker = EffectWorker(tiny_experiment)
        monkeypatch.setattr(RolloutEngine, "run", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(RuntimeError, match=message):
            worker.measure(items)
