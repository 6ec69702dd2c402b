"""What a secret looks like, so that one can be found where everybody could read it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

SECRET_NAMES = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN")
"""Variables that hold one."""

_SHAPES = re.compile(r"(?<![\w-])(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16})(?![\w-])")
_ASSIGNED = re.compile(rf"\b({'|'.join(SECRET_NAMES)})\s*=\s*[^\s'\"$]")


def looks_like_key(text: str) -> bool:
    """Whether a key of OpenAI, of the Hugging Face hub or of AWS is somewhere in the text."""
    return _SHAPES.search(text) is not None


def exposed(settings: Any, where: str = "") -> Iterable[str]:
    """The places in JSON-like settings that hold a secret, by their keys; never the secret itself."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            place = f"{where}.{key}" if where else str(key)
            if key in SECRET_NAMES and value:
                yield place
            else:
                yield from exposed(value, place)
    elif isinstance(settings, (list, tuple)):
        for i, value in enumerate(settings):
            yield from exposed(value, f"{where}[{i}]")
    elif isinstance(settings, str) and (looks_like_key(settings) or _ASSIGNED.search(settings)):
        yield where
