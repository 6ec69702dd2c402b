"""The two decoders against the models they run, for several families of models with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from saets.engine.attention import rollout_attention
from saets.engine.batch import Row
from saets.engine.bridge import BridgeDecoder
from saets.engine.choice import decoder_for
from saets.engine.decoder import Unsupported, find_blocks, skipped
from saets.engine.plain import PlainDecoder, share_weights
from saets.engine.reference import steered
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import sample_top_k
from saets.errors import InputError

HOOK = "blocks.1.hook_resid_post"
SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "initializer_range": 0.3, "bos_token_id": 0}
HEADS = {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, **HEADS),
    "gemma2": transformers.Gemma2Config(**SMALL, **HEADS, sliding_window=5, query_pre_attn_scalar=6, pad_token_id=0),
    "gemma3": transformers.Gemma3TextConfig(**SMALL, **HEADS, sliding_window=5, query_pre_attn_scalar=6, pad_token_id=0),
    "qwen2": transformers.Qwen2Config(**SMALL, **{k: v for k, v in HEADS.items() if k != "head_dim"}),
    "qwen3": transformers.Qwen3Config(**SMALL, **HEADS),
    "gpt2": transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=4, n_head=4, initializer_range=0.3, bos_token_id=0),
    "neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=40, num_attention_heads=4),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval().requires_grad_(False)


def vectors(n: int, scale: float = 4.0) -> Tensor:
    found = torch.randn(n, 24, generator=torch.Generator().manual_seed(1))
    return scale * found / found.norm(dim=1, keepdim=True)


def test_rollouts_are_those_of_full_passes_with_the_models_own_attention(model: Any) -> None:
    engine = RolloutEngine(model, HOOK, top_k=20)
    assert isinstance(engine.decoder, PlainDecoder)
    batch = [Row(prompt, seed, seed % 2) for seed, prompt in enumerate([(0,), (0, 5, 9), (0,), (0, 7)] * 2)]
    tokens, _ = engine.run(batch, vectors(2), 12)
    block = find_blocks(model, 4)[1]
    for row, text in zip(batch, tokens, strict=True):
        with steered(block, vectors(2)[row.vector or 0]):
            logits = model(text[None, :-1], use_cache=False).logits[0]
        for position in range(len(row.prompt), 12):
            drawn = sample_top_k(logits[position - 1][None], torch.tensor([row.seed]), position, top_k=20, temperature=1.0)
            assert text[position] == drawn.item()


def test_the_two_halves_make_the_whole(model: Any) -> None:
    decoder = decoder_for(model, HOOK)
    tokens = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(2))
    expected = model(tokens, output_hidden_states=True)
    residual = decoder.lower(tokens)
    assert torch.allclose(residual, expected.hidden_states[2], atol=1e-4)
    assert torch.allclose(decoder.upper(tokens, residual), expected.logits, atol=1e-4)
    with steered(find_blocks(model, 4)[1], vectors(1)[0]):
        moved = model(tokens).logits
    assert torch.allclose(decoder.upper(tokens, residual + vectors(1)[0]), moved, atol=1e-4)


@pytest.mark.parametrize("hook_name", [HOOK, "blocks.0.hook_resid_post", "blocks.3.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_both_decoders_of_one_model_agree(tiny: Any, hook_name: str) -> None:
    plain, bridge = decoder_for(tiny, hook_name), BridgeDecoder(tiny, hook_name)
    assert isinstance(plain, PlainDecoder)
    tokens = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(2))
    residual = plain.lower(tokens)
    assert torch.allclose(residual, bridge.lower(tokens), atol=1e-4)
    shifted = residual + 3.0
    assert torch.allclose(plain.upper(tokens, shifted), bridge.upper(tokens, shifted), atol=1e-4)
    assert (plain.d_model, plain.d_vocab, plain.n_blocks) == (bridge.d_model, bridge.d_vocab, bridge.n_blocks) == (32, 258, 4)


def test_a_hook_before_the_first_block_is_left_to_the_bridge_which_has_no_upper_half_there(tiny: Any) -> None:
    decoder = decoder_for(tiny, "blocks.0.hook_resid_pre")
    assert isinstance(decoder, BridgeDecoder)
    with pytest.raises(InputError, match="before the first block"):
        decoder.upper(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 32))


def test_a_model_whose_attention_is_not_computed_here_goes_through_the_bridge(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_little(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        out, _ = rollout_attention(*args, **kwargs)
        return out * 1.2, None

    interface = transformers.AttentionInterface
    monkeypatch.setitem(interface._global_mapping, "saets_rollout", off_by_a_little)
    with pytest.raises(Unsupported, match="logits that differ"):
        PlainDecoder(tiny.plain, HOOK)
    assert isinstance(decoder_for(tiny, HOOK), BridgeDecoder)
    with pytest.raises(InputError, match=r"LlamaForCausalLM cannot be steered as it is .* load it with saets.load_model"):
        decoder_for(tiny.plain, HOOK)


def test_passing_blocks_by_leaves_them_the_forward_they_have_of_their_own() -> None:
    blocks: list[nn.Module] = [nn.Linear(2, 2), nn.Linear(2, 2)]
    own = blocks[0].__dict__["forward"] = lambda hidden: hidden + 1
    with skipped(blocks, torch.ones(2)):
        assert torch.equal(blocks[1](blocks[0](torch.zeros(2))), torch.ones(2))
    assert blocks[0].__dict__["forward"] is own
    assert "forward" not in blocks[1].__dict__


def test_blocks_are_the_models_one_long_list(tiny: Any) -> None:
    assert find_blocks(tiny.plain, 4) == list(tiny.plain.model.layers)
    with pytest.raises(Unsupported, match="not one list of 5 blocks"):
        find_blocks(tiny.plain, 5)
    twice = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])])
    with pytest.raises(Unsupported, match="not one list of 1 blocks"):
        find_blocks(twice, 1)


def test_a_bridge_keeps_a_plain_model_of_the_same_tensors_and_is_not_changed_by_it(tiny: Any) -> None:
    of_bridge = {parameter.data_ptr() for parameter in tiny.original_model.parameters()}
    assert {parameter.data_ptr() for parameter in tiny.plain.parameters()} <= of_bridge
    assert not any(name.startswith("plain") for name in tiny.state_dict())
    twin = share_weights(tiny.plain)
    assert twin.model.layers[0] is not tiny.plain.model.layers[0]
    assert twin.lm_head.weight is tiny.plain.lm_head.weight
    assert twin.config is not tiny.plain.config


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (7, 7), (3, 7)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3, 20])
def test_attention_written_out(queries: int, keys: int, softcap: float | None, window: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 6, queries, 5, generator=generator)
    key, value = torch.randn(2, 2, 2, keys, 5, generator=generator)
    found, _ = rollout_attention(nn.Module(), query, key, value, None, scaling=0.7, softcap=softcap, sliding_window=window)
    assert found.shape == (2, queries, 6, 5)
    for row in range(2):
        for head in range(6):
            for q in range(queries):
                at = keys - queries + q
                seen = [k for k in range(keys) if k <= at and (window is None or k > at - window)]
                scores = torch.tensor([0.7 * float(query[row, head, q] @ key[row, head // 3, k]) for k in seen])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp() / scores.exp().sum()
                expected = sum(w * value[row, head // 3, k] for w, k in zip(weights, seen, strict=True))
                assert torch.allclose(found[row, q, head], expected, atol=1e-5)


def test_attention_that_is_not_computed_here_is_refused() -> None:
    states = torch.zeros(1, 2, 1, 4)
    for other in ({"s_aux": torch.ones(2)}, {"position_bias": torch.ones(1)}):
        with pytest.raises(Unsupported, match=next(iter(other))):
            rollout_attention(nn.Module(), states, states, states, None, **other)
    with pytest.raises(Unsupported, match="masks"):
        rollout_attention(nn.Module(), states, states, states, torch.zeros(1, 1, 1, 1))
