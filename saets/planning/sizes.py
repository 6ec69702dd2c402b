"""Sizes of models, SAEs and prompts, from configs and tokenizers alone: no weights are read."""

from __future__ import annotations

import contextlib
import functools
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from saets.engine.decoder import bytes_per_row, find_blocks
from saets.errors import InputError
from saets.experiment.model_config import Model, Sae
from saets.judge.cost import BYTES_A_TOKEN
from saets.model import is_converted, load_tokenizer, model_config
from saets.sae import check_sae, describe_sae, sae_width
from saets.tokens import PromptFormat, encode

BIAS = 2
"""Vectors of an SAE besides its two matrices, per feature: encoder bias and threshold."""


class ModelSize(NamedTuple):
    """What a language model's work and memory follow from."""

    d_model: int
    n_blocks: int
    d_vocab: int
    block_weights: int
    """Numbers in the weights of one block."""
    weights: int
    """Numbers in all weights, each once."""
    attended: int
    """Heads x their width: multiplications a block and pair of tokens, twice."""
    config: Any
    origin: str
    """Where these sizes come from."""

    def bytes_per_row(self, length: int, dtype: torch.dtype) -> int:
        """Memory of a row of so many tokens; see `engine.decoder.bytes_per_row`."""
        return bytes_per_row(self.config, length, dtype)

    def cache_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values that a token leaves behind."""
        return self.bytes_per_row(1, dtype) - self.bytes_per_row(0, dtype)

    def unembedding_blocks(self) -> float:
        """The unembedding counted in blocks: U of the method's cost formulas."""
        return self.d_model * self.d_vocab / self.block_weights

    def flops(self, blocks: int, *, head: bool, context: int | float) -> float:
        """Operations of one token through so many blocks, and through the unembedding where asked for; two a multiplication.

        `context` is how many tokens it attends to.
        """
        return 2.0 * (blocks * (self.block_weights + 2 * self.attended * context) + head * self.d_model * self.d_vocab)


class SaeSize(NamedTuple):
    """What an SAE's work and memory follow from."""

    d_model: int
    d_sae: int

    def weights(self) -> int:
        """Numbers in encoder, decoder and biases."""
        return 2 * self.d_model * self.d_sae + BIAS * self.d_sae + self.d_model

    def flops(self) -> float:
        """Operations of one token through the encoder."""
        return 2.0 * self.d_model * self.d_sae


def model_size(spec: Model) -> ModelSize:
    """The model's sizes, by its own config, or by the table that comes with the package where that cannot be read.

    Raises:
        InputError: neither is there.
    """
    config, origin = _config(spec)
    text = config.get_text_config()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    blocks = find_blocks(empty, text.num_hidden_layers)
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        text.hidden_size,
        text.num_hidden_layers,
        text.vocab_size,
        sum(p.numel() for block in blocks for p in block.parameters()) // len(blocks),
        sum(p.numel() for p in empty.parameters()),
        text.num_attention_heads * d_head,
        config,
        origin,
    )


def _config(spec: Model) -> tuple[Any, str]:
    known = _table().get(spec.name)
    if known is None:
        return model_config(spec), "the model's config"
    try:
        if _is_readable(spec):
            return model_config(spec), "the model's config"
    except InputError:
        pass
    return AutoConfig.for_model(**known), "sizes shipped with the package; the model's own config cannot be read here yet"


def _is_readable(spec: Model) -> bool:
    """Whether config and tokenizer may be there without a conversion of weights."""
    try:
        return spec.loader != "gguf" or is_converted(spec)
    except InputError:
        return False


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads((Path(__file__).parent / "sizes.toml").read_text())


def sae_size(spec: Sae, d_model: int) -> SaeSize:
    """The SAE's sizes, from its config: its folder's, or of a release what SAELens reads of it.

    Raises:
        InputError: a release whose config cannot be read, or an SAE for another model.
    """
    check_sae(spec, d_model)
    if (width := sae_width(spec)) is not None:
        return SaeSize(d_model, width)
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    try:
        found = load_sae_config_from_huggingface(str(spec.release), str(spec.id))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the config of SAE {describe_sae(spec)} cannot be read: {reason}; plan where the hub can be reached, or give "
            "sae.loader = 'folder' with a local copy"
        ) from error
    if found.get("d_in") != d_model:
        raise InputError(f"the SAE ({describe_sae(spec)}) reads vectors of {found.get('d_in')}, the model has {d_model}")
    return SaeSize(d_model, int(found["d_sae"]))


class PromptSizes:
    """Tokens of prompts, BOS included: counted where the tokenizer is at hand, else estimated from their length."""

    def __init__(self, spec: Model) -> None:
        self._tokenizer: Any = None
        if _is_readable(spec):
            with contextlib.suppress(InputError):
                self._tokenizer = load_tokenizer(spec)

    @property
    def counted(self) -> bool:
        """Whether a tokenizer counts."""
        return self._tokenizer is not None

    def of(self, prompts: Sequence[str], prompt_format: PromptFormat) -> list[int]:
        """Tokens of each prompt."""
        if self._tokenizer is not None:
            return [len(encode(self._tokenizer, prompt, prompt_format)) for prompt in prompts]
        template = CHAT_TOKENS if prompt_format == "chat" else 0
        return [1 + template + math.ceil(len(prompt.encode()) / BYTES_A_TOKEN) for prompt in prompts]


CHAT_TOKENS = 12
"""About what a chat template adds to a user's turn."""
