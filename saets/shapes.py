"""Shape annotations for tensors, from jaxtyping where it is installed.

The rollout engine and what it stands on import nothing but torch, transformers and numpy, so that they run on a bare GPU
machine; annotations are never evaluated there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ImportError:
        Bool = Float = Int = None

__all__ = ["Bool", "Float", "Int"]
