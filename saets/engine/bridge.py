"""The decoder for any `TransformerBridge`: it runs the bridge's hooks, and is what the fast decoder is tested against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from saets.engine.decoder import Step, bytes_per_row, devices_of, skipped
from saets.errors import InputError, unknown
from saets.hooks import blocks_below, layer_of
from saets.shapes import Float, Int


class BridgeDecoder:
    """Any `TransformerBridge`, run through its hooks."""

    shares_prompts = False

    def __init__(self, bridge: Any, hook_name: str) -> None:
        """Raises `InputError` where the bridge has no such hook; it would otherwise be ignored in silence."""
        check_hook(bridge, hook_name)
        self.bridge, self.hook_name = bridge, hook_name
        first = next(bridge.original_model.parameters())
        self.device, self.dtype, self.devices = first.device, first.dtype, devices_of(bridge.original_model)
        self.d_model, self.d_vocab, self.n_blocks = bridge.cfg.d_model, bridge.cfg.d_vocab, bridge.cfg.n_layers
        self.hook_device = self.lower(torch.zeros(1, 1, dtype=torch.int64, device=self.device)).device

    def bytes_per_row(self, length: int) -> int:
        return 2 * bytes_per_row(self.bridge.original_model.config, length, self.dtype)  # the growing cache is copied

    @contextlib.contextmanager
    def steps(self, rows: int, length: int) -> Iterator[_BridgeSteps]:
        running = _BridgeSteps(self.bridge, layer_of(self.hook_name) + 1)
        with self.bridge.hooks(fwd_hooks=[(self.hook_name, running.steer)]):
            yield running

    @torch.no_grad()
    def lower(self, tokens: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        stop = layer_of(self.hook_name) + 1
        _, cache = self.bridge.run_with_cache(tokens, names_filter=self.hook_name, stop_at_layer=stop)
        residual: Tensor = cache[self.hook_name]
        return residual

    @torch.no_grad()
    def upper(self, tokens: Int[Tensor, "rows pos"], residual: Float[Tensor, "rows pos d_model"]) -> Tensor:
        below = blocks_below(self.hook_name)
        if below == 0:
            raise InputError(f"hook_name {self.hook_name!r} lies before the first block; use hook_resid_post or a later block")
        with skipped(list(self.bridge.blocks)[:below], residual):
            logits: Tensor = self.bridge(tokens)
        return logits


class _BridgeSteps:
    """`Steps` of a `BridgeDecoder`."""

    def __init__(self, bridge: Any, stop_at_layer: int) -> None:
        self._bridge, self._stop = bridge, stop_at_layer
        self._cache = DynamicCache(config=bridge.original_model.config)
        self._added: Tensor | None = None
        self._residual: Tensor | None = None

    def steer(self, residual: Tensor, hook: Any) -> Tensor:
        """The forward hook on the residual stream."""
        assert self._added is not None
        self._residual = residual
        return residual + self._added[:, None, :].to(residual.device)

    def prompts(self, tokens: Tensor, added: Tensor, rows: slice, of: Tensor) -> Tensor:
        raise RuntimeError("a bridge reads every row from BOS; see Decoder.shares_prompts")

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, added: Tensor, *, last: bool) -> Step:
        self._added, self._residual = added, None
        stop = {"stop_at_layer": self._stop} if last else {}
        out = self._bridge(tokens[:, None], past_key_values=self._cache, use_cache=True, **stop)
        if self._residual is None:
            raise RuntimeError("the hook did not run; the rows were not steered")
        return Step(self._residual[:, -1], None if last else out[:, -1])


def check_hook(bridge: Any, hook_name: str) -> None:
    """Raise `InputError` where the bridge has no such residual-stream hook; it would otherwise be ignored in silence."""
    if hook_name not in bridge.hook_dict:
        raise unknown("hook name", hook_name, (f"blocks.{i}.hook_resid_post" for i in range(bridge.cfg.n_layers)))
    blocks_below(hook_name)
