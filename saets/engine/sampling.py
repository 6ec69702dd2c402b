"""Top-k sampling whose noise is a pure function of (row seed, position, token id).

A draw is `argmax(logit / temperature + g)` with Gumbel noise `g` hashed from a counter (SplitMix64), so a row's text does
not depend on the batch, the worker, the order or the number of retries. This is exactly the top-k softmax: the noise is
independent over tokens, positions and rows, and the candidates do not depend on it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from saets.shapes import Float, Int


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer that torch.int64 holds."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)

TIED_CANDIDATES = 14
"""Half-precision logits tie at the k-th place; this many extra candidates keep every tied token (7 was the most seen)."""


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """The SplitMix64 finaliser on int64, wrapping around."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def counter_hash(row_seed: Tensor, position: Tensor, token_id: Tensor) -> Tensor:
    """64 hashed bits (as int64) for each (row seed, position, token id); the three int64 tensors broadcast."""
    h = _mix(row_seed + _GOLDEN)
    h = _mix(h + (position + 1) * _GOLDEN)
    return _mix(h + (token_id + 1) * _GOLDEN)


def gumbel(row_seed: Tensor, position: Tensor, token_id: Tensor) -> Tensor:
    """Standard Gumbel noise in float64 for each (row seed, position, token id); always finite."""
    bits = counter_hash(row_seed, position, token_id)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log1p(-uniform))


def sample_top_k(
    logits: Float[Tensor, "rows d_vocab"],
    row_seeds: Int[Tensor, " rows"],
    position: int,
    *,
    top_k: int,
    temperature: float,
) -> Int[Tensor, " rows"]:
    """One token a row, drawn from the softmax over the `top_k` largest logits.

    Tokens tied with the k-th logit are all kept. `position` is the index of the token being drawn (BOS is 0), and
    `row_seeds` are int64. `temperature` must be positive.
    """
    d_vocab = logits.shape[-1]
    values, tokens = logits.topk(min(top_k + TIED_CANDIDATES, d_vocab), dim=-1)
    kth = values[:, min(top_k, d_vocab) - 1 : min(top_k, d_vocab)]
    at = torch.full_like(tokens[:, :1], position)
    scores = values.double() / temperature + gumbel(row_seeds[:, None], at, tokens)
    scores = scores.masked_fill(values < kth, -torch.inf)
    return tokens.gather(1, scores.argmax(dim=-1, keepdim=True)).squeeze(1)


def row_seed(*parts: str | int) -> int:
    """A signed 64-bit seed hashed from what identifies a row, e.g. (run seed, vector id, prompt, sample)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
