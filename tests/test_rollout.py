"""Batched rollouts: the residuals they catch, the vectors they add, and that a row's text is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saets.errors import InputError
from saets.rollout import FREE, RolloutEngine, Row
from saets.sampling import row_seed, sample_top_k

HOOK = "blocks.2.hook_resid_post"
LENGTH = 14
PROMPTS = ("", "I think", "The", "I went up")


def rows(n: int, what: str = "rollout") -> list[Row]:
    return [Row(PROMPTS[i % len(PROMPTS)], row_seed(what, i)) for i in range(n)]


def scaled(n: int, scale: float = 8.0, seed: int = 0) -> Tensor:
    """n different directions of this length."""
    vectors = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
    return scale * vectors / vectors.square().sum(1, keepdim=True).sqrt()


def residual_of(model: Any, tokens: Tensor, hook_name: str = HOOK) -> Tensor:
    """The unsteered residual stream of whole texts, in one pass."""
    return model.run_with_cache(tokens, names_filter=hook_name)[1][hook_name]


def hooked(model: Any) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


@pytest.fixture(scope="module")
def engine(tiny: Any) -> RolloutEngine:
    return RolloutEngine(tiny, HOOK, top_k=20)


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.2.hook_resid_pre"])
def test_the_residuals_caught_while_steering_are_those_of_the_unsteered_model_on_the_text(tiny: Any, hook_name: str) -> None:
    caught: dict[int, Tensor] = {}
    engine = RolloutEngine(tiny, hook_name, top_k=20)
    tokens = engine.run(rows(8), scaled(8, 20.0), LENGTH, lambda position, residual: caught.update({position: residual.clone()}))
    assert list(caught) == list(range(LENGTH))
    assert torch.allclose(torch.stack(list(caught.values()), dim=1), residual_of(tiny, tokens, hook_name), rtol=1e-4, atol=1e-3)


def test_the_tokens_are_those_of_a_full_pass_steered_at_every_position(tiny: Any, engine: RolloutEngine) -> None:
    batch, added = rows(8), scaled(8)
    seeds = torch.tensor([row.seed for row in batch])
    expected = torch.zeros(8, 1, dtype=torch.int64) + 256
    starts = [[256, *tiny.tokenizer.encode(row.prompt, add_special_tokens=False)] for row in batch]
    for position in range(1, LENGTH):
        with tiny.hooks(fwd_hooks=[(HOOK, lambda residual, hook: residual + added[:, None, :])]):
            logits = tiny(expected)[:, -1]
        drawn = sample_top_k(logits, seeds, position, top_k=20, temperature=1.0).tolist()
        following = [start[position] if position < len(start) else token for start, token in zip(starts, drawn, strict=True)]
        expected = torch.cat([expected, torch.tensor(following)[:, None]], dim=1)
    assert torch.equal(engine.run(batch, added, LENGTH), expected)


def test_every_row_begins_with_bos_and_its_prompt(engine: RolloutEngine) -> None:
    tokens = engine.run(rows(8), scaled(8, 200.0), LENGTH)
    for row, text in zip(rows(8), tokens.tolist(), strict=True):
        prompt = engine.model.tokenizer.encode(row.prompt, add_special_tokens=False)
        assert text[: len(prompt) + 1] == [256, *prompt]
    assert tokens.shape == (8, LENGTH)


def test_prompt_tokens_are_forced_and_the_others_free(engine: RolloutEngine) -> None:
    forced = engine.forced_tokens([Row("", 1), Row("I think", 2)], 9)
    assert forced[0].tolist() == [256] + [FREE] * 8
    prompt = engine.model.tokenizer.encode("I think", add_special_tokens=False)
    assert forced[1].tolist() == [256, *prompt, FREE]


def test_the_same_seeds_give_the_same_texts_and_other_seeds_give_others(engine: RolloutEngine) -> None:
    first = engine.run(rows(8), scaled(8), LENGTH)
    assert torch.equal(engine.run(rows(8), scaled(8), LENGTH), first)
    others = engine.run(rows(8, "others"), scaled(8), LENGTH)
    assert (others != first).any(dim=1).all()


def test_a_rows_text_does_not_depend_on_its_place_in_the_batch(engine: RolloutEngine) -> None:
    batch, added = rows(12), scaled(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    tokens = engine.run(batch, added, LENGTH)
    assert torch.equal(engine.run([batch[i] for i in order.tolist()], added[order], LENGTH), tokens[order])


def test_a_rows_text_does_not_depend_on_its_neighbours(engine: RolloutEngine) -> None:
    mine, theirs, others = rows(4), rows(8, "theirs"), rows(8, "others")
    first = engine.run([*mine, *theirs], torch.cat([scaled(4), scaled(8, 5.0, seed=1)]), LENGTH)
    second = engine.run([*mine, *others], torch.cat([scaled(4), scaled(8, 100.0, seed=2)]), LENGTH)
    assert torch.equal(first[:4], second[:4])
    assert not torch.equal(first[4:], second[4:])


def test_rows_with_vectors_of_their_own_equal_batches_that_share_one_vector(engine: RolloutEngine) -> None:
    batch, (a, b) = rows(8), scaled(2)
    mixed = engine.run(batch, torch.stack([a, b] * 4), LENGTH)
    assert torch.equal(mixed[0::2], engine.run(batch, a.expand(8, -1), LENGTH)[0::2])
    assert torch.equal(mixed[1::2], engine.run(batch, b.expand(8, -1), LENGTH)[1::2])


def test_a_large_scale_changes_the_texts_and_a_zero_row_stays_unsteered(tiny: Any, engine: RolloutEngine) -> None:
    batch, nothing = rows(8), torch.zeros(8, 32)
    unsteered = engine.run(batch, nothing, LENGTH)
    seeds, tokens = torch.tensor([row.seed for row in batch]), unsteered[:, :-1]
    last = sample_top_k(tiny(tokens)[:, -1], seeds, LENGTH - 1, top_k=20, temperature=1.0)
    assert torch.equal(unsteered[:, -1], last)
    half = torch.cat([scaled(4, 200.0), torch.zeros(4, 32)])
    steered = engine.run(batch, half, LENGTH)
    assert (steered[:4] != unsteered[:4]).any(dim=1).all()
    assert torch.equal(steered[4:], unsteered[4:])


def test_only_the_top_k_tokens_are_drawn_and_a_low_temperature_takes_the_first(tiny: Any) -> None:
    nothing = torch.zeros(8, 32)
    tokens = RolloutEngine(tiny, HOOK, top_k=3).run(rows(8), nothing, LENGTH)
    ranks = (tiny(tokens[:, :-1]).argsort(dim=-1, descending=True) == tokens[:, 1:, None]).float().argmax(dim=-1)
    free = torch.tensor([[i >= len(row.prompt) for i in range(LENGTH - 1)] for row in rows(8)])
    assert ranks[free].max() == 2
    cold = RolloutEngine(tiny, HOOK, top_k=20, temperature=1e-6).run(rows(8), nothing, LENGTH)
    assert torch.equal(tiny(cold[:, :-1]).argmax(dim=-1)[free], cold[:, 1:][free])


def test_the_hooks_are_gone_afterwards_also_after_an_exception_while_running(tiny: Any, engine: RolloutEngine) -> None:
    before = engine.run(rows(4), scaled(4), LENGTH)
    assert not hooked(tiny)

    def fail(position: int, residual: Tensor) -> None:
        if position == 3:
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        engine.run(rows(4), scaled(4), LENGTH, fail)
    assert not hooked(tiny)
    assert torch.equal(engine.run(rows(4), scaled(4), LENGTH), before)


def test_no_rows_are_refused(engine: RolloutEngine) -> None:
    with pytest.raises(InputError, match="no rows to roll out"):
        engine.run([], torch.zeros(0, 32), LENGTH)


def test_a_prompt_that_leaves_nothing_to_sample_is_refused_and_one_free_token_is_enough(engine: RolloutEngine) -> None:
    with pytest.raises(InputError, match="prompt 'I think' is 8 tokens with BOS; rollouts of 8 tokens leave nothing to sample"):
        engine.run([Row("", 1), Row("I think", 2)], torch.zeros(2, 32), 8)
    assert engine.run([Row("I think", 2)], torch.zeros(1, 32), 9).shape == (1, 9)


@pytest.mark.parametrize("shape", [(4, 31), (3, 32), (1, 32)])
def test_vectors_of_another_shape_are_refused_with_both_shapes(engine: RolloutEngine, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=rf"shape \({shape[0]}, {shape[1]}\); expected \(4, 32\)"):
        engine.run(rows(4), torch.zeros(shape), LENGTH)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_vector_with_nan_or_infinity_is_refused(engine: RolloutEngine, bad: float) -> None:
    added = scaled(4)
    added[2, 5] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        engine.run(rows(4), added, LENGTH)


@pytest.mark.parametrize("top_k", [0, -1, 259])
def test_a_top_k_outside_the_vocabulary_is_refused(tiny: Any, top_k: int) -> None:
    with pytest.raises(InputError, match=f"top_k is {top_k}; expected 1 to 258"):
        RolloutEngine(tiny, HOOK, top_k=top_k)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(tiny: Any, temperature: float) -> None:
    with pytest.raises(InputError, match="expected a positive number"):
        RolloutEngine(tiny, HOOK, temperature=temperature)


def test_a_hook_that_the_model_does_not_have_is_refused_with_the_nearest_one(tiny: Any) -> None:
    with pytest.raises(InputError, match="unknown hook name 'blocks.2.hook_resid_pots'.*did you mean 'blocks.2.hook_resid_post'"):
        RolloutEngine(tiny, "blocks.2.hook_resid_pots")
