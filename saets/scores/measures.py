"""Figures of a text that need no judge: the unsteered model's loss on it, variety of words, repetition, length."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saets.engine.calibration import token_losses
from saets.judge import clean_text
from saets.records import Generation
from saets.tokens import PromptFormat, encode

LOSS_BATCH = 64
"""Texts whose loss is computed together."""

WORD = re.compile(r"\w+|[^\w\s]")
"""A word, or a mark of punctuation."""


@dataclass(frozen=True)
class Measures:
    """Figures of one completion; None where it is too short to have one."""

    generation_id: str
    loss: float | None
    """Mean next-token loss in nats of the completion's tokens, given BOS and prompt, under the unsteered model."""
    perplexity: float | None
    """exp(loss)."""
    distinct_1: float | None
    """Different words / words, letter case aside; punctuation marks are words."""
    distinct_2: float | None
    """The same of pairs of neighbouring words."""
    repetition: float | None
    """0 where no run of three words or tokens comes twice, 1 for a text that is one loop: 1 - `distinct_share`."""
    n_tokens: int
    n_words: int


class CompletionTokens:
    """Texts as the model reads them: prompts by their format, completions as if the model had written them."""

    def __init__(self, tokenizer: Any, texts: Sequence[tuple[str, str]], prompt_format: PromptFormat = "plain") -> None:
        """Each text is (prompt, completion)."""
        self.heads = [encode(tokenizer, clean_text(prompt), prompt_format) for prompt, _ in texts]
        """BOS and prompt, or what the chat template makes of it."""
        self.tails = [tokenizer.encode(clean_text(completion), add_special_tokens=False) for _, completion in texts]
        """The completions."""


@torch.no_grad()
def completion_losses(model: Any, texts: CompletionTokens) -> list[float]:
    """Mean next-token loss in nats of each completion's tokens given what stands before; NaN for a completion without tokens.

    `model` is a `TransformerBridge`, which no hook steers.
    """
    device = next(model.original_model.parameters()).device
    heads, tails = texts.heads, texts.tails
    losses = [math.nan] * len(tails)
    by_length = sorted((i for i, tail in enumerate(tails) if tail), key=lambda i: len(heads[i]) + len(tails[i]))
    for at in range(0, len(by_length), LOSS_BATCH):
        batch = by_length[at : at + LOSS_BATCH]
        rows = [torch.tensor(heads[i] + tails[i]) for i in batch]
        # Padding on the right is never attended to by the tokens before it, so any token will do.
        tokens: Tensor = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        logits = model(tokens, attention_mask=torch.ones_like(tokens))
        each = token_losses(logits[:, :-1], tokens[:, 1:])
        for row, i in zip(each, batch, strict=True):
            start = len(heads[i]) - 1
            losses[i] = row[start : start + len(tails[i])].mean().item()
    return losses


def measure_texts(model: Any, texts: Sequence[Generation], prompt_format: PromptFormat = "plain") -> list[Measures]:
    """The figures of each text, in order."""
    tokens = CompletionTokens(model.tokenizer, [(text.prompt, text.completion) for text in texts], prompt_format)
    losses = completion_losses(model, tokens)
    return [_measures(text, tail, loss) for text, tail, loss in zip(texts, tokens.tails, losses, strict=True)]


def _measures(text: Generation, tokens: Sequence[int], loss: float) -> Measures:
    words = WORD.findall(text.completion.lower())
    finite = math.isfinite(loss)
    return Measures(
        text.generation_id,
        loss=loss if finite else None,
        perplexity=math.exp(min(loss, 700.0)) if finite else None,
        distinct_1=distinct(words, 1),
        distinct_2=distinct(words, 2),
        repetition=1.0 - distinct_share(text.completion, tokens) if tokens else None,
        n_tokens=len(tokens),
        n_words=len(words),
    )


def distinct(units: Sequence[str] | Sequence[int], n: int) -> float | None:
    """Different runs of n units / runs of n units, 0..1; None where there is no such run."""
    runs = list(zip(*(units[start:] for start in range(n)), strict=False))
    return len(set(runs)) / len(runs) if runs else None


def distinct_share(text: str, tokens: Sequence[int]) -> float:
    """0 for a text that is one loop, 1 where no trigram repeats: (distinct - 1) / (all - 1), the lower of words and tokens.

    Words see through tokens that differ in spelling only or hold a whole run of dots; tokens see a loop inside one long
    word, and writing without spaces.
    """
    return min(_distinct_trigrams(WORD.findall(text.lower())), _distinct_trigrams(tokens))


def _distinct_trigrams(units: Sequence[str] | Sequence[int]) -> float:
    trigrams = list(zip(units, units[1:], units[2:], strict=False))
    return (len(set(trigrams)) - 1) / (len(trigrams) - 1) if len(trigrams) > 1 else 1.0
