"""Steered rollouts in which every row has its own vector, prompt and seed.

One dense `[rows, d_model]` buffer is added to the residual stream at the hook, at every position: BOS, prompt and generated
tokens alike. Every row starts at BOS; prompt tokens are forced and free tokens sampled, so all rows have one length and there
is no padding. Blocks up to the hook never see the vector, so the residual caught there before it is added IS the unsteered
residual of the generated text, and effects need no second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from saets.errors import InputError
from saets.model import bos_token, check_hook, encode
from saets.sampling import sample_top_k

FREE = -1
"""Marks a position that is sampled, in a matrix of forced tokens."""

OnResidual = Callable[[int, Float[Tensor, "rows d_model"]], None]
"""Called once a position with the residual stream before the vector is added."""


class Row(NamedTuple):
    """One rollout to make."""

    prompt: str
    seed: int
    """Signed 64-bit, from `sampling.row_seed`."""


class RolloutEngine:
    """Decodes batches of rollouts of one model, steering at one hook."""

    def __init__(self, model: Any, hook_name: str, *, top_k: int = 50, temperature: float = 1.0) -> None:
        """Checks first: raises `InputError` for an unknown hook, a top_k outside the vocabulary or temperature <= 0."""
        check_hook(model, hook_name)
        if not 1 <= top_k <= model.cfg.d_vocab:
            raise InputError(f"top_k is {top_k}; expected 1 to {model.cfg.d_vocab}, the size of the vocabulary")
        if temperature <= 0:
            raise InputError(f"temperature is {temperature}; expected a positive number")
        self.model = model
        self.hook_name = hook_name
        self.top_k = top_k
        self.temperature = temperature
        self.device = next(model.original_model.parameters()).device
        self.dtype = next(model.original_model.parameters()).dtype
        self._layer = int(hook_name.split(".")[1])

    def forced_tokens(self, rows: Sequence[Row], length: int) -> Int[Tensor, "rows length"]:
        """BOS and prompt tokens of each row, `FREE` where a token is sampled.

        Raises:
            InputError: no rows, or a prompt that leaves no free position.
        """
        if not rows:
            raise InputError("no rows to roll out; give at least one prompt")
        encoded = {prompt: encode(self.model.tokenizer, prompt) for prompt in {row.prompt for row in rows}}
        for prompt, tokens in encoded.items():
            if len(tokens) >= length:
                raise InputError(
                    f"prompt {prompt!r} is {len(tokens)} tokens with BOS; rollouts of {length} tokens leave nothing to sample"
                )
        forced = torch.full((len(rows), length), FREE, dtype=torch.int64)
        for i, row in enumerate(rows):
            tokens = encoded[row.prompt]
            forced[i, : len(tokens)] = torch.tensor(tokens)
        return forced

    @torch.no_grad()
    def run(
        self,
        rows: Sequence[Row],
        added: Float[Tensor, "rows d_model"],
        length: int,
        on_residual: OnResidual | None = None,
    ) -> Int[Tensor, "rows length"]:
        """Token ids of the rollouts, BOS and prompt included, on the CPU.

        `added` is scale x unit vector, a row each; zeros leave a row unsteered. `length` counts BOS and prompt. Where
        `on_residual` is given it sees every position, the last one included.

        Raises:
            InputError: see `forced_tokens`; also a wrong shape or non-finite numbers in `added`.
            RuntimeError: the hook did not run once a step, so the rows would not have been steered.
        """
        forced = self.forced_tokens(rows, length).to(self.device)
        if added.shape != (len(rows), self.model.cfg.d_model):
            raise InputError(f"vectors have shape {tuple(added.shape)}; expected {(len(rows), self.model.cfg.d_model)}")
        if not torch.isfinite(added).all():
            raise InputError("a steering vector holds NaN or infinity")
        buffer = added.to(self.device, self.dtype)[:, None, :]
        seeds = torch.tensor([row.seed for row in rows], dtype=torch.int64, device=self.device)
        tokens = torch.full_like(forced, bos_token(self.model.tokenizer))
        cache = DynamicCache(config=self.model.original_model.config)
        position, hook_runs = 0, 0

        def steer(residual: Tensor, hook: Any) -> Tensor:
            nonlocal hook_runs
            hook_runs += 1
            if on_residual is not None:
                on_residual(position, residual[:, -1])
            return residual + buffer

        steps = length - 1
        with self.model.hooks(fwd_hooks=[(self.hook_name, steer)]):
            for position in range(steps):
                logits = self.model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)[:, -1]
                drawn = sample_top_k(logits, seeds, position + 1, top_k=self.top_k, temperature=self.temperature)
                following = forced[:, position + 1]
                tokens[:, position + 1] = torch.where(following == FREE, drawn, following)
            if on_residual is not None:
                position = steps
                stop = self._layer + 1
                self.model(tokens[:, steps:], past_key_values=cache, use_cache=True, stop_at_layer=stop)
        expected = steps + (on_residual is not None)
        if hook_runs != expected:
            raise RuntimeError(f"hook {self.hook_name} ran {hook_runs} times in {expected} steps; the rows were not steered")
        return tokens.cpu()
