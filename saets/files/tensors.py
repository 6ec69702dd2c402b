"""Tensors with a header of text, as safetensors: the form of vectors and of the fitted map."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from saets.errors import InputError
from saets.files.storage import Where, locate


class TensorFile(NamedTuple):
    """What such a file holds."""

    tensors: dict[str, Tensor]
    header: dict[str, str]


def write_tensors(where: Where, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a file, whole or not at all; raises `InputError` where that cannot be done."""
    locate(where).write_bytes(to_bytes(tensors, header))


def to_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    """The content of such a file: the same for the same tensors and header, whose keys safetensors writes in any order."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = memoryview(save(whole, metadata=dict(header)))
    start = 8 + int.from_bytes(content[:8], "little")
    ordered = json.dumps(json.loads(bytes(content[8:start])), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ordered += b" " * (-len(ordered) % 8)
    return b"".join((len(ordered).to_bytes(8, "little"), ordered, content[start:]))


def read_tensors(where: Where, missing: str) -> TensorFile:
    """Read a file.

    Raises:
        InputError: `missing` where there is none; a file that is not safetensors or cannot be read.
    """
    location = locate(where)
    if not location.is_file():
        raise InputError(missing)
    content = location.read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise InputError(f"{location} is not a safetensors file: {error}") from error
    return TensorFile(tensors, _header(content))


def read_header(where: Where) -> dict[str, str]:
    """The header alone of a file that is there.

    Raises:
        InputError: a file that is not safetensors or cannot be read.
    """
    location = locate(where)
    try:
        with location.open() as file:
            size = file.read(8)
            return _header(size + file.read(int.from_bytes(size, "little")))
    except (ValueError, OSError, OverflowError, MemoryError) as error:
        raise InputError(f"{location} is not a safetensors file: {error}") from error


def _header(content: bytes) -> dict[str, str]:
    size = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    return found
