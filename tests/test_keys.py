"""Keys are found where they would be shown, and nothing else is taken for one. Every key here is made up."""

from __future__ import annotations

import pytest

from saets.keys import exposed, looks_like_key

MADE_UP = "sk-" + "proj-" + 4 * "0aB_"


@pytest.mark.parametrize("text", [MADE_UP, f"Bearer {MADE_UP}", "hf_" + 5 * "aB3d", "AKIA" + 4 * "Z7QX"])
def test_a_key_is_seen(text: str) -> None:
    assert looks_like_key(text)


@pytest.mark.parametrize("text", ["", "task-proj-0123456789abcdef", "sk-short", "runs/hf_run", "gemma-2-2b", "$OPENAI_API_KEY"])
def test_other_words_are_not(text: str) -> None:
    assert not looks_like_key(text)


def test_places_are_named_and_the_key_is_not() -> None:
    job = {
        "entrypoint": f"OPENAI_API_KEY={MADE_UP} python -m saets run tiny",
        "metadata": {"who": "me", "note": MADE_UP},
        "runtime_env": {"working_dir": ".", "env_vars": {"OPENAI_API_KEY": "x", "HF_HOME": "/shared"}, "pip": [MADE_UP]},
    }
    found = list(exposed(job))
    assert found == ["entrypoint", "metadata.note", "runtime_env.env_vars.OPENAI_API_KEY", "runtime_env.pip[0]"]
    assert not list(exposed({"entrypoint": 'OPENAI_API_KEY="$KEY" python -m saets run tiny', "runtime_env": None}))
