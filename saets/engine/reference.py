"""The published algorithm, step by step and nothing else: the oracle of doctor and tests, and what benchmarks compare with.

One vector at a time, one prompt after another: find the scale by full passes over the calibration text, generate with the vector
added by a hook, run the text again without it, encode, average (method, section 1). Plain transformers only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saets.shapes import Float, Int

Encode = Callable[[Tensor], Tensor]
"""An SAE's encoder, from [..., d_model] to [..., d_sae]."""

CALIBRATION_BATCH = 64
"""Chunks of calibration text in one pass."""


@contextlib.contextmanager
def steered(block: nn.Module, vector: Float[Tensor, "*rows_and_pos d_model"]) -> Iterator[None]:
    """Add the vector to the block's output while the context lasts, at every position unless each is given its own."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + vector.to(output[0]), *output[1:])
        return output + vector.to(output)

    handle = block.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def generate(
    model: Any,
    block: nn.Module,
    prompt: Sequence[int],
    vector: Float[Tensor, " d_model"],
    *,
    samples: int,
    length: int,
    top_k: int,
) -> Int[Tensor, "samples length"]:
    """Steered samples of one prompt (token ids, BOS included) up to `length` tokens in all; EOS does not stop them."""
    tokens = torch.tensor(prompt, device=model.device).expand(samples, -1)
    with steered(block, vector):
        out: Tensor = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            temperature=1.0,
            top_k=top_k,
            top_p=1.0,
            max_new_tokens=length - len(prompt),
            eos_token_id=-1,
            pad_token_id=0,
            use_cache=True,
        )
    return out


@torch.no_grad()
def mean_activations(
    model: Any, block: nn.Module, encode: Encode, tokens: Int[Tensor, "samples length"]
) -> Float[Tensor, "samples d_sae"]:
    """Feature activations of the unsteered residual stream after `block`, a mean over all positions of each text, in float64."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        caught.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    handle = block.register_forward_hook(catch)
    try:
        with contextlib.suppress(_Enough):
            model(tokens, use_cache=False)
    finally:
        handle.remove()
    return encode(caught[0].float()).double().mean(dim=1)


@torch.no_grad()
def calibrate(
    model: Any,
    block: nn.Module,
    direction: Float[Tensor, " d_model"],
    tokens: Int[Tensor, "chunks length"],
    *,
    target: float,
    grid: Sequence[float],
) -> float:
    """The scale at which the mean next-token loss first exceeds the target on the grid, on the line from the point before.

    Only where the rule is defined: raises `ValueError` where scale 0 exceeds the target already, or no scale does.
    """
    losses: list[float] = []
    for scale in grid:
        losses.append(loss(model, block, scale * direction, tokens))
        if losses[-1] > target:
            break
    if len(losses) < 2 or losses[-1] <= target:
        raise ValueError(f"no crossing of loss {target} on the grid; losses are {losses}")
    low, high = grid[len(losses) - 2], grid[len(losses) - 1]
    return low + (target - losses[-2]) / (losses[-1] - losses[-2]) * (high - low)


@torch.no_grad()
def loss(model: Any, block: nn.Module, vector: Float[Tensor, " d_model"], tokens: Int[Tensor, "chunks length"]) -> float:
    """Mean next-token loss in nats, steered at every position."""
    total = 0.0
    for part in tokens.split(CALIBRATION_BATCH):
        with steered(block, vector):
            logits = model(part, use_cache=False).logits
        total += nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item()
    return total / tokens[:, 1:].numel()


class _Enough(Exception):
    """Ends a forward pass whose rest is not needed."""
