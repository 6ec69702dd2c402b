"""Batches that recorded graphs refer to hold what a fresh batch would; on a GPU, graphs change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saets.engine.batch import Row
from saets.engine.graphs import StepGraphs
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed
from saets.vector.positions import Positions

HOOK = "blocks.2.hook_resid_post"


def rows(what: str, vectors: int = 2) -> list[Row]:
    return [Row(prompt, row_seed(what, i), i % vectors) for i, prompt in enumerate(["", "I think", "", "The"] * 3)]


def vectors(seed: int) -> Tensor:
    return 4 * torch.nn.functional.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)), dim=1)


def encode(residual: Tensor) -> Tensor:
    return torch.relu(residual)


def test_a_batch_in_the_tensors_of_an_earlier_one_gives_what_a_fresh_one_gives(tiny: Any) -> None:
    fresh, kept = RolloutEngine(tiny, HOOK, top_k=20), RolloutEngine(tiny, HOOK, top_k=20)
    kept._graphs = StepGraphs()
    kept._graphs._off = True  # nothing can be recorded on a CPU
    for seed, what in enumerate(("first", "second", "third")):
        expected = fresh.run(rows(what), vectors(seed), 14, encode)
        found = kept.run(rows(what), vectors(seed), 14, encode)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.sums, expected.sums)


def test_a_batch_steered_at_other_positions_takes_new_tensors(tiny: Any) -> None:
    fresh, kept = RolloutEngine(tiny, HOOK, top_k=20), RolloutEngine(tiny, HOOK, top_k=20)
    kept._graphs = StepGraphs()
    kept._graphs._off = True
    for positions in (Positions(), Positions("prompt"), Positions("generated")):
        expected = fresh.run(rows("one"), 20 * vectors(0), 14, positions=positions)
        assert torch.equal(kept.run(rows("one"), 20 * vectors(0), 14, positions=positions).tokens, expected.tokens)


def test_another_shape_or_encoder_takes_new_tensors(tiny: Any) -> None:
    engine = RolloutEngine(tiny, HOOK, top_k=20)
    graphs = engine._graphs = StepGraphs()
    graphs._off = True
    held = []
    few = rows("b")[1:]
    runs = ((rows("a"), 14, encode), (rows("b"), 14, encode), (rows("b"), 15, encode), (few, 15, encode), (few, 15, None))
    for these, length, encoder in runs:
        engine.run(these, vectors(0), length, encoder)
        held.append(graphs._batch)
    assert [one is other for one, other in zip(held, held[1:], strict=False)] == [True, False, False, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_give_the_same_texts_and_sums_as_steps_that_run() -> None:
    from saets.experiment.model_config import Model
    from saets.model import load_model

    model = load_model(Model(name="tiny", loader="random", dtype="float32", device="cuda"))
    plain, graphed = RolloutEngine(model, HOOK, top_k=20), RolloutEngine(model, HOOK, top_k=20)
    plain._graphs = None
    for seed, what in enumerate(("first", "second", "third", "fourth")):
        expected, found = (engine.run(rows(what), vectors(seed), 14, encode) for engine in (plain, graphed))
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.allclose(found.sums, expected.sums)
    assert graphed._graphs is not None
    assert len(graphed._graphs._graphs) == 13
