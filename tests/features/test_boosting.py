"""The output score and the tokens that a boost raises, against plain forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saets.features.boosting import BOOST, NEUTRAL, OWN_TOKENS, Booster
from saets.tokens import encode
from saets.vector.vector import SteeringVector

HOOK = "blocks.2.hook_resid_post"


def directions(count: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 32, generator=torch.Generator().manual_seed(1)), dim=-1)


def next_logits(tiny: Any, prompt: str) -> Tensor:
    logits: Tensor = tiny(torch.tensor([encode(tiny.tokenizer, prompt)]))[0, -1]
    return logits


def score(logits: Tensor, own: list[int]) -> float:
    probabilities = logits.softmax(-1)
    best = max(own, key=lambda token: probabilities[token].item())
    rank = sum(probability > probabilities[best] for probability in probabilities)
    return float(probabilities[best] * (1 - rank / len(logits)))


def test_the_output_score_is_probability_times_rank_boosted_less_unboosted_averaged_over_prompts(tiny: Any) -> None:
    booster = Booster(tiny, HOOK)
    rows = directions(3)
    found = booster.boost(5 * rows)
    for row, own, output in zip(rows, found.own.tolist(), found.output, strict=True):
        scores = []
        for prompt in NEUTRAL:
            with SteeringVector.from_tensor(row, HOOK).applied(tiny, booster.scale):
                boosted = next_logits(tiny, prompt)
            scores.append(score(boosted, own) - score(next_logits(tiny, prompt), own))
        assert output.item() == pytest.approx(sum(scores) / len(scores), abs=1e-5)


def test_raised_tokens_are_those_whose_log_probability_rises_most(tiny: Any) -> None:
    booster, row = Booster(tiny, HOOK), directions(1)
    rises = torch.zeros(len(next_logits(tiny, "")))
    for prompt in NEUTRAL:
        with SteeringVector.from_tensor(row[0], HOOK).applied(tiny, booster.scale):
            rises += next_logits(tiny, prompt).log_softmax(-1)
        rises -= next_logits(tiny, prompt).log_softmax(-1)
    assert booster.boost(row).raised[0, :5].tolist() == rises.topk(5).indices.tolist()


def test_a_direction_that_writes_a_token_has_it_for_its_own_and_brings_it_out(tiny: Any) -> None:
    booster = Booster(tiny, "blocks.3.hook_resid_post")
    unembedding = tiny.original_model.get_output_embeddings().weight.detach()
    token = 65
    found = booster.boost(torch.stack([unembedding[token], -unembedding[token]]))
    assert (found.own[0, 0], found.raised[0, 0]) == (token, token)
    assert token not in found.own[1]
    assert found.output[0] > 0


def test_the_logit_lens_is_the_last_norm_and_the_unembedding(tiny: Any) -> None:
    rows = directions(4)
    model = tiny.original_model
    norm = next(module for name, module in model.named_modules() if name.endswith("model.norm") or name.endswith("ln_final"))
    weight = next(parameter for parameter in norm.parameters())
    by_hand = (rows / rows.square().mean(-1, keepdim=True).sqrt() * weight) @ model.get_output_embeddings().weight.T
    assert torch.allclose(Booster(tiny, HOOK).lens(rows), by_hand, atol=1e-2)


def test_the_boost_is_a_share_of_the_residual_streams_median_length(tiny: Any) -> None:
    lengths = []
    for prompt in NEUTRAL:
        _, cache = tiny.run_with_cache(torch.tensor([encode(tiny.tokenizer, prompt)]), names_filter=HOOK)
        lengths += cache[HOOK][0, 1:].norm(dim=-1).tolist()
    assert Booster(tiny, HOOK).scale == pytest.approx(BOOST * torch.tensor(lengths).median().item(), rel=1e-4)


def test_features_boosted_together_give_what_each_gives_alone(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    booster, rows = Booster(tiny, HOOK), directions(5)
    together = booster.boost(rows)
    monkeypatch.setattr("saets.features.boosting.ROWS_AT_ONCE", 1)
    alone = booster.boost(rows)
    assert torch.allclose(together.output, alone.output, atol=1e-5)
    assert torch.equal(together.own, alone.own)
    assert together.own.shape == (5, OWN_TOKENS)


def test_boosting_leaves_the_model_as_it_was(tiny: Any) -> None:
    before = next_logits(tiny, "I think")
    Booster(tiny, HOOK).boost(directions(2))
    assert torch.equal(next_logits(tiny, "I think"), before)
