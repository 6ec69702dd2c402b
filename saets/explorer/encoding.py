"""Numbers and texts as the page holds them: small integers and half-precision floats, compressed, in letters."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saets.explorer.strongest import Lists

LETTERS = 4 / 3
"""Letters a byte takes in base64."""


def blob(content: bytes) -> str:
    """Bytes, compressed, in letters that mean nothing to HTML; the same for the same bytes."""
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def json_text(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it can end the element, or is read as HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def json_blob(value: Any) -> str:
    """JSON as a blob."""
    return blob(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode())


def halves(values: Tensor) -> bytes:
    """Float16, little-endian; what is too large for it is cut to its range."""
    limit = float(np.finfo(np.float16).max)
    return np.ascontiguousarray(values.clamp(-limit, limit).numpy().astype("<f2")).tobytes()


def index_type(largest: int) -> str:
    """The smallest of u16 and u32 that holds it."""
    return "u16" if largest < 2**16 else "u32"


def packed(lists: Mapping[str, Lists]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the page must know of the lists' numbers, and the numbers themselves, by name and part."""
    shapes: dict[str, Any] = {}
    blobs: dict[str, str] = {}
    for name, found in lists.items():
        kind = index_type(int(found.which.max()) if found.which.numel() else 0)
        shapes[name] = {"rows": len(found.which), "width": found.which.shape[1], "index": kind, "errors": found.error is not None}
        blobs[f"{name}.index"] = blob(_integers(found.which.numpy(), kind))
        blobs[f"{name}.value"] = blob(halves(found.value))
        if found.error is not None:
            blobs[f"{name}.error"] = blob(halves(found.error))
    return shapes, blobs


def _integers(values: NDArray[np.int64], kind: str) -> bytes:
    return np.ascontiguousarray(values.astype({"u16": "<u2", "u32": "<u4"}[kind])).tobytes()


def compressed_size(value: Any) -> int:
    """Letters that `json_blob` of it takes, more or less."""
    return round(LETTERS * len(zlib.compress(json.dumps(value, ensure_ascii=False).encode(), 1)))
