"""Text to token ids and back, the same way everywhere: plain text after BOS, or a user's turn in the model's chat template."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from saets.errors import InputError

PromptFormat = Literal["plain", "chat"]
"""`plain`: BOS and the text. `chat`: the text as a user's turn, and the beginning of the answer, by the tokenizer's template."""


def bos_token(tokenizer: Any) -> int:
    """The token every plain row starts with: BOS, or the end-of-text token of a tokenizer without BOS (GPT-2, Qwen)."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("the tokenizer has neither a BOS nor an EOS token; rows have nothing to start with")


def encode(tokenizer: Any, text: str, prompt_format: PromptFormat = "plain") -> list[int]:
    """Token ids of a prompt, at least one.

    `plain`: BOS in front; the text "" is BOS alone. `chat`: what the chat template makes of one user's turn, up to where the
    assistant's answer begins, and nothing else: where the template writes no BOS, the row starts with the template's own first
    token. The text "" is a user's turn that says nothing.

    Raises:
        InputError: `chat` and no chat template, or one that refuses a single user's turn.
    """
    if prompt_format == "plain":
        return [bos_token(tokenizer), *tokenizer.encode(text, add_special_tokens=False)]
    tokens = _templated(tokenizer, [{"role": "user", "content": text}], tokenize=True, add_generation_prompt=True)
    if not tokens:
        raise InputError("the chat template makes no tokens of a user's turn; set prompt_format = 'plain'")
    return [int(token) for token in tokens]


def end_tokens(tokenizer: Any, prompt_format: PromptFormat = "plain", generation_config: Any = None) -> frozenset[int]:
    """The tokens that end a completion.

    `plain`: the tokenizer's end-of-text token. `chat`: that, those that the model's generation config names, and the special
    token by which the template closes an assistant's turn; the last is often neither of the others (Gemma, Llama 3).

    Raises:
        InputError: as `encode`.
    """
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if prompt_format == "plain":
        return frozenset(ends)
    named = getattr(generation_config, "eos_token_id", None)
    ends |= {int(token) for token in (named if isinstance(named, Sequence) else [named]) if token is not None}
    answer = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    closing = _templated(tokenizer, turns, tokenize=False, add_generation_prompt=False).rpartition(answer)[2].lstrip()
    first = tokenizer.encode(closing, add_special_tokens=False)[:1]
    return frozenset(
        ends.union(token for token in first if token in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    )


def completion_text(tokenizer: Any, tokens: list[int], ends: Collection[int] | None = None) -> str:
    """The text of generated tokens up to the first of `ends` (by default the end-of-text token), without special tokens."""
    stops = end_tokens(tokenizer) if ends is None else ends
    said = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return str(tokenizer.decode(tokens[:said], skip_special_tokens=True))


def check_chat(tokenizer: Any, what: str) -> None:
    """Raise `InputError` where the tokenizer has no chat template; `what` asks for one."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{what}, and the model's tokenizer has no chat template; expected a model that was trained to chat (an Instruct or "
            "-it one), or the format 'plain'"
        )


def _templated(tokenizer: Any, turns: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> Any:
    from jinja2 import TemplateError

    check_chat(tokenizer, "the prompt format is 'chat'")
    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=tokenize, add_generation_prompt=add_generation_prompt, return_dict=False
        )
    except (TemplateError, ValueError) as error:
        raise InputError(
            f"the model's chat template refuses {turns[-1]['role']}'s turn: {error}; set prompt_format = 'plain'"
        ) from error
