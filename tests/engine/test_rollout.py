"""Batched rollouts: the residuals they catch, the vectors they add, and that a row's text is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saets.engine.batch import Row
from saets.engine.bridge import BridgeDecoder
from saets.engine.plain import PlainDecoder
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed, sample_top_k
from saets.errors import InputError
from saets.vector.positions import Positions

HOOK = "blocks.2.hook_resid_post"
LENGTH = 14
PROMPTS = ("", "I think", "The", "I went up")


def rows(n: int, what: str = "rollout") -> list[Row]:
    """n rows of all prompts; row i has vector i."""
    return [Row(PROMPTS[i % len(PROMPTS)], row_seed(what, i), i) for i in range(n)]


def scaled(n: int, scale: float = 8.0, seed: int = 0) -> Tensor:
    """n different directions of this length."""
    vectors = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
    return scale * vectors / vectors.square().sum(1, keepdim=True).sqrt()


def residual_of(model: Any, tokens: Tensor, hook_name: str = HOOK) -> Tensor:
    """The unsteered residual stream of whole texts, in one pass."""
    return model.run_with_cache(tokens, names_filter=hook_name)[1][hook_name]


def hooked(model: Any) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks] + [
        name for name, module in model.plain.named_modules() if module._forward_hooks
    ]


def bridge_engine(model: Any, hook_name: str = HOOK) -> RolloutEngine:
    """The slow path: every row read from BOS, through the bridge's hooks."""
    engine = RolloutEngine(model, hook_name, top_k=20)
    engine.decoder = BridgeDecoder(model, hook_name)
    return engine


@pytest.fixture(scope="module", params=["plain", "bridge"])
def engine(tiny: Any, request: pytest.FixtureRequest) -> RolloutEngine:
    made = RolloutEngine(tiny, HOOK, top_k=20) if request.param == "plain" else bridge_engine(tiny)
    assert isinstance(made.decoder, PlainDecoder if request.param == "plain" else BridgeDecoder)
    return made


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.2.hook_resid_pre"])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_the_residuals_caught_while_steering_are_those_of_the_unsteered_model_on_the_text(
    tiny: Any, hook_name: str, slow: bool, share: bool
) -> None:
    engine = bridge_engine(tiny, hook_name) if slow else RolloutEngine(tiny, hook_name, top_k=20)
    batch = rows(8)
    tokens, sums = engine.run(batch, scaled(8, 20.0), LENGTH, lambda residual: residual, share_prompts=share)
    unsteered = residual_of(tiny, tokens, hook_name)
    for row, summed, residual in zip(batch, sums, unsteered, strict=True):
        assert torch.allclose(summed, residual[len(row.prompt) + 1 :].sum(0), rtol=1e-4, atol=1e-2)


def test_a_rows_residuals_are_encoded_in_float32_before_they_are_summed(tiny: Any, engine: RolloutEngine) -> None:
    seen: list[Tensor] = []

    def encode(residual: Tensor) -> Tensor:
        seen.append(residual)
        return (residual > 0).float()

    tokens, sums = engine.run(rows(8), scaled(8), LENGTH, encode)
    assert {residual.dtype for residual in seen} == {torch.float32}
    positive = (residual_of(tiny, tokens) > 0).float()
    for row, counted, of in zip(rows(8), sums, positive, strict=True):
        assert torch.equal(counted, of[len(row.prompt) + 1 :].sum(0))


def test_both_decoders_and_shared_prompts_give_the_same_texts(tiny: Any) -> None:
    batch = [Row(prompt, row_seed("same", i), i % 3) for i, prompt in enumerate(PROMPTS * 6)]
    fast, slow = RolloutEngine(tiny, HOOK, top_k=20), bridge_engine(tiny)
    expected = slow.run(batch, scaled(3), LENGTH)
    assert expected.sums is None
    assert torch.equal(fast.run(batch, scaled(3), LENGTH).tokens, expected.tokens)
    assert torch.equal(fast.run(batch, scaled(3), LENGTH, share_prompts=False).tokens, expected.tokens)


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
    assert torch.equal(engine.run(batch, added, LENGTH).tokens, expected)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "positions", [Positions("all", bos=False), Positions("prompt"), Positions("prompt", bos=False), Positions("generated")]
)
def test_only_the_chosen_positions_are_steered(tiny: Any, engine: RolloutEngine, positions: Positions, share: bool) -> None:
    batch, added = rows(8), scaled(8, 30.0)
    starts = torch.tensor([[len(row.prompt) + 1] for row in batch])
    seeds = torch.tensor([row.seed for row in batch])
    tokens, sums = engine.run(batch, added, LENGTH, lambda residual: residual, share_prompts=share, positions=positions)
    at = torch.arange(LENGTH - 1)
    steered = {"all": at >= 0, "prompt": at < starts, "generated": at >= starts}[positions.where] & (at >= (not positions.bos))
    with tiny.hooks(fwd_hooks=[(HOOK, lambda residual, hook: residual + steered.expand(8, -1)[..., None] * added[:, None, :])]):
        logits = tiny(tokens[:, :-1])
    for position in range(1, LENGTH):
        drawn = sample_top_k(logits[:, position - 1], seeds, position, top_k=20, temperature=1.0)
        free = position >= starts[:, 0]
        assert torch.equal(tokens[free, position], drawn[free])
    unsteered = residual_of(tiny, tokens)
    for row, summed, residual in zip(batch, sums, unsteered, strict=True):
        assert torch.allclose(summed, residual[len(row.prompt) + 1 :].sum(0), rtol=1e-4, atol=1e-2)


def test_every_row_begins_with_bos_and_its_prompt(engine: RolloutEngine) -> None:
    tokens = engine.run(rows(8), scaled(8, 200.0), LENGTH).tokens
    for row, text in zip(rows(8), tokens.tolist(), strict=True):
        prompt = engine.tokenizer.encode(row.prompt, add_special_tokens=False)
        assert text[: len(prompt) + 1] == [256, *prompt]
    assert tokens.shape == (8, LENGTH)


def test_a_prompt_may_be_token_ids(engine: RolloutEngine) -> None:
    ids = (256, *engine.tokenizer.encode("I think", add_special_tokens=False))
    text, tokens = (engine.run([Row(prompt, 5)], None, LENGTH).tokens for prompt in ("I think", ids))
    assert torch.equal(text, tokens)
    with pytest.raises(InputError, match=r"prompt \(\) is 0 tokens"):
        engine.run([Row((), 5)], None, LENGTH)


def test_the_same_seeds_give_the_same_texts_and_other_seeds_give_others(engine: RolloutEngine) -> None:
    first = engine.run(rows(8), scaled(8), LENGTH).tokens
    assert torch.equal(engine.run(rows(8), scaled(8), LENGTH).tokens, first)
    others = engine.run(rows(8, "others"), scaled(8), LENGTH).tokens
    assert (others != first).any(dim=1).all()


def test_a_rows_text_does_not_depend_on_its_place_in_the_batch(engine: RolloutEngine) -> None:
    batch, added = rows(12), scaled(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    tokens = engine.run(batch, added, LENGTH).tokens
    assert torch.equal(engine.run([batch[i] for i in order.tolist()], added, LENGTH).tokens, tokens[order])


def test_a_rows_text_does_not_depend_on_its_neighbours(engine: RolloutEngine) -> None:
    mine, theirs, others = rows(4), rows(8, "theirs"), rows(8, "others")
    moved = [row._replace(vector=row.vector + 4) for row in theirs]
    first = engine.run([*mine, *moved], torch.cat([scaled(4), scaled(8, 5.0, seed=1)]), LENGTH).tokens
    moved = [row._replace(vector=row.vector + 4) for row in others]
    second = engine.run([*mine, *moved], torch.cat([scaled(4), scaled(8, 100.0, seed=2)]), LENGTH).tokens
    assert torch.equal(first[:4], second[:4])
    assert not torch.equal(first[4:], second[4:])


def test_rows_with_vectors_of_their_own_equal_batches_that_share_one_vector(engine: RolloutEngine) -> None:
    both = scaled(2)
    mixed = engine.run([row._replace(vector=i % 2) for i, row in enumerate(rows(8))], both, LENGTH, share_prompts=False).tokens
    for which in (0, 1):
        alone = engine.run([row._replace(vector=which) for row in rows(8)], both, LENGTH, share_prompts=False).tokens
        assert torch.equal(mixed[which::2], alone[which::2])


def test_a_large_scale_changes_the_texts_and_a_row_without_a_vector_stays_unsteered(tiny: Any, engine: RolloutEngine) -> None:
    batch = rows(8)
    none = [row._replace(vector=None) for row in batch]
    unsteered = engine.run(none, None, LENGTH).tokens
    seeds, tokens = torch.tensor([row.seed for row in batch]), unsteered[:, :-1]
    last = sample_top_k(tiny(tokens)[:, -1], seeds, LENGTH - 1, top_k=20, temperature=1.0)
    assert torch.equal(unsteered[:, -1], last)
    steered = engine.run([*batch[:4], *none[4:]], scaled(4, 200.0), LENGTH).tokens
    assert (steered[:4] != unsteered[:4]).any(dim=1).all()
    assert torch.equal(steered[4:], unsteered[4:])
    assert torch.equal(engine.run(batch, torch.zeros(8, 32), LENGTH).tokens, unsteered)


def test_rows_of_one_seed_share_their_noise_whatever_vector_they_have(engine: RolloutEngine) -> None:
    tokens = engine.run([Row("I think", 7, 0), Row("I think", 7), Row("I think", 8)], scaled(1, 1e-4), LENGTH).tokens
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[1], tokens[2])


def test_only_the_top_k_tokens_are_drawn_and_a_low_temperature_takes_the_first(tiny: Any) -> None:
    batch = [row._replace(vector=None) for row in rows(8)]
    tokens = RolloutEngine(tiny, HOOK, top_k=3).run(batch, None, LENGTH).tokens
    ranks = (tiny(tokens[:, :-1]).argsort(dim=-1, descending=True) == tokens[:, 1:, None]).float().argmax(dim=-1)
    free = torch.tensor([[i >= len(row.prompt) for i in range(LENGTH - 1)] for row in rows(8)])
    assert ranks[free].max() == 2
    cold = RolloutEngine(tiny, HOOK, top_k=20, temperature=1e-6).run(batch, None, LENGTH).tokens
    assert torch.equal(tiny(cold[:, :-1]).argmax(dim=-1)[free], cold[:, 1:][free])


def test_hooks_and_attention_are_as_before_afterwards_also_after_an_exception_while_running(
    tiny: Any, engine: RolloutEngine
) -> None:
    attention = tiny.plain.config._attn_implementation
    before = engine.run(rows(4), scaled(4), LENGTH).tokens
    logits = tiny.plain(before).logits
    assert not hooked(tiny)
    steps = iter(range(100))

    def fail(residual: Tensor) -> Tensor:
        if next(steps) == 3:
            raise RuntimeError("on purpose")
        return residual

    with pytest.raises(RuntimeError, match="on purpose"):
        engine.run(rows(4), scaled(4), LENGTH, fail)
    assert not hooked(tiny)
    assert tiny.plain.config._attn_implementation == attention
    assert torch.equal(tiny.plain(before).logits, logits)
    assert torch.equal(engine.run(rows(4), scaled(4), LENGTH).tokens, before)


def test_no_rows_are_refused(engine: RolloutEngine) -> None:
    with pytest.raises(InputError, match="no rows to roll out"):
        engine.run([], torch.zeros(0, 32), LENGTH)


def test_a_prompt_that_leaves_nothing_to_sample_is_refused_and_one_free_token_is_enough(engine: RolloutEngine) -> None:
    with pytest.raises(InputError, match="prompt 'I think' is 8 tokens with BOS; rollouts of 8 tokens leave nothing to sample"):
        engine.run([Row("", 1), Row("I think", 2)], None, 8)
    assert engine.run([Row("I think", 2)], None, 9).tokens.shape == (1, 9)


def test_vectors_of_another_width_and_rows_without_one_are_refused(engine: RolloutEngine) -> None:
    with pytest.raises(InputError, match=r"shape \(4, 31\); expected \[vectors, 32\]"):
        engine.run(rows(4), torch.zeros(4, 31), LENGTH)
    with pytest.raises(InputError, match="rows name vectors 0 to 3; 3 were given"):
        engine.run(rows(4), torch.zeros(3, 32), LENGTH)
    with pytest.raises(InputError, match="rows name vectors -1 to -1; 3 were given"):
        engine.run([Row("", 1, -1)], torch.zeros(3, 32), LENGTH)


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
