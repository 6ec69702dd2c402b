"""The fast decoder: the model's own transformers code, one forward hook, and buffers of a fixed size for keys and values."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saets.engine.attention import KERNEL, RolloutCache
from saets.engine.decoder import Step, Unsupported, bytes_per_row, devices_of, find_blocks, skipped
from saets.errors import unknown
from saets.hooks import blocks_below, layer_of
from saets.shapes import Float, Int

LOGIT_TOLERANCE = {torch.float32: 0.002}
"""Root mean square difference of logits, as a share of their spread, up to which the fast path counts as the same model."""

HALF_LOGITS = 0.1
"""The same in half precision, where the model's own logits are no more certain."""


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same weights: modules and config are copied, tensors are not.

    The copy of a model on several devices moves its tensors between them by itself, as the original does.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class PlainDecoder:
    """A transformers causal language model, run by its own code.

    Its blocks may lie on several devices (tried on pretended ones; several GPUs have not been run).
    """

    shares_prompts = True

    def __init__(self, model: PreTrainedModel, hook_name: str) -> None:
        """Checks on a few tokens that the rollout attention gives the model's own logits.

        Raises:
            InputError: no such block.
            Unsupported: the model is not built of blocks in a row, or needs attention that is not computed here.
        """
        self.model = model
        config = model.config.get_text_config()
        self.d_model, self.d_vocab, self.n_blocks = config.hidden_size, config.vocab_size, config.num_hidden_layers
        self.device, self.dtype, self.devices = model.device, model.dtype, devices_of(model)
        self._below = blocks_below(hook_name)
        if layer_of(hook_name) >= self.n_blocks:
            raise unknown("hook name", hook_name, (f"blocks.{i}.hook_resid_post" for i in range(self.n_blocks)))
        self._blocks = find_blocks(model, self.n_blocks)
        if self._below == 0:
            raise Unsupported("the hook lies before the first block")
        self._hooked = self._blocks[self._below - 1]
        self._cache: RolloutCache | None = None
        self.hook_device = self._probe()

    def bytes_per_row(self, length: int) -> int:
        return bytes_per_row(self.model.config, length, self.dtype)

    @contextlib.contextmanager
    def steps(self, rows: int, length: int) -> Iterator[_PlainSteps]:
        if self._cache is None or (self._cache.rows, self._cache.length) != (rows, length):
            self._cache = None  # freed before the next one is made
            self._cache = RolloutCache(rows, length, self.n_blocks)
        running = _PlainSteps(self.model, self._cache)
        handle = self._hooked.register_forward_hook(running.steer)
        try:
            with _attention(self.model, KERNEL):
                yield running
        finally:
            handle.remove()

    @torch.no_grad()
    def lower(self, tokens: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        def catch(module: nn.Module, args: Any, output: Any) -> None:
            raise _Caught(_hidden(output))

        handle = self._hooked.register_forward_hook(catch)
        try:
            with _attention(self.model, KERNEL):
                self.model(tokens, use_cache=False)
        except _Caught as caught:
            return caught.residual
        finally:
            handle.remove()
        raise RuntimeError("the hooked block did not run")

    @torch.no_grad()
    def upper(self, tokens: Int[Tensor, "rows pos"], residual: Float[Tensor, "rows pos d_model"]) -> Tensor:
        with _attention(self.model, KERNEL), skipped(self._blocks[: self._below], residual):
            logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    @torch.no_grad()
    def _probe(self) -> torch.device:
        """Compare logits with the model's own attention on a few tokens, step by step and all at once; the hook's device."""
        tokens = (torch.arange(2 * 6, device=self.device).view(2, 6) * 7 + 1) % self.d_vocab
        expected = self.model(tokens, use_cache=False).logits[:, -1].float()
        added = torch.zeros(2, self.d_model, device=self.device, dtype=self.dtype)
        try:
            with self.steps(2, 6) as running:
                running.prompts(tokens[:, :3], added[:, None], slice(0, 2), torch.arange(2, device=self.device))
                for position in range(3, 6):
                    found = running.step(tokens[:, position], position, added, last=False)
            residual = self.lower(tokens)
            upper = self.upper(tokens, residual)[:, -1]
        except torch.OutOfMemoryError:
            raise
        except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError) as error:
            raise Unsupported(f"the rollout attention does not fit {type(self.model).__name__} ({error})") from error
        finally:
            self._cache = None
        assert found.logits is not None
        off = max((logits.float() - expected).square().mean().sqrt().item() for logits in (found.logits, upper))
        if not off <= LOGIT_TOLERANCE.get(self.dtype, HALF_LOGITS) * expected.std().item():
            raise Unsupported(f"the rollout attention gives {type(self.model).__name__} logits that differ by {off:.3g}")
        return residual.device


class _PlainSteps:
    """`Steps` of a `PlainDecoder`."""

    def __init__(self, model: PreTrainedModel, cache: RolloutCache) -> None:
        self._model, self._cache = model, cache
        self._added: Tensor | None = None
        self._residual: Tensor | None = None
        self._last = False

    def steer(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook on the steered block."""
        hidden = _hidden(output)
        if self._last:
            raise _Caught(hidden)
        assert self._added is not None
        self._residual = hidden
        steered = hidden + self._added.to(hidden.device)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    @torch.no_grad()
    def prompts(self, tokens: Tensor, added: Tensor, rows: slice, of: Tensor) -> Tensor:
        self._cache.shared_by = (rows, of)
        try:
            return self._forward(tokens, 0, added)
        finally:
            self._cache.shared_by = None

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, added: Tensor, *, last: bool) -> Step:
        self._last = last
        try:
            logits = self._forward(tokens[:, None], position, added[:, None])
        except _Caught as caught:
            return Step(caught.residual[:, -1], None)
        assert self._residual is not None
        return Step(self._residual[:, -1], logits)

    def _forward(self, tokens: Tensor, position: int, added: Float[Tensor, "rows at d_model"]) -> Tensor:
        self._added, self._residual = added, None
        self._cache.position = position
        at = torch.arange(position, position + tokens.shape[1], device=tokens.device)[None]
        out: Any = self._model(tokens, position_ids=at, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        if self._residual is None:
            raise RuntimeError("the steered block did not run; the rows were not steered")
        logits: Tensor = out.logits[:, -1]
        return logits


class _Caught(Exception):
    """Carries the residual stream out of a forward pass that need not go further."""

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextlib.contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model use another attention function; its own is back afterwards, also after an exception."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise Unsupported(f"{type(model).__name__} does not let its attention be chosen")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
