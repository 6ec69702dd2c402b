"""Names of places in the residual stream, as TransformerLens writes them."""

from __future__ import annotations

import re

from saets.errors import InputError

HOOK_PATTERN = re.compile(r"^blocks\.(\d+)\.hook_resid_(pre|post)$")


def blocks_below(hook_name: str) -> int:
    """How many blocks run before the residual stream reaches this hook: 13 for blocks.12.hook_resid_post.

    Raises:
        InputError: not a residual-stream hook.
    """
    return layer_of(hook_name) + hook_name.endswith("post")


def layer_of(hook_name: str) -> int:
    """The block the hook is named after: 12 for blocks.12.hook_resid_post.

    Raises:
        InputError: not a residual-stream hook.
    """
    match = HOOK_PATTERN.match(hook_name)
    if match is None:
        raise InputError(
            f"hook_name {hook_name!r} is not a residual-stream hook; expected blocks.N.hook_resid_post or blocks.N.hook_resid_pre"
        )
    return int(match[1])
