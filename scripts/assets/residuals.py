"""Part `residuals`: what SAEs are trained on, the residual stream of the model on both texts, at several layers in one pass.

Chunks are mixed before they are run, so any stretch of tokens is a fair sample. Of the model's own writing only what it wrote is
kept, not the openings, which come again and again; of each chunk the first positions are left out, and residuals of huge norm.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from assets import passages, writing
from assets.language_model import LanguageModel
from assets.parts import Build, Need, Progress, whole
from assets.settings import Settings
from saets.engine.decoder import find_blocks
from saets.errors import InputError
from saets.shapes import Float, Int

STEP_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens run at once."""

FILE_CHUNKS = 4096
"""Chunks of a file."""


class Chunk(NamedTuple):
    """Tokens to run, and the position from which residuals are kept."""

    tokens: np.ndarray
    start: int


def need(settings: Settings) -> Need:
    """Two bytes a number, at each layer; SmolLM2's d_model is 576."""
    tokens = settings.writing.tokens + settings.passages.tokens
    return Need(disk=2.0 * 576 * len(settings.residuals.layers) * tokens, memory=6e9)


def check(build: Build) -> None:
    """Raise `InputError` where the model has no such block."""
    layers, blocks = build.settings.residuals.layers, LanguageModel.load(build).model.config.get_text_config().num_hidden_layers
    outside = [layer for layer in layers if not 0 <= layer < blocks]
    if outside or not layers:
        raise InputError(f"residuals.layers is {list(layers)}; expected some of the model's blocks 0 to {blocks - 1}")


def make(build: Build, folder: Path) -> Mapping[str, Any]:
    """Files of the residuals of some chunks, float16 [tokens, d_model], in a folder a layer."""
    settings, seed = build.settings.residuals, build.settings.subject.seed
    loaded = LanguageModel.load(build)
    places = {layer: folder / f"layer-{layer}" for layer in settings.layers}
    for place in places.values():
        place.mkdir(exist_ok=True)
    chunks = all_chunks(build)
    pools = [chunks[at : at + FILE_CHUNKS] for at in range(0, len(chunks), FILE_CHUNKS)]
    names = [f"{number:04d}.npy" for number in range(len(pools))]
    missing = [i for i, name in enumerate(names) if not all((place / name).exists() for place in places.values())]
    progress = Progress("residuals, chunks", len(chunks), (len(pools) - len(missing)) * FILE_CHUNKS)
    for i in missing:
        found = _residuals(loaded.model, pools[i], settings.layers)
        short = torch.stack([part.float().norm(dim=1) < settings.max_norm for part in found.values()]).all(0)
        order = torch.randperm(int(short.sum()), generator=torch.Generator().manual_seed(2**20 * seed + i))
        for layer, place in places.items():
            data = found[layer][short][order].numpy()
            whole(place / names[i], lambda path, data=data: _save(path, data))
        progress.at((i + 1) * FILE_CHUNKS)
    tokens = sum(len(np.load(path, mmap_mode="r")) for path in files(build, settings.layers[0]))
    eligible = sum(len(chunk.tokens) - chunk.start for chunk in chunks)
    return {"tokens": tokens, "left_out_by_norm": eligible - tokens}


def files(build: Build, layer: int) -> list[Path]:
    """The files of a layer, in order."""
    return sorted((build.folder("residuals") / f"layer-{layer}").glob("[0-9]*.npy"))


def held_out(build: Build, layer: int) -> tuple[Path, list[Chunk]]:
    """The file on which SAEs are judged and no SAE is trained, and its chunks."""
    return files(build, layer)[0], all_chunks(build)[:FILE_CHUNKS]


def all_chunks(build: Build) -> list[Chunk]:
    """Both texts, mixed."""
    first = build.settings.residuals.skip_positions
    own = (Chunk(tokens, max(first, start)) for tokens, start in writing.texts(build))
    others = (Chunk(tokens, first) for tokens in passages.chunks(build))
    chunks = [chunk for chunk in itertools.chain(own, others) if len(chunk.tokens) > chunk.start]
    random.Random(build.settings.subject.seed).shuffle(chunks)
    return chunks


@torch.no_grad()
def at_layers(model: Any, tokens: Int[Tensor, "rows pos"], layers: Sequence[int]) -> dict[int, Float[Tensor, "rows pos d_model"]]:
    """The residual stream after some blocks; those above are not run."""
    blocks = find_blocks(model, model.config.get_text_config().num_hidden_layers)
    caught: dict[int, Tensor] = {}

    def catch(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            caught[layer] = output[0] if isinstance(output, tuple) else output
            if layer == max(layers):
                raise _Done

        return hook

    handles = [blocks[layer].register_forward_hook(catch(layer)) for layer in layers]
    try:
        model(tokens.to(model.device), use_cache=False)
    except _Done:
        return caught
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError(f"block {max(layers)} did not run")


class _Done(Exception):
    """The last block wanted has run."""


def _residuals(model: Any, chunks: Sequence[Chunk], layers: Sequence[int]) -> dict[int, Float[Tensor, "tokens d_model"]]:
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for some in _equally_long(chunks, STEP_TOKENS[model.device.type]):
        tokens = torch.from_numpy(np.stack([chunk.tokens for chunk in some]).astype(np.int64))
        keep = torch.arange(tokens.shape[1]) >= torch.tensor([chunk.start for chunk in some])[:, None]
        for layer, residual in at_layers(model, tokens, layers).items():
            parts[layer].append(residual[keep.to(residual.device)].half().cpu())
    return {layer: torch.cat(found) for layer, found in parts.items()}


def _equally_long(chunks: Sequence[Chunk], most: int) -> Iterator[list[Chunk]]:
    for length, group in itertools.groupby(sorted(chunks, key=_length), key=_length):
        same = list(group)
        rows = max(1, most // length)
        yield from (same[at : at + rows] for at in range(0, len(same), rows))


def _length(chunk: Chunk) -> int:
    return len(chunk.tokens)


def _save(path: Path, data: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, data)
