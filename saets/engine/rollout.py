"""Steered rollouts in which every row has its own vector, scale, prompt and seed.

One dense `[rows, d_model]` buffer is added to the residual stream at the hook, at every position unless told otherwise: BOS,
prompt and generated tokens alike. All rows have one length, so there is no padding and no mask. Blocks up to the hook never see
the vector, so the residual caught there before it is added IS the unsteered residual of the generated text, and effects need no
second pass (method, identities 1, 3 and 5). Rows of one vector that begin with the same prompt share the reading of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saets.engine.batch import Batch, Row
from saets.engine.choice import decoder_for
from saets.engine.decoder import Steps
from saets.engine.graphs import StepGraphs
from saets.engine.sampling import sample_top_k
from saets.errors import InputError
from saets.shapes import Float, Int
from saets.tokens import encode as encode_text
from saets.vector.positions import EVERYWHERE, Positions

Encode = Callable[[Tensor], Tensor]
"""From the residual stream [rows, d_model], in float32, to what is summed over positions [rows, features]; an SAE's encoder."""


class Rollouts(NamedTuple):
    """What a batch gave, in the order of its rows."""

    tokens: Int[Tensor, "rows length"]
    """Token ids on the CPU, BOS and prompt included."""
    sums: Float[Tensor, "rows features"] | None
    """Encoded residuals summed over the generated positions, on the encoder's device; None without an encoder."""


class RolloutEngine:
    """Decodes batches of rollouts of one model, steering at one hook."""

    def __init__(self, model: Any, hook_name: str, *, top_k: int = 50, temperature: float = 1.0, tokenizer: Any = None) -> None:
        """`model` is a `TransformerBridge` or a transformers causal language model; its tokenizer reads prompts given as text.

        Raises:
            InputError: unknown hook, top_k outside the vocabulary, temperature not above 0.
        """
        self.decoder = decoder_for(model, hook_name)
        if not 1 <= top_k <= self.decoder.d_vocab:
            raise InputError(f"top_k is {top_k}; expected 1 to {self.decoder.d_vocab}, the size of the vocabulary")
        if not temperature > 0:
            raise InputError(f"temperature is {temperature}; expected a positive number")
        self.tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        self.hook_name, self.top_k, self.temperature = hook_name, top_k, temperature
        self.device, self.dtype = self.decoder.device, self.decoder.dtype
        self.hook_device = self.decoder.hook_device
        """Where `encode` gets the residual stream: an SAE belongs there."""
        graphs = self.device.type == "cuda" and len(self.decoder.devices) == 1 and self.decoder.shares_prompts
        self._graphs = StepGraphs() if graphs else None

    @torch.no_grad()
    def run(
        self,
        rows: Sequence[Row],
        vectors: Float[Tensor, "vectors d_model"] | None,
        length: int,
        encode: Encode | None = None,
        *,
        share_prompts: bool = True,
        positions: Positions = EVERYWHERE,
    ) -> Rollouts:
        """Roll out the rows to `length` tokens, BOS and prompt included.

        `vectors` are scale x unit vector. `encode` is applied to h_L of every generated position, the last one included, and
        summed a row; BOS and prompt positions have the same h_L with and without a vector and are left out. With
        `share_prompts` the last bits of a row depend on how many rows of its batch have which prompt; without it only on the
        number of rows. `positions` says which of them are steered; those left out cost as much as the others.

        Raises:
            InputError: no rows, a prompt that leaves no free position, vectors of another width, with NaN or infinity, or fewer
                than the rows name.
            RuntimeError: the hook did not run, so the rows would not have been steered.
        """
        batch = self._batch(rows, vectors, length, share=share_prompts and self.decoder.shares_prompts, positions=positions)
        if self._graphs is not None:
            batch = self._graphs.adopt(batch, encode)
        with self.decoder.steps(len(rows), length) as steps:
            for these, tokens, added, of in batch.shared_prompts():
                start = tokens.shape[1]
                logits = steps.prompts(tokens, added, these, of)[of]
                batch.tokens[these, start] = self._draw(logits, batch.seeds[these], start)
            for position in range(batch.first, length - (encode is None)):
                advance = functools.partial(self._advance, batch, steps, position, encode)
                if self._graphs is None:
                    advance()
                else:
                    self._graphs.run(position, advance)
        sums = None if batch.sums is None else batch.sums[batch.back.to(batch.sums.device)]
        return Rollouts(batch.tokens[batch.back].cpu(), sums)

    def _advance(self, batch: Batch, steps: Steps, position: int, encode: Encode | None) -> None:
        """Read the tokens at one position and draw the next ones; runs on the device without waiting for it."""
        active, generated = batch.reading(position), batch.generated(position)
        last = position == batch.length - 1
        step = steps.step(batch.tokens[:active, position], position, batch.added(position), last=last)
        if encode is not None and generated:
            batch.add(encode(step.residual[:generated].float()))
        if step.logits is not None:
            batch.take(self._draw(step.logits, batch.seeds[:active], position + 1), position + 1)

    def _draw(self, logits: Tensor, seeds: Tensor, position: int) -> Tensor:
        return sample_top_k(logits, seeds, position, top_k=self.top_k, temperature=self.temperature)

    def prompt_tokens(self, rows: Sequence[Row], length: int) -> list[tuple[int, ...]]:
        """BOS and prompt tokens of each row.

        Raises:
            InputError: no rows, or a prompt that leaves no free position.
        """
        if not rows:
            raise InputError("no rows to roll out; give at least one prompt")
        ids = {prompt: self._encoded(prompt) for prompt in {row.prompt for row in rows}}
        for prompt, tokens in ids.items():
            if not 1 <= len(tokens) < length:
                raise InputError(
                    f"prompt {prompt!r} is {len(tokens)} tokens with BOS; rollouts of {length} tokens leave nothing to sample"
                )
        return [ids[row.prompt] for row in rows]

    def _encoded(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            return prompt
        if self.tokenizer is None:
            raise InputError(f"prompt {prompt!r} is text, and the engine has no tokenizer; give token ids or a tokenizer")
        return tuple(encode_text(self.tokenizer, prompt))

    def _batch(self, rows: Sequence[Row], vectors: Tensor | None, length: int, *, share: bool, positions: Positions) -> Batch:
        prompts = self.prompt_tokens(rows, length)
        d_model = self.decoder.d_model
        vectors = torch.zeros(0, d_model) if vectors is None else vectors
        if vectors.ndim != 2 or vectors.shape[1] != d_model:
            raise InputError(f"vectors have shape {tuple(vectors.shape)}; expected [vectors, {d_model}]")
        if not torch.isfinite(vectors).all():
            raise InputError("a steering vector holds NaN or infinity")
        named = [row.vector for row in rows if row.vector is not None]
        if named and not 0 <= min(named) <= max(named) < len(vectors):
            raise InputError(f"rows name vectors {min(named)} to {max(named)}; {len(vectors)} were given")
        return Batch(rows, prompts, vectors.to(self.device, self.dtype), length, share=share, positions=positions)
