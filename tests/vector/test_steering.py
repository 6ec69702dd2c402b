"""Models steered while a block runs: bridges and plain transformers models, at chosen positions, and never in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from saets.errors import InputError
from saets.vector.positions import Part, Positions
from saets.vector.steering import steered
from saets.vector.vector import SteeringVector

HOOK = "blocks.2.hook_resid_post"
TEXT = torch.tensor([[256, 40, 83, 7, 12], [256, 0, 255, 19, 3]])
NEW = 5
SETTINGS: tuple[tuple[Part, bool], ...] = (
    ("all", True),
    ("all", False),
    ("prompt", True),
    ("prompt", False),
    ("generated", False),
)


def vector(hook_name: str = HOOK, seed: int = 0) -> SteeringVector:
    return SteeringVector.from_tensor(torch.randn(32, generator=torch.Generator().manual_seed(seed)), hook_name)


@pytest.fixture(params=["bridge", "plain"])
def model(tiny: Any, request: pytest.FixtureRequest) -> Any:
    """The same weights, once as a bridge and once as a transformers model."""
    return tiny if request.param == "bridge" else tiny.plain


def logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    found = model(tokens, **options)
    return found if isinstance(found, Tensor) else found.logits


def written(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Tokens with the most likely ones after them, by the model's own `generate`."""
    if hasattr(model, "hook_dict"):
        return model.generate(
            tokens, max_new_tokens=NEW, do_sample=False, verbose=False, return_type="tokens", stop_at_eos=False, **options
        )
    mask = options.pop("attention_mask", torch.ones_like(tokens))
    return model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )


def masked_logits(tiny: Any, tokens: Tensor, mask: Tensor, added: Tensor, hook_name: str = HOOK) -> Tensor:
    """One pass in which exactly the positions of a mask [rows, pos] are steered."""
    with tiny.hooks(fwd_hooks=[(hook_name, lambda residual, hook: residual + mask[..., None] * added)]):
        return tiny(tokens)


def hooks_left(tiny: Any) -> list[Any]:
    points = [point for point in tiny.hook_dict.values() if point.fwd_hooks or point.bwd_hooks]
    modules = [*tiny.plain.modules(), tiny.original_model]
    return points + [module for module in modules if module._forward_hooks or module._forward_pre_hooks]


def mask_of(where: Part, bos: bool, length: int, start: int) -> Tensor:
    at = torch.arange(length)
    return {"all": at >= 0, "prompt": at < start, "generated": at >= start}[where] & (at >= (not bos))


@pytest.mark.parametrize(
    "hook_name", ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.3.hook_resid_post"]
)
def test_a_plain_model_is_steered_where_a_bridge_of_the_same_weights_is(tiny: Any, hook_name: str) -> None:
    steering = vector(hook_name)
    with steering.applied(tiny, 12.0):
        expected = tiny(TEXT)
    with steering.applied(tiny.plain, 12.0):
        found = tiny.plain(TEXT).logits
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(found, tiny(TEXT), atol=0.1)


@pytest.mark.parametrize(("where", "bos"), SETTINGS)
def test_generate_with_a_cache_steers_exactly_the_chosen_positions(tiny: Any, model: Any, where: Part, bos: bool) -> None:
    steering = vector().at(where, bos=bos)
    with steering.applied(model, 30.0):
        tokens = written(model, TEXT)
    assert tokens.shape == (2, 5 + NEW)
    mask = mask_of(where, bos, 5 + NEW, 5).expand(2, -1)
    expected = masked_logits(tiny, tokens, mask, 30.0 * steering.direction)
    assert torch.equal(expected[:, 4:-1].argmax(-1), tokens[:, 5:])


def test_each_choice_of_positions_gives_another_text(model: Any) -> None:
    texts = set()
    for where, bos in SETTINGS:
        with vector().at(where, bos=bos).applied(model, 30.0):
            texts.add(str(written(model, TEXT).tolist()))
    assert len(texts) == len(SETTINGS)


@pytest.mark.parametrize(("where", "bos"), SETTINGS[:4])
def test_a_text_that_is_only_read_counts_as_prompt(tiny: Any, model: Any, where: Part, bos: bool) -> None:
    steering = vector().at(where, bos=bos)
    with steering.applied(model, 12.0):
        found = logits(model, TEXT)
    expected = masked_logits(tiny, TEXT, mask_of("all", bos, 5, 5).expand(2, -1), 12.0 * steering.direction)
    assert torch.allclose(found, expected, atol=1e-3)


def test_bos_alone_is_a_prompt_and_what_follows_is_generated(tiny: Any, model: Any) -> None:
    bos, steering = TEXT[:1, :1], vector().at("generated")
    with steering.applied(model, 30.0):
        tokens = written(model, bos)
    expected = masked_logits(tiny, tokens, mask_of("generated", False, 1 + NEW, 1)[None], 30.0 * steering.direction)
    assert torch.equal(expected[:, :-1].argmax(-1), tokens[:, 1:])


def test_a_row_padded_on_the_left_is_steered_as_it_is_alone(tiny: Any) -> None:
    padded = torch.tensor([[0, 0, 256, 83, 7], [256, 0, 255, 19, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    steering = vector().at("prompt", bos=False)
    with steering.applied(tiny.plain, 30.0):
        together = written(tiny.plain, padded, attention_mask=mask)
        alone = written(tiny.plain, padded[:1, 2:])
    assert torch.equal(together[0, 2:], alone[0])


def test_two_prompts_in_one_block_are_both_prompts(tiny: Any, model: Any) -> None:
    with vector().at("prompt").applied(model, 30.0):
        first, second = written(model, TEXT[:1]), written(model, TEXT[1:])
    with vector().at("prompt").applied(model, 30.0):
        both = written(model, TEXT)
    assert torch.equal(torch.cat([first, second]), both)


def test_vectors_at_different_positions_add_up(tiny: Any, model: Any) -> None:
    first, second = vector(seed=1).at("prompt"), vector("blocks.1.hook_resid_post", seed=2)
    with first.applied(model, 6.0), second.applied(model, 9.0):
        found = logits(model, TEXT)
    with tiny.hooks(
        fwd_hooks=[
            (HOOK, lambda residual, hook: residual + 6.0 * first.direction),
            ("blocks.1.hook_resid_post", lambda residual, hook: residual + 9.0 * second.direction),
        ]
    ):
        assert torch.allclose(found, tiny(TEXT), atol=1e-3)


def test_generating_without_a_cache_is_refused_where_prompt_and_generated_tokens_differ(tiny: Any) -> None:
    with pytest.raises(InputError, match="longer and without earlier keys"), vector().at("prompt").applied(tiny.plain, 3.0):
        written(tiny.plain, TEXT, use_cache=False)
    with vector().applied(tiny.plain, 3.0):
        uncached = written(tiny.plain, TEXT, use_cache=False)
    with vector().applied(tiny.plain, 3.0):
        assert torch.equal(written(tiny.plain, TEXT), uncached)


def test_several_tokens_on_top_of_a_cache_are_refused_where_they_may_be_prompt_or_not(tiny: Any) -> None:
    with vector().at("prompt").applied(tiny.plain, 3.0):
        past = tiny.plain(TEXT, use_cache=True).past_key_values
        with pytest.raises(InputError, match="5 tokens were read on top of earlier keys"):
            tiny.plain(TEXT, past_key_values=past)


def test_an_attention_mask_that_hides_where_texts_begin_is_refused_where_bos_is_left_out(tiny: Any) -> None:
    mask = torch.ones(2, 1, 5, 5).tril().bool()
    with (
        pytest.raises(InputError, match=r"attention_mask is \[2, 1, 5, 5\].*expected \[2, 5\]"),
        vector().at("all", bos=False).applied(tiny.plain, 3.0),
    ):
        tiny.plain(TEXT, attention_mask=mask)


def test_a_block_in_which_the_model_is_never_run_is_an_error(tiny: Any, model: Any) -> None:
    with pytest.raises(InputError, match=f"nothing was steered: the model never ran {HOOK}"), vector().applied(model, 3.0):
        pass
    other = tiny.plain if model is tiny else tiny
    with pytest.raises(InputError, match="nothing was steered"), vector().applied(model, 3.0):
        other(TEXT)
    assert not hooks_left(tiny)


def test_a_block_that_reads_none_of_the_chosen_positions_is_an_error(model: Any) -> None:
    with pytest.raises(InputError, match="only generated tokens may be"), vector().at("generated").applied(model, 3.0):
        logits(model, TEXT)
    with pytest.raises(InputError, match="only the prompt without BOS"), vector().at("prompt", bos=False).applied(model, 3.0):
        logits(model, TEXT[:, :1])


def test_an_exception_on_its_way_is_not_replaced_and_nothing_stays_hooked(tiny: Any, model: Any) -> None:
    before = logits(model, TEXT)
    with pytest.raises(KeyError, match="mine"), vector().applied(model, 30.0), vector(seed=1).at("generated").applied(model, 2.0):
        raise KeyError("mine")
    assert not hooks_left(tiny)
    assert torch.equal(logits(model, TEXT), before)


def test_a_model_is_free_of_hooks_after_use_and_computes_as_before(tiny: Any, model: Any) -> None:
    before = logits(model, TEXT)
    for where, bos in SETTINGS[:4]:
        with vector().at(where, bos=bos).applied(model, 30.0):
            logits(model, TEXT)
    assert not hooks_left(tiny)
    assert torch.equal(logits(model, TEXT), before)


def test_a_model_of_another_architecture_is_steered_in_its_blocks() -> None:
    torch.manual_seed(0)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=3, n_head=4)).eval()
    tokens, steering = torch.tensor([[1, 5, 9, 2]]), vector("blocks.1.hook_resid_post")
    seen: list[Tensor] = []
    for block in other.transformer.h[1:]:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    other(tokens)
    with steering.applied(other, 7.0):
        other(tokens)
    assert torch.equal(seen[2], seen[0])
    assert torch.allclose(seen[3] - seen[1], (7.0 * steering.direction).expand(1, 4, 32), atol=1e-5)


def test_a_vector_of_another_model_is_refused_unless_forced(tiny: Any, model: Any) -> None:
    named = SteeringVector.from_tensor(vector().direction, HOOK, model="google/gemma-2-2b")
    with pytest.raises(InputError, match="made for 'google/gemma-2-2b' and the model is 'tiny'"), named.applied(model, 3.0):
        pass
    with named.applied(model, 3.0, force=True):
        forced = logits(model, TEXT)
    with SteeringVector.from_tensor(vector().direction, HOOK, model="tiny").applied(model, 3.0):
        assert torch.equal(logits(model, TEXT), forced)


def test_a_hook_or_width_that_a_plain_model_does_not_have_is_refused(tiny: Any) -> None:
    absent = vector("blocks.4.hook_resid_post")
    with pytest.raises(InputError, match=r"unknown hook name 'blocks.4.*blocks.3"), absent.applied(tiny.plain, 1.0):
        pass
    with pytest.raises(InputError, match="not a residual-stream hook"), vector("blocks.2.mlp").applied(tiny.plain, 1.0):
        pass
    narrow = SteeringVector.from_tensor(torch.ones(31), HOOK)
    with pytest.raises(InputError, match="has 31 numbers, the model's residual stream 32"), narrow.applied(tiny.plain, 1.0):
        pass
    assert not hooks_left(tiny)


def test_what_is_no_language_model_is_refused() -> None:
    steering = steered(nn.Linear(3, 3), HOOK, torch.ones(3), Positions())
    with pytest.raises(InputError, match="a Linear cannot be steered; expected a TransformerBridge"), steering:
        pass


def test_positions_say_what_they_are_and_refuse_what_they_are_not() -> None:
    assert [str(Positions(where, bos)) for where, bos in SETTINGS] == [
        "every position",
        "every position without BOS",
        "the prompt",
        "the prompt without BOS",
        "generated tokens",
    ]
    assert Positions("generated", True) == Positions("generated", False)
    for positions in (Positions(where, bos) for where, bos in SETTINGS):
        assert Positions.from_json(positions.to_json()) == positions
    for damaged in (None, {}, {"where": "all"}, {"where": "all", "bos": "yes"}, {"where": "end", "bos": True}):
        with pytest.raises(InputError, match="expected where"):
            Positions.from_json(damaged)
