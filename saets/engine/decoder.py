"""A language model split at a hook, as the engine needs it: decode a step, run the blocks below, run the blocks above."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from saets.shapes import Float, Int


class Unsupported(Exception):
    """The fast decoder cannot run this model as it is; the message says why, and a bridge runs it instead."""


class Step(NamedTuple):
    """What one step gives."""

    residual: Float[Tensor, "rows d_model"]
    """h_L of the token just read, before the vector is added."""
    logits: Float[Tensor, "rows d_vocab"] | None
    """For the next token; None where only the residual was asked for."""


@runtime_checkable
class Steps(Protocol):
    """A batch of rows being decoded."""

    def prompts(
        self,
        tokens: Int[Tensor, "prompts pos"],
        added: Float[Tensor, "prompts at d_model"],
        rows: slice,
        of: Int[Tensor, " rows"],
    ) -> Float[Tensor, "prompts d_vocab"]:
        """Read prompts once each, for all the rows that begin with them; logits of their next token.

        What is added is given for each position, or once for all of them.
        """
        ...

    def step(self, tokens: Int[Tensor, " rows"], position: int, added: Float[Tensor, "rows d_model"], *, last: bool) -> Step:
        """Read the token at this position of the first rows; the `last` one is read only up to the hook."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """A language model split at a hook."""

    d_model: int
    d_vocab: int
    n_blocks: int
    device: torch.device
    """Where tokens go in and logits come out: the embedding's."""
    hook_device: torch.device
    """Where the residual stream at the hook is."""
    devices: tuple[torch.device, ...]
    """All that hold weights, each once."""
    dtype: torch.dtype
    shares_prompts: bool
    """Whether `Steps.prompts` can be used."""

    def bytes_per_row(self, length: int) -> int:
        """Memory that one more row takes while decoding: keys, values, logits and the widest activations."""
        ...

    def steps(self, rows: int, length: int) -> contextlib.AbstractContextManager[Steps]:
        """Decode up to `rows` rows of `length` tokens; the model is as before afterwards, also after an exception."""
        ...

    def lower(self, tokens: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        """The unsteered residual stream at the hook."""
        ...

    def upper(self, tokens: Int[Tensor, "rows pos"], residual: Float[Tensor, "rows pos d_model"]) -> Tensor:
        """Logits [rows, pos, d_vocab] of the blocks above the hook, from a given residual stream (identity 2 of the method)."""
        ...


def devices_of(model: nn.Module) -> tuple[torch.device, ...]:
    """The devices that hold a model's weights, in the order of its modules."""
    return tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))


def find_blocks(model: nn.Module, n_blocks: int) -> list[nn.Module]:
    """The model's blocks in order: its one list of that many modules.

    Raises:
        Unsupported: no such list, or several.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_blocks]
    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    if not lists or sizes.count(max(sizes)) > 1:
        raise Unsupported(f"{type(model).__name__} is not one list of {n_blocks} blocks")
    return list(lists[sizes.index(max(sizes))])


def bytes_per_row(config: Any, length: int, dtype: torch.dtype) -> int:
    """Keys, values, the widest activations and logits of one row, for any transformers config."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * heads * d_head * length
    widest = 4 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    return (cached + widest + 2 * text.vocab_size) * dtype.itemsize


@contextlib.contextmanager
def skipped(blocks: list[nn.Module], residual: Tensor) -> Iterator[None]:
    """Make blocks pass their input through, and the last of them return `residual`; restored afterwards.

    The `forward` that a block may have of its own is put back too: models on several devices move their tensors by it.
    """
    own = [block.__dict__.get("forward") for block in blocks]

    def through(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    def enter(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return residual

    try:
        for block in blocks[:-1]:
            block.__dict__["forward"] = through
        blocks[-1].__dict__["forward"] = enter
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward
