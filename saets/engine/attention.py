"""Attention for rollouts: key and value buffers of a fixed size, written in place, and a kernel that reads views of them.

Both plug into transformers' own interfaces (a `Cache` and an attention function), so the model's code stays the model's. Rows
have one length and no padding, so no mask is ever built: a query of one token sees all that is written, longer ones are causal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from saets.engine.decoder import Unsupported
from saets.shapes import Float

KERNEL = "saets_rollout"
"""Name under which `rollout_attention` is registered with transformers."""

UNSUPPORTED = ("s_aux", "position_bias", "output_attentions")
"""Arguments of other models' attention that `rollout_attention` does not compute."""


def rollout_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "rows heads queries d_head"],
    key: Float[Tensor, "rows kv_heads keys d_head"],
    value: Float[Tensor, "rows kv_heads keys d_head"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention without a mask; [rows, queries, heads, d_head]. Soft-capped scores and sliding windows as in Gemma 2.

    Raises:
        Unsupported: the model asks for something that is not computed here; the caller then uses another decoder.
    """
    asked = [name for name in UNSUPPORTED if others.get(name) is not None and others[name] is not False]
    if asked or attention_mask is not None or (dropout and module.training):
        raise Unsupported(f"rollout attention computes no {', '.join(asked) or 'masks or dropout'}")
    rows, heads, queries, d_head = query.shape
    kv_heads, keys = key.shape[1:3]
    if queries == 1:
        if sliding_window is not None and keys > sliding_window:
            key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
        grouped = query.reshape(rows, kv_heads, heads // kv_heads, d_head)
        out = _attend(grouped, key, value, None, scaling, softcap)
        return out.reshape(rows, 1, heads, -1), None
    mask = _causal(queries, keys, sliding_window, query.device)
    key, value = (states.repeat_interleave(heads // kv_heads, dim=1) for states in (key, value))
    return _attend(query, key, value, mask, scaling, softcap).transpose(1, 2), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores.float(), dim=-1).to(value.dtype) @ value


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each of the last `queries` positions may see: itself and earlier ones, within the window."""
    last = torch.arange(keys - queries, keys, device=device)[:, None]
    at = torch.arange(keys, device=device)[None, :]
    seen = at <= last
    return seen if window is None else seen & (at > last - window)


AttentionInterface.register(KERNEL, rollout_attention)


class RolloutLayer(CacheLayerMixin):
    """Keys and values of one block for every row, [rows, kv_heads, length, d_head]."""

    def __init__(self, owner: RolloutCache) -> None:
        super().__init__()
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for all rows, in the shape of the first states seen."""
        rows, length = self._owner.rows, self._owner.length
        self.keys = key_states.new_zeros(rows, key_states.shape[1], length, key_states.shape[-1])
        self.values = value_states.new_zeros(rows, value_states.shape[1], length, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take the states of one step of the first rows, or of the prompts that some rows share (`RolloutCache.shared_by`)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        count, at = len(key_states), self._owner.position
        if self._owner.shared_by is not None:
            rows, of = self._owner.shared_by
            of = of.to(key_states.device)
            self.keys[rows, :, : key_states.shape[2]] = key_states[of]
            self.values[rows, :, : key_states.shape[2]] = value_states[of]
            return key_states, value_states
        self.keys[:count, :, at : at + 1] = key_states
        self.values[:count, :, at : at + 1] = value_states
        return self.keys[:count, :, : at + 1], self.values[:count, :, : at + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask would cover, and where they start."""
        return self._owner.position + query_length, 0

    def get_seq_length(self) -> int:
        """Positions written so far."""
        return self._owner.position

    def get_max_length(self) -> int:
        """Positions there is room for."""
        return self._owner.length


class RolloutCache(Cache):
    """The buffers of all blocks; used again by the next batch of the same shape."""

    def __init__(self, rows: int, length: int, n_blocks: int) -> None:
        super().__init__(layers=[RolloutLayer(self) for _ in range(n_blocks)])
        self.rows, self.length = rows, length
        self.position = 0
        """Index of the token now being read."""
        self.shared_by: tuple[slice, Tensor] | None = None
        """While prompts are read: the rows that get their states, and for each of them the number of its prompt."""
