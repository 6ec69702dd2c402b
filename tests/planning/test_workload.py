"""What is counted, against counts written out by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.planning.left import Left, what_is_left
from saets.planning.sizes import PromptSizes, model_size, sae_size
from saets.planning.workload import Part, Sizes, workload
from saets.stages.session import Session

BLOCK = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
"""Weights of a block of the tiny model: attention, the three matrices of its MLP, two norms."""

UNEMBEDDING = 32 * 258 / BLOCK
"""Counted in blocks."""


def sizes_of(experiment: Experiment) -> Sizes:
    model = model_size(experiment.model)
    return Sizes(model, sae_size(experiment.sae, model.d_model), PromptSizes(experiment.model), torch.float32)


def parts_of(experiment: Experiment, out: Path, rows: int = 24) -> dict[tuple[str, str], Part]:
    left = what_is_left(Session.looking(experiment, out), 32)
    return {(part.stage, part.what): part for part in workload(experiment, left, sizes_of(experiment), rows)}


def test_sizes_are_those_of_the_weights(tiny_experiment: Experiment) -> None:
    sizes = sizes_of(tiny_experiment)
    assert (sizes.model.d_model, sizes.model.n_blocks, sizes.model.block_weights) == (32, 4, BLOCK)
    assert sizes.model.weights == 4 * BLOCK + 2 * 258 * 32 + 32, "blocks, both embeddings, the last norm"
    assert sizes.model.cache_per_token(torch.float32) == 2 * 4 * 32 * 4
    assert (sizes.sae.d_sae, sizes.sae.flops()) == (64, 2 * 32 * 64)


def test_a_fresh_tiny_run_is_counted_by_hand(tiny_experiment: Experiment, tmp_path: Path) -> None:
    parts = parts_of(tiny_experiment, tmp_path / "none")
    items = 64 + 2  # decoder rows, blocks of the baseline
    prompts = [1, 8, 12]  # BOS and a token a byte
    read, steps, rows = sum(prompts), 4 * sum(16 - start for start in prompts), 12
    rollouts = parts["effects", "rollouts"]
    assert rollouts.items == items * rows
    assert rollouts.tokens == items * (read + steps)
    through = (read + steps - rows) * (4 + UNEMBEDDING) + rows * 3 + steps * 32 * 64 / BLOCK
    assert rollouts.token_blocks == pytest.approx(items * through)
    assert rollouts.jobs == items / 2, "24 rows hold two vectors"
    losses = parts["effects", "calibration losses"]
    assert losses.items == round(64 * 2.4) and losses.tokens == losses.items * 8 * 15
    assert losses.token_blocks == pytest.approx(losses.tokens * (1 + UNEMBEDDING)), "one block lies above the hook"
    texts = parts["texts", "texts"]
    assert texts.items == 2 * (3 * 2 + 1) * 4, "goals x (methods x scales above 0, and unsteered) x samples"
    assert texts.tokens == texts.items * (8 + 12 - 1)
    assert parts["grading", "texts, local judge"].items == texts.items
    assert ("figures", "texts") not in parts, "the local judge finds them"
    assert parts["vectors", "contrast texts"].items > 0


def test_operations_are_two_a_multiplication(tiny_experiment: Experiment) -> None:
    model = model_size(tiny_experiment.model)
    assert model.flops(3, head=False, context=0) == 2 * 3 * BLOCK
    assert model.flops(0, head=True, context=5) == 2 * 32 * 258
    assert model.flops(1, head=False, context=5) - model.flops(1, head=False, context=0) == 2 * (2 * 32 * 5)


def test_prompts_that_are_equal_are_read_once(tmp_path: Path) -> None:
    once = load_experiment("tiny", ["effects.prompts=['I think']"])
    twice = load_experiment("tiny", ["effects.prompts=['I think', 'I think']"])
    first, second = (parts_of(each, tmp_path / "none")["effects", "rollouts"] for each in (once, twice))
    assert second.items == 2 * first.items
    assert second.tokens == 2 * first.tokens - 66 * 8


def test_pieces_of_one_vector_are_filled_up(tiny_experiment: Experiment, tmp_path: Path) -> None:
    whole = parts_of(tiny_experiment, tmp_path / "none", rows=12)["effects", "rollouts"]
    pieces = parts_of(tiny_experiment, tmp_path / "none", rows=5)["effects", "rollouts"]
    assert pieces.jobs == whole.jobs and pieces.tokens == whole.tokens
    assert pieces.job.blocks == 3 * whole.job.blocks, "12 rows in three pieces take their steps three times"


def test_a_scale_that_is_fixed_takes_one_loss(tmp_path: Path) -> None:
    fixed = load_experiment("tiny", ["effects.fixed_scale=4"])
    fixed = fixed.model_copy(update={"effects": fixed.effects.model_copy(update={"loss_increase": None})})
    assert parts_of(fixed, tmp_path / "none")["effects", "calibration losses"].items == 64


def test_what_is_not_left_is_no_work(tiny_experiment: Experiment, tmp_path: Path) -> None:
    left = what_is_left(Session.looking(tiny_experiment, tmp_path / "none"), 32)
    nothing = dataclasses.replace(left, vectors=0, blocks=0, fits=False, pairs=(), texts=Counter(), ungraded=(), unread=0)
    assert isinstance(nothing, Left)
    assert workload(tiny_experiment, nothing, sizes_of(tiny_experiment), 24) == []
