"""Loading a model: what is checked before its weights are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saets import model
from saets.config import Model, RandomWeights
from saets.errors import InputError
from saets.model import load_model, load_tokenizer, random_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    weights = random_llama(RandomWeights(), torch.float32)
    weights.model.save_pretrained(folder)
    weights.tokenizer.save_pretrained(folder)
    return folder


def test_too_little_memory_for_the_weights_is_said_before_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Model(name=str(folder), dtype="float32", device="cpu")
    numbers = sum(p.numel() for p in load_model(spec).plain.parameters())
    monkeypatch.setattr(model, "free_bytes", lambda device: 4 * numbers - 1)
    monkeypatch.setitem(model.LOADERS, "transformers", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=r"billion weights, which take 0\.0 GiB in float32; cpu has 0\.0 GiB free\. Use another"):
        load_model(spec)


def test_half_precision_needs_half_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Model(name=str(folder), dtype="bfloat16", device="cpu")
    numbers = sum(p.numel() for p in load_model(half).plain.parameters())
    monkeypatch.setattr(model, "free_bytes", lambda device: 2 * numbers)
    assert load_model(half).cfg.n_layers == 4


def test_the_tokenizer_alone_is_the_models(folder: Path) -> None:
    spec = Model(name=str(folder), dtype="float32", device="cpu")
    text = "I think, therefore"
    assert load_tokenizer(spec).encode(text) == load_model(spec).tokenizer.encode(text)
