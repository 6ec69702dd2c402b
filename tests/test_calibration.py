"""The scale search: losses, the reference's rule from measured losses, and the cases it cannot calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saets.calibration import LOSS_BATCH, Calibrator, calibration_tokens
from saets.config import Effects
from saets.errors import InputError
from saets.model import upper_half

HOOK = "blocks.2.hook_resid_post"
LENGTH = 16
PASSAGES = [
    "the weather in London was fine, and so we walked.",
    "too short",
    "A second passage: it has more letters than two chunks.",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(PASSAGES))
    return path


def effects(text: Path, **changes: Any) -> Effects:
    """Calibration on the five chunks of `text`; the loss is to rise by 0.05 unless `changes` name another rule."""
    rule = {} if {"target_loss", "fixed_scale"} & set(changes) else {"loss_increase": 0.05}
    shape = {"calibration_text": str(text), "calibration_chunks": 5, "calibration_length": LENGTH}
    return Effects(**{"scale_grid": (0, 2, 4, 8, 16, 32), **shape, **rule, **changes})


def direction(seed: int) -> Tensor:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return vector / vector.square().sum().sqrt()


def chunks(model: Any) -> Tensor:
    """The chunks of `text`, cut by hand: BOS and 15 bytes each, tails dropped."""
    found = []
    for passage in PASSAGES:
        ids = model.tokenizer.encode(passage, add_special_tokens=False)
        assert len(ids) == len(passage)
        found += [[256, *ids[at : at + 15]] for at in range(0, len(ids) // 15 * 15, 15)]
    return torch.tensor(found)[:5]


def logits(model: Any, tokens: Tensor, added: Tensor, hook_name: str = HOOK) -> Tensor:
    """One pass through all blocks with the vector added at every position."""
    with model.hooks(fwd_hooks=[(hook_name, lambda residual, hook: residual + added)]):
        return model(tokens)


def loss(model: Any, added: Tensor, hook_name: str = HOOK) -> float:
    """Mean over all tokens but the first of -log p(token), written out."""
    tokens = chunks(model)
    scores = logits(model, tokens, added, hook_name)
    total = 0.0
    for row in range(len(tokens)):
        for position in range(1, LENGTH):
            before = scores[row, position - 1].double()
            total -= (before[tokens[row, position]] - before.exp().sum().log()).item()
    return total / (len(tokens) * (LENGTH - 1))


def restored(model: Any) -> bool:
    return not any("forward" in block.__dict__ for block in model.blocks)


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_the_blocks_above_the_hook_alone_give_the_logits_of_a_full_steered_pass(tiny: Any, hook_name: str) -> None:
    tokens, added = chunks(tiny), 10 * direction(0)
    residual = tiny.run_with_cache(tokens, names_filter=hook_name)[1][hook_name]
    with upper_half(tiny, hook_name, residual + added) as upper:
        found = upper(tokens)
    expected = logits(tiny, tokens, added, hook_name)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, tiny(tokens), atol=1e-2)


def test_the_blocks_are_restored_afterwards_also_after_an_exception(tiny: Any) -> None:
    tokens = chunks(tiny)
    before = tiny(tokens)
    residual = torch.zeros(*tokens.shape, 32)
    with upper_half(tiny, HOOK, residual) as upper:
        assert not torch.allclose(upper(tokens), before, atol=1e-2)
    assert restored(tiny)
    with pytest.raises(RuntimeError, match="on purpose"), upper_half(tiny, HOOK, residual):
        raise RuntimeError("on purpose")
    assert restored(tiny)
    assert torch.equal(tiny(tokens), before)


def test_a_hook_below_the_first_block_has_no_upper_half(tiny: Any) -> None:
    refused = pytest.raises(InputError, match="before the first block")
    with refused, upper_half(tiny, "blocks.0.hook_resid_pre", torch.zeros(1, 2, 32)):
        pass


def test_chunks_are_bos_and_a_run_of_one_passage_and_short_tails_are_dropped(tiny: Any, text: Path) -> None:
    found = calibration_tokens(tiny.tokenizer, effects(text))
    assert torch.equal(found, chunks(tiny))
    assert tiny.tokenizer.decode(found[0, 1:]) == "the weather in "
    assert torch.equal(calibration_tokens(tiny.tokenizer, effects(text, calibration_chunks=2)), found[:2])


def test_a_passage_of_exactly_one_chunk_is_used(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "exact.txt"
    path.write_text("fifteen letters\nfourteen bytes\n")
    found = calibration_tokens(tiny.tokenizer, effects(path, calibration_chunks=1))
    assert tiny.tokenizer.decode(found[0, 1:]) == "fifteen letters"
    with pytest.raises(InputError, match="gives 1 chunks of 16 tokens; effects.calibration_chunks asks for 2"):
        calibration_tokens(tiny.tokenizer, effects(path, calibration_chunks=2))


def test_a_text_that_is_missing_or_too_short_is_refused(tiny: Any, tmp_path: Path, text: Path) -> None:
    with pytest.raises(InputError, match="no such calibration text"):
        Calibrator(tiny, HOOK, effects(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="asks for 99: give a longer text or ask for fewer"):
        Calibrator(tiny, HOOK, effects(text, calibration_chunks=99))


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.1.hook_resid_pre", "blocks.3.hook_resid_post"])
def test_the_loss_is_the_mean_cross_entropy_of_the_next_tokens(tiny: Any, text: Path, hook_name: str) -> None:
    calibrator = Calibrator(tiny, hook_name, effects(text))
    assert calibrator.unsteered_loss == pytest.approx(loss(tiny, torch.zeros(32), hook_name), rel=1e-5)
    for scale in (0.0, 3.0, 40.0):
        expected = loss(tiny, scale * direction(1), hook_name)
        assert calibrator.loss(direction(1), scale) == pytest.approx(expected, rel=1e-5)


def test_a_text_of_more_chunks_than_run_together_gives_the_mean_over_all_of_them(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"{i:03d} is the number of this line" for i in range(40)))
    settings = effects(path, calibration_chunks=150, calibration_length=8)
    tokens = calibration_tokens(tiny.tokenizer, settings)
    assert len(tokens) == 150 > 2 * LOSS_BATCH
    scores = logits(tiny, tokens, 16 * direction(2))[:, :-1].double().log_softmax(dim=-1)
    expected = -scores.gather(2, tokens[:, 1:, None]).mean().item()
    assert Calibrator(tiny, HOOK, settings).loss(direction(2), 16.0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rise", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("absolute", [False, True])
def test_the_scale_lies_on_the_line_to_the_first_grid_point_above_the_target(
    tiny: Any, text: Path, rise: float, absolute: bool
) -> None:
    grid = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    unsteered = loss(tiny, torch.zeros(32))
    target = unsteered + rise
    rule = {"target_loss": target} if absolute else {"loss_increase": rise}
    calibrator = Calibrator(tiny, HOOK, effects(text, scale_grid=grid, **rule))
    brackets = set()
    for seed in range(4):
        losses = [loss(tiny, scale * direction(seed)) for scale in grid]
        above = next((i for i, measured in enumerate(losses) if measured > target), None)
        found = calibrator.calibrate(direction(seed))
        if above is None:
            assert (found.outcome, found.scale) == ("capped", 128.0)
            continue
        share = (target - losses[above - 1]) / (losses[above] - losses[above - 1])
        expected = grid[above - 1] + share * (grid[above] - grid[above - 1])
        assert found.outcome == "ok"
        assert found.scale == pytest.approx(expected, rel=1e-2)
        assert found.loss == pytest.approx(target, rel=1e-6)
        assert grid[above - 1] <= found.scale <= grid[above]
        brackets.add(above)
    assert len(brackets) > 1


def test_a_target_that_the_grid_never_reaches_gives_its_end_named_capped(tiny: Any, text: Path) -> None:
    found = Calibrator(tiny, HOOK, effects(text, loss_increase=50.0)).calibrate(direction(0))
    assert (found.scale, found.outcome) == (32.0, "capped")
    assert found.loss == pytest.approx(loss(tiny, 32 * direction(0)), rel=1e-5)


@pytest.mark.parametrize("below", [0.0, 1.0])
def test_a_target_that_the_unsteered_model_already_exceeds_is_refused_with_both_losses(
    tiny: Any, text: Path, below: float
) -> None:
    unsteered = Calibrator(tiny, HOOK, effects(text)).unsteered_loss
    with pytest.raises(InputError, match=f"effects.target_loss is .* already {unsteered:.3f}"):
        Calibrator(tiny, HOOK, effects(text, target_loss=unsteered - below))


def test_a_fixed_scale_is_not_searched_and_its_loss_is_measured(tiny: Any, text: Path) -> None:
    found = Calibrator(tiny, HOOK, effects(text, fixed_scale=12.5)).calibrate(direction(3))
    assert (found.scale, found.outcome) == (12.5, "fixed")
    assert found.loss == pytest.approx(loss(tiny, 12.5 * direction(3)), rel=1e-5)


def test_calibrating_leaves_the_model_as_it_was(tiny: Any, text: Path) -> None:
    tokens = chunks(tiny)
    before = tiny(tokens)
    Calibrator(tiny, HOOK, effects(text)).calibrate(direction(0))
    assert restored(tiny)
    assert torch.equal(tiny(tokens), before)


def test_a_hook_that_the_model_does_not_have_is_refused(tiny: Any, text: Path) -> None:
    with pytest.raises(InputError, match="unknown hook name 'blocks.9.hook_resid_post'"):
        Calibrator(tiny, "blocks.9.hook_resid_post", effects(text))
