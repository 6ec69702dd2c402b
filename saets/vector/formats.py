"""Vector files of other tools: GGUF control vectors, plain safetensors, `.pt`.

A format is one function in each direction: what a vector becomes (`EXPORTS`), and what a file holds (`IMPORTS`). A layer is block
N, counted from 0, and the vector is added to its output, `blocks.N.hook_resid_post`; docs/vectors.md says how other tools count.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from saets.errors import InputError, unknown
from saets.files.storage import Location, Where, locate
from saets.files.tensors import to_bytes
from saets.hooks import HOOK_PATTERN, blocks_below
from saets.hub.published import load_pt
from saets.vector.positions import EVERYWHERE, Positions
from saets.vector.vector import FORMAT, ScaledVector, SteeringVector, read_provenance

DIRECTION = re.compile(r"^direction\.(\d+)$")
"""Name of a tensor in a GGUF control vector."""


class Choice(NamedTuple):
    """Which of a file's tensors is meant, and where it belongs; None is what the file says."""

    hook_name: str | None = None
    key: str | None = None
    """Name of a tensor."""
    row: int | None = None
    """Row of a tensor [rows, d_model]."""


def post(layer: int) -> str:
    """The hook after block `layer`."""
    return f"blocks.{layer}.hook_resid_post"


def check_new(path: Where) -> None:
    """Raise `InputError` where a file is there already: exchange replaces nothing."""
    if locate(path).is_file():
        raise InputError(f"{path} is there already; give another --file, or move it away")


def export_vector(vector: ScaledVector, to: str, path: Where, *, model_hint: str = "", force: bool = False) -> None:
    """Write a vector for another tool, at its length; a file that is there already is not replaced.

    `model_hint` is the kind of model, as in `config.model_type`; `force` writes a vector although its positions are lost.

    Raises:
        InputError: unknown format, a scale of 0, a hook or positions that the format cannot carry, or a file in the way.
    """
    if to not in EXPORTS:
        raise unknown("format", to, EXPORTS)
    if vector.scale == 0:
        raise InputError("a vector of scale 0 steers nothing; give another scale")
    positions = vector.vector.positions
    if not positions.everywhere and not force:
        raise InputError(
            f"a {to} file cannot say that only {positions} may be steered, and other tools would steer every position; give "
            "--force (in Python force=True) to write it all the same"
        )
    check_new(path)
    locate(path).write_bytes(EXPORTS[to](vector, model_hint))


def import_vector(path: Where, choice: Choice | None = None) -> ScaledVector:
    """Read a vector from another tool's file, with its length as its scale. The kind of file is told by its name's end.

    A file without a hook of its own (`.pt`, plain safetensors) needs one in `choice`; one of several tensors needs to be chosen.

    Raises:
        InputError: missing, damaged or unknown file, one that would run code, a choice that is not one tensor of [d_model], NaN
            or a length of zero.
    """
    location = locate(path)
    if not location.is_file():
        raise InputError(f"no such file: {path}")
    ending = Path(location.name).suffix
    if ending not in IMPORTS:
        raise unknown("kind of vector file", ending or location.name, IMPORTS)
    try:
        return IMPORTS[ending](location, choice or Choice())
    except InputError as error:
        if location.name in str(error):
            raise
        raise InputError(f"{location.name}: {error}") from error


def to_gguf(vector: ScaledVector, model_hint: str) -> bytes:
    """A control vector as llama.cpp, repeng and their like read it: `direction.N`, float32, as long as the scale.

    Hook, positions and provenance go along under `saets.` keys, which other tools leave alone.
    """
    gguf = _gguf()
    layer = blocks_below(vector.vector.hook_name) - 1
    if layer < 1:
        raise InputError(
            f"a GGUF control vector cannot carry {vector.vector.hook_name}: llama.cpp adds direction.N to the output of block N "
            "and refuses N = 0, so neither the embeddings nor block 0 can be steered; export safetensors"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(path, "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", 1)
        for key, text in _facts(vector).items():
            writer.add_string(f"saets.{key}", text)
        writer.add_tensor(f"direction.{layer}", vector.added.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def to_safetensors(vector: ScaledVector, model_hint: str) -> bytes:
    """One tensor [d_model], float32, as long as the scale; its key is the hook's name, which needs no way of counting layers."""
    return to_bytes({vector.vector.hook_name: vector.added}, _facts(vector))


def _facts(vector: ScaledVector) -> dict[str, str]:
    """What only this package reads back."""
    return {
        "hook_name": vector.vector.hook_name,
        "positions": json.dumps(vector.vector.positions.to_json()),
        "provenance": json.dumps(vector.vector.provenance, sort_keys=True),
    }


def from_gguf(location: Location, choice: Choice) -> ScaledVector:
    """A control vector; where it has several layers, the one before or after which `choice.hook_name` lies."""
    with _on_disk(location) as path:
        fields, tensors = _read_gguf(path)
    layers = {int(match[1]): tensor for name, tensor in tensors.items() if (match := DIRECTION.match(name))}
    if fields.get("general.architecture") != "controlvector" or not layers:
        raise InputError("this is no control vector: expected general.architecture = controlvector and tensors direction.N")
    if choice.hook_name is None and len(layers) > 1:
        raise InputError(f"it holds a vector for each of the layers {_few(sorted(layers))}; choose one by --layer")
    layer = next(iter(layers)) if choice.hook_name is None else blocks_below(choice.hook_name) - 1
    if layer not in layers:
        raise InputError(f"it holds no vector for {choice.hook_name}; its layers are {_few(sorted(layers))}")
    ours = {key.removeprefix("saets."): text for key, text in fields.items() if key.startswith("saets.")}
    hook_name = choice.hook_name or ours.get("hook_name") or post(layer)
    facts = {"key": f"direction.{layer}", "model_hint": fields.get("controlvector.model_hint", "")}
    return _vector(layers[layer], hook_name, location, facts, ours)


def from_safetensors(location: Location, choice: Choice) -> ScaledVector:
    """A vector file of this package, or one tensor of any other; a key that is a hook's name says where it belongs."""
    content = location.read_bytes()
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise InputError(f"it is not a safetensors file: {error}") from error
    if header.get("format") == FORMAT:
        vector = SteeringVector.load(location)
        _same_place(vector.hook_name, choice)
        return ScaledVector(vector, float(vector.provenance.get("scale", 1.0)))
    return _chosen(tensors, location, choice, header)


def from_pt(location: Location, choice: Choice) -> ScaledVector:
    """A tensor, or one of a dict of tensors, as `torch.save` writes them; nothing in the file is run."""
    with _on_disk(location) as path:
        found = load_pt(path)
    tensors = {"": found} if isinstance(found, Tensor) else found
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"it holds a {type(found).__name__}; expected a tensor, or a dict of tensors")
    return _chosen({str(key): tensor for key, tensor in tensors.items()}, location, choice, {})


def _chosen(tensors: Mapping[str, Tensor], location: Location, choice: Choice, header: Mapping[str, str]) -> ScaledVector:
    """The one tensor that is meant."""
    if choice.key is None and len(tensors) != 1:
        key = choice.hook_name
        if key not in tensors:
            raise InputError(f"it holds {len(tensors)} tensors ({_few(sorted(tensors))}); choose one by --key")
    else:
        key = next(iter(tensors)) if choice.key is None else choice.key
    if key not in tensors:
        raise unknown("key", str(key), tensors)
    assert key is not None
    if choice.key is None and HOOK_PATTERN.match(key):
        _same_place(key, choice)
    hook_name = choice.hook_name or (key if HOOK_PATTERN.match(key) else None)
    if hook_name is None:
        raise InputError("the file does not say where the vector is added; give --layer or --hook-name")
    ours = header if header.get("hook_name") == key else {}
    return _vector(_row(tensors[key], choice.row), hook_name, location, {"key": key} if key else {}, ours)


def _same_place(hook_name: str, choice: Choice) -> None:
    """Raise `InputError` where a file says that its vector belongs elsewhere than was asked for."""
    if choice.hook_name not in (None, hook_name):
        raise InputError(
            f"its vector is for {hook_name}, and {choice.hook_name} was asked for; leave --layer and --hook-name out"
        )


def _row(tensor: Tensor, row: int | None) -> Tensor:
    """The one vector in a tensor."""
    if tensor.ndim == 2 and row is not None:
        if not 0 <= row < len(tensor):
            raise InputError(f"row {row} of a tensor with {len(tensor)} rows; expected 0 to {len(tensor) - 1}")
        return tensor[row]
    if row is not None:
        raise InputError(f"the tensor is {list(tensor.shape)} and has no rows to choose from; leave --row out")
    single = tensor.reshape(-1) if tensor.ndim > 1 and tensor.numel() == tensor.shape[-1] else tensor
    if single.ndim != 1:
        more = "; choose one of its rows by --row" if tensor.ndim == 2 else ""
        raise InputError(f"the tensor is {list(tensor.shape)}; expected [d_model]{more}")
    return single


def _vector(tensor: Tensor, hook_name: str, location: Location, facts: dict[str, str], ours: Mapping[str, str]) -> ScaledVector:
    """The tensor as a vector, with what this package wrote beside it and where it was read from."""
    if not tensor.is_floating_point():
        raise InputError(f"the tensor is {str(tensor.dtype).removeprefix('torch.')}; expected floating-point numbers")
    try:
        provenance = read_provenance(ours.get("provenance", "{}"))
        positions = Positions.from_json(json.loads(ours["positions"])) if "positions" in ours else EVERYWHERE
    except json.JSONDecodeError as error:
        raise InputError(f"what saets wrote beside the vector is damaged: {error}") from error
    imported = {"file": location.name, **facts}
    vector = SteeringVector.from_tensor(tensor, hook_name)
    known = replace(vector, positions=positions, provenance={**provenance, "imported": imported})
    return ScaledVector(known, tensor.double().norm().item())


def _read_gguf(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Texts and float32 tensors of a GGUF file."""
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
        texts = {name: field.contents() for name, field in reader.fields.items() if field.types == [gguf.GGUFValueType.STRING]}
        kept = {tensor.name: tensor for tensor in reader.tensors if DIRECTION.match(tensor.name)}
        other = [name for name, tensor in kept.items() if tensor.tensor_type != gguf.GGMLQuantizationType.F32]
        if other:
            raise InputError(f"{_few(other)} is not float32; control vectors are")
        return texts, {name: torch.from_numpy(tensor.data.copy()) for name, tensor in kept.items()}
    except InputError:
        raise
    except Exception as error:  # the reader meets damage with whatever numpy says of it
        raise InputError(f"it cannot be read as GGUF: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _on_disk(location: Location) -> Iterator[Path]:
    """A file's path on this machine; one of an object store is copied."""
    if location.local is not None:
        yield location.local
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / location.name
        path.write_bytes(location.read_bytes())
        yield path


def _gguf() -> Any:
    if importlib.util.find_spec("gguf") is None:
        raise InputError("GGUF files need the package gguf, which is not installed: pip install gguf")
    return importlib.import_module("gguf")


def _few(names: list[Any]) -> str:
    shown = ", ".join(map(str, names[:40]))
    return shown if len(names) <= 40 else f"{shown} and {len(names) - 40} more"


EXPORTS: dict[str, Callable[[ScaledVector, str], bytes]] = {"gguf": to_gguf, "safetensors": to_safetensors}
"""What a vector becomes, by format; given the kind of model too."""

IMPORTS: dict[str, Callable[[Location, Choice], ScaledVector]] = {
    ".gguf": from_gguf,
    ".safetensors": from_safetensors,
    ".pt": from_pt,
    ".pth": from_pt,
}
"""What a file holds, by the end of its name."""
