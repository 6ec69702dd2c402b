"""What a model writes when a feature is boosted: the feature's output score, and the tokens that become likelier.

The output score is that of Arad, Mueller and Belinkov (arXiv 2505.20063, as their code computes it): the feature is boosted on a
neutral prompt, and of its 20 top tokens by the logit lens the best one's next probability is multiplied by
1 - rank / vocabulary size. Two things differ here. The figure is a mean over several prompts, less the same figure unboosted. And
the boost is what steering does, a length added at every position along the feature's unit decoder row, where theirs adds ten
times the largest activation to the feature at the last position.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saets.engine.choice import decoder_for
from saets.engine.decoder import Decoder
from saets.shapes import Float, Int
from saets.tokens import encode

NEUTRAL = ("From my experience,", "I think", "Last night", "The weather")
"""Prompts that are about nothing much; the first is the paper's."""

OWN_TOKENS = 20
"""Top tokens of a feature by the logit lens, as in the paper."""

BOOST = 0.4
"""Length of a boost, as a share of the residual stream's median length on the prompts: about the calibrated scales of SmolLM2."""

ROWS_AT_ONCE = 32
"""Features boosted in one pass; each needs logits of a whole prompt."""


class Boosted(NamedTuple):
    """What boosting each of some features does."""

    output: Float[Tensor, " features"]
    """Output score; above 0 where boosting brings out the feature's own tokens, at most 1."""
    own: Int[Tensor, "features tokens"]
    """Top tokens by the logit lens, best first."""
    raised: Int[Tensor, "features tokens"]
    """Tokens whose log probability rises most, on average over the prompts."""


class Booster:
    """A model split at a hook, ready to be boosted there."""

    def __init__(self, model: Any, hook_name: str) -> None:
        """`model` is a `TransformerBridge`. Raises `InputError` where it has no such hook."""
        self.decoder: Decoder = decoder_for(model, hook_name)
        self._lens = decoder_for(model, f"blocks.{self.decoder.n_blocks - 1}.hook_resid_post")
        self._prompts = [torch.tensor([encode(model.tokenizer, prompt)]).to(self.decoder.device) for prompt in NEUTRAL]
        self._residuals = [self.decoder.lower(prompt) for prompt in self._prompts]
        lengths = torch.cat([residual[0, 1:].float().norm(dim=-1) for residual in self._residuals])
        self.scale = BOOST * lengths.median().item()
        """L2 length added, BOS and all other positions alike."""

    @torch.no_grad()
    def boost(self, rows: Float[Tensor, "features d_model"]) -> Boosted:
        """Each feature by itself, given its decoder row of any length."""
        parts = [self._boost(normalize(part.float(), dim=-1)) for part in rows.split(ROWS_AT_ONCE)]
        return Boosted(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def lens(self, directions: Float[Tensor, "features d_model"]) -> Float[Tensor, "features d_vocab"]:
        """Logit lens: the model's last norm and unembedding of each direction, of any length, by itself."""
        residual = directions.to(self._lens.hook_device, self._lens.dtype)[:, None]
        logits: Tensor = self._lens.upper(torch.zeros(len(residual), 1, dtype=torch.int64, device=self._lens.device), residual)
        return logits[:, 0].float()

    def _boost(self, directions: Float[Tensor, "features d_model"]) -> Boosted:
        own = self.lens(directions).topk(OWN_TOKENS).indices
        scores, rises = [], []
        for prompt, residual in zip(self._prompts, self._residuals, strict=True):
            added = torch.cat([torch.zeros_like(directions[:1]), self.scale * directions]).to(residual)
            logits = self.decoder.upper(prompt.expand(len(added), -1), residual + added[:, None])[:, -1]
            logprobs = logits.float().log_softmax(-1)
            unboosted = logprobs[:1].expand(len(own), -1)
            scores.append(_score(logprobs[1:], own) - _score(unboosted, own))
            rises.append(logprobs[1:] - unboosted)
        raised = torch.stack(rises).mean(0).topk(OWN_TOKENS).indices
        return Boosted(*(part.cpu() for part in (torch.stack(scores).mean(0), own, raised)))


def _score(logprobs: Float[Tensor, "features d_vocab"], own: Int[Tensor, "features tokens"]) -> Float[Tensor, " features"]:
    """The best own token's probability times 1 - rank / vocabulary size; the likeliest token has rank 0."""
    best = logprobs.gather(1, own).max(1).values
    rank = (logprobs > best[:, None]).sum(1)
    return best.exp() * (1 - rank / logprobs.shape[1])
