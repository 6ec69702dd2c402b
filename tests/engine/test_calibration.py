"""The scale search: losses, the reference's rule from measured losses, and the cases it cannot calibrate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saets.effects.calibration_text import calibration_tokens
from saets.effects.worker import scale_rule
from saets.engine import reference
from saets.engine.bridge import BridgeDecoder
from saets.engine.calibration import Calibrator, ScaleRule, _Search
from saets.engine.choice import decoder_for
from saets.errors import InputError
from saets.experiment.config import Effects

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


def calibrator(model: Any, settings: Effects, hook_name: str = HOOK) -> Calibrator:
    return Calibrator(decoder_for(model, hook_name), calibration_tokens(model.tokenizer, settings), scale_rule(settings))


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
        calibration_tokens(tiny.tokenizer, effects(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="asks for 99: give a longer text or ask for fewer"):
        calibration_tokens(tiny.tokenizer, effects(text, calibration_chunks=99))


def test_bos_may_be_left_unsteered(tiny: Any, text: Path) -> None:
    tokens, rule = calibration_tokens(tiny.tokenizer, effects(text)), ScaleRule(fixed_scale=0.0)
    without = Calibrator(decoder_for(tiny, HOOK), tokens, rule, bos=False)
    added = 12.0 * direction(1).repeat(LENGTH, 1)
    added[0] = 0
    (found,) = without.losses([(direction(1), 12.0)])
    assert found == pytest.approx(loss(tiny, added), rel=1e-5)
    assert found != pytest.approx(loss(tiny, 12.0 * direction(1)), rel=1e-4)


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.1.hook_resid_pre", "blocks.3.hook_resid_post"])
def test_the_loss_is_the_mean_cross_entropy_of_the_next_tokens(tiny: Any, text: Path, hook_name: str) -> None:
    found = calibrator(tiny, effects(text), hook_name)
    assert found.unsteered_loss == pytest.approx(loss(tiny, torch.zeros(32), hook_name), rel=1e-5)
    scales = (0.0, 3.0, 40.0)
    expected = [loss(tiny, scale * direction(1), hook_name) for scale in scales]
    assert found.losses([(direction(1), scale) for scale in scales]) == pytest.approx(expected, rel=1e-5)


def test_a_text_of_more_chunks_than_run_together_gives_the_mean_over_all_of_them(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"{i:03d} is the number of this line" for i in range(40)))
    settings = effects(path, calibration_chunks=150, calibration_length=8)
    tokens = calibration_tokens(tiny.tokenizer, settings)
    assert len(tokens) == 150 > 2 * calibrator(tiny, settings)._rows
    scores = logits(tiny, tokens, 16 * direction(2))[:, :-1].double().log_softmax(dim=-1)
    expected = -scores.gather(2, tokens[:, 1:, None]).mean().item()
    assert calibrator(tiny, settings).losses([(direction(2), 16.0)]) == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("rise", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("search", ["bracket", "scan"])
def test_the_scale_lies_on_the_line_to_the_first_grid_point_above_the_target(
    tiny: Any, text: Path, rise: float, absolute: bool, search: str
) -> None:
    grid = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    unsteered = loss(tiny, torch.zeros(32))
    target = unsteered + rise
    rule = {"target_loss": target} if absolute else {"loss_increase": rise}
    measured_together = calibrator(tiny, effects(text, scale_grid=grid, scale_search=search, **rule)).calibrate(
        [direction(seed) for seed in range(4)]
    )
    brackets = set()
    for seed, found in enumerate(measured_together):
        losses = [loss(tiny, scale * direction(seed)) for scale in grid]
        above = next((i for i, measured in enumerate(losses) if measured > target), None)
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
    found = calibrator(tiny, effects(text, loss_increase=50.0)).calibrate([direction(0)])[0]
    assert (found.scale, found.outcome) == (32.0, "capped")
    assert found.loss == pytest.approx(loss(tiny, 32 * direction(0)), rel=1e-5)


@pytest.mark.parametrize("below", [0.0, 1.0])
def test_a_target_that_the_unsteered_model_already_exceeds_is_refused_with_both_losses(
    tiny: Any, text: Path, below: float
) -> None:
    unsteered = calibrator(tiny, effects(text)).unsteered_loss
    with pytest.raises(InputError, match=f"effects.target_loss is .* already {unsteered:.3f}"):
        calibrator(tiny, effects(text, target_loss=unsteered - below))


def test_a_fixed_scale_is_not_searched_and_its_loss_is_measured(tiny: Any, text: Path) -> None:
    found = calibrator(tiny, effects(text, fixed_scale=12.5)).calibrate([direction(3)])[0]
    assert (found.scale, found.outcome) == (12.5, "fixed")
    assert found.loss == pytest.approx(loss(tiny, 12.5 * direction(3)), rel=1e-5)


def test_a_loss_is_the_same_to_the_bit_whatever_it_is_computed_with(tiny: Any, text: Path) -> None:
    found = calibrator(tiny, effects(text))
    asked = [(direction(seed), scale) for seed in range(3) for scale in (2.0, 8.0)]
    together = found.losses(asked)
    assert together == [found.losses([one])[0] for one in asked]
    assert found.losses(asked[::-1]) == together[::-1]


def test_the_fast_decoder_and_the_bridge_calibrate_alike(tiny: Any, text: Path) -> None:
    settings = effects(text)
    tokens = calibration_tokens(tiny.tokenizer, settings)
    slow = Calibrator(BridgeDecoder(tiny, HOOK), tokens, scale_rule(settings))
    fast = calibrator(tiny, settings)
    assert fast.unsteered_loss == pytest.approx(slow.unsteered_loss, rel=1e-6)
    for one, other in zip(fast.calibrate([direction(0)]), slow.calibrate([direction(0)]), strict=True):
        assert one.scale == pytest.approx(other.scale, rel=1e-3)


@pytest.mark.parametrize("search", ["bracket", "scan"])
def test_the_scale_is_the_reference_algorithms(tiny: Any, text: Path, search: str) -> None:
    settings = effects(text, scale_search=search)
    found = calibrator(tiny, settings)
    block = tiny.plain.model.layers[2]
    for seed in range(3):
        expected = reference.calibrate(
            tiny.plain,
            block,
            direction(seed),
            calibration_tokens(tiny.tokenizer, settings),
            target=found.target,
            grid=settings.scale_grid,
        )
        assert found.calibrate([direction(seed)])[0].scale == pytest.approx(expected, rel=1e-3)


GRID = (0.0, 20.0, 40.0, 60.0, 80.0, 100.0)


def searched(rule: ScaleRule, losses: list[float], first: int) -> tuple[Any, list[float]]:
    """The outcome over made-up losses on the grid, and the scales measured for it."""
    search, measured = _Search(rule, losses[0], 1.5, first), []
    while wanted := search.wanted():
        for scale in wanted:
            measured.append(scale)
            search.take(scale, losses[GRID.index(scale)])
    return search.outcome(), measured


RISING = [
    [1.0, 1.1, 1.3, 1.45, 1.6, 2.0],
    [1.0, 1.6, 2.0, 3.0, 4.0, 5.0],
    [1.0, 1.1, 1.2, 1.3, 1.4, 1.6],
    [1.0, 1.0, 1.0, 1.49, 9.0, 9.5],
]


@pytest.mark.parametrize("losses", RISING)
@pytest.mark.parametrize("first", range(1, 6))
def test_both_searches_find_the_same_bracket_where_losses_rise(losses: list[float], first: int) -> None:
    bracket, measured = searched(ScaleRule(loss_increase=0.5, grid=GRID, search="bracket"), losses, first)
    scan, one_by_one = searched(ScaleRule(loss_increase=0.5, grid=GRID, search="scan"), losses, first)
    assert bracket == scan
    assert one_by_one == list(GRID[1 : len(one_by_one) + 1])
    assert len(measured) == len(set(measured)) <= 5


def test_the_search_measures_two_scales_where_it_begins_at_the_crossing() -> None:
    _, measured = searched(ScaleRule(loss_increase=0.5, grid=GRID), [1.0, 1.05, 1.2, 1.45, 1.8, 2.3], first=4)
    assert sorted(measured) == [60.0, 80.0]


def test_a_loss_that_is_not_finite_counts_as_beyond_the_target_and_is_named_where_the_scale_would_need_it() -> None:
    broken = [1.0, 1.2, float("nan"), float("nan"), float("inf"), float("nan")]
    for search in ("bracket", "scan"):
        found, _ = searched(ScaleRule(loss_increase=0.5, grid=GRID, search=search), broken, first=3)
        assert (found.outcome, found.failed_at) == ("not_finite", 40.0)
        found, _ = searched(ScaleRule(loss_increase=0.5, grid=GRID, search=search), [1.0, 1.2, 1.8, *broken[3:]], first=4)
        assert (found.outcome, found.scale) == ("ok", pytest.approx(30.0))


def test_calibrating_leaves_the_model_as_it_was(tiny: Any, text: Path) -> None:
    tokens = chunks(tiny)
    before, plain = tiny(tokens), tiny.plain(tokens).logits
    calibrator(tiny, effects(text)).calibrate([direction(0)])
    assert not any("forward" in block.__dict__ for block in (*tiny.blocks, *tiny.plain.model.layers))
    assert torch.equal(tiny(tokens), before)
    assert torch.equal(tiny.plain(tokens).logits, plain)


def test_a_hook_that_the_model_does_not_have_is_refused(tiny: Any) -> None:
    with pytest.raises(InputError, match="unknown hook name 'blocks.9.hook_resid_post'"):
        decoder_for(tiny, "blocks.9.hook_resid_post")


@pytest.mark.parametrize("rule", [{}, {"fixed_scale": 12.0}, {"loss_increase": 50.0}])
def test_steering_shows_where_the_loss_has_risen_by_a_tenth_of_the_calibrated_rise(
    tiny: Any, text: Path, rule: dict[str, Any]
) -> None:
    found = calibrator(tiny, effects(text, **rule))
    directions = [direction(seed) for seed in range(6)]
    calibrated = found.calibrate(directions)
    rising = 0
    for (low, high, measured), vector, alone in zip(found.ranges(directions), directions, calibrated, strict=True):
        assert high == alone
        assert measured[0] == (0.0, found.unsteered_loss)
        assert len(measured) > 1
        assert list(measured) == sorted(measured)
        assert [each for _, each in measured] == pytest.approx([loss(tiny, scale * vector) for scale, _ in measured], abs=2e-4)
        if high.loss <= found.unsteered_loss:
            assert math.isnan(low)
            continue
        rising += 1
        assert 0 < low < high.scale
        wanted = found.unsteered_loss + 0.1 * (high.loss - found.unsteered_loss)
        steps = [high.scale * step / 10 for step in range(11)]
        losses = [loss(tiny, scale * vector) for scale in steps]
        at = next(i for i in range(1, 11) if steps[i] >= low - 1e-6)
        line = losses[at - 1] + (low - steps[at - 1]) / (steps[at] - steps[at - 1]) * (losses[at] - losses[at - 1])
        assert line == pytest.approx(wanted, abs=2e-4)
    assert rising > 2
