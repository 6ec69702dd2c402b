"""Text to token ids and back, the same way everywhere: every row starts with BOS."""

from __future__ import annotations

from typing import Any

from saets.errors import InputError


def bos_token(tokenizer: Any) -> int:
    """The token every row starts with: BOS, or the end-of-text token of a tokenizer without BOS (GPT-2, Qwen)."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("the tokenizer has neither a BOS nor an EOS token; rows have nothing to start with")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the text with BOS in front; the text "" is BOS alone."""
    return [bos_token(tokenizer), *tokenizer.encode(text, add_special_tokens=False)]


def completion_text(tokenizer: Any, tokens: list[int]) -> str:
    """The text of generated tokens up to the first end-of-text token, without special tokens."""
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
