"""Prompts as tokens, plain and in chat, and where a completion ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from saets.errors import InputError
from saets.model import ByteTokenizer
from saets.tokens import completion_text, encode, end_tokens

BOS, EOS, END = 256, 257, 258


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_a_plain_prompt_is_bos_and_its_text_and_an_empty_one_bos_alone(chat_tokenizer: Any) -> None:
    assert encode(chat_tokenizer, "I think") == [BOS, *ids(chat_tokenizer, "I think")]
    assert encode(chat_tokenizer, "") == [BOS]


def test_a_chat_prompt_is_what_the_template_makes_of_a_users_turn_with_one_bos(chat_tokenizer: Any) -> None:
    found = encode(chat_tokenizer, "I think", "chat")
    assert found == [BOS, *ids(chat_tokenizer, "[user]I think"), END, *ids(chat_tokenizer, "[assistant]")]
    assert found.count(BOS) == 1


def test_an_empty_chat_prompt_is_a_turn_that_says_nothing(chat_tokenizer: Any) -> None:
    assert encode(chat_tokenizer, "", "chat") == [BOS, *ids(chat_tokenizer, "[user]"), END, *ids(chat_tokenizer, "[assistant]")]


def test_where_the_template_writes_no_bos_the_row_starts_with_the_templates_first_token(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("<bos>", "")
    assert encode(chat_tokenizer, "hi", "chat")[0] == ids(chat_tokenizer, "[")[0]
    chat_tokenizer.bos_token = None
    assert encode(chat_tokenizer, "hi", "chat")[0] == ids(chat_tokenizer, "[")[0]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template; expected a model that was trained to chat"),
        ("{{ raise_exception('a system turn comes first') }}", "refuses user's turn: a system turn comes first"),
        ("{{ messages[0]['content'] }}", "makes no tokens"),
    ],
)
def test_a_tokenizer_that_cannot_chat_is_refused_with_the_way_out(template: str | None, reason: str) -> None:
    tokenizer = ByteTokenizer.build()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=reason) as refused:
        encode(tokenizer, "", "chat")
    assert "plain" in str(refused.value)


def test_a_plain_completion_ends_at_the_end_of_text_token(chat_tokenizer: Any) -> None:
    assert end_tokens(chat_tokenizer) == {EOS}
    tokens = [*ids(chat_tokenizer, "one"), END, *ids(chat_tokenizer, "two"), EOS, *ids(chat_tokenizer, "three")]
    assert completion_text(chat_tokenizer, tokens) == "onetwo"


def test_a_chat_completion_ends_where_the_turn_does(chat_tokenizer: Any) -> None:
    ends = end_tokens(chat_tokenizer, "chat")
    assert ends == {EOS, END}
    for end in (EOS, END):
        tokens = [*ids(chat_tokenizer, "one"), end, *ids(chat_tokenizer, "two")]
        assert completion_text(chat_tokenizer, tokens, ends) == "one"
    assert completion_text(chat_tokenizer, ids(chat_tokenizer, "one"), ends) == "one"
    assert completion_text(chat_tokenizer, [END], ends) == ""


@pytest.mark.parametrize(("named", "expected"), [(None, {EOS, END}), (7, {EOS, END, 7}), ([7, EOS, 9], {EOS, END, 7, 9})])
def test_the_generation_config_may_name_more_ends_of_a_chat(named: Any, expected: set[int], chat_tokenizer: Any) -> None:
    config = SimpleNamespace(eos_token_id=named)
    assert end_tokens(chat_tokenizer, "chat", config) == expected
    assert end_tokens(chat_tokenizer, "plain", config) == {EOS}


def test_text_after_an_answer_that_is_no_special_token_ends_nothing(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
    assert end_tokens(chat_tokenizer, "chat") == {EOS}
