"""Loading a model: what is checked before its weights are read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from saets import model
from saets.engine.batch import Row
from saets.engine.rollout import RolloutEngine
from saets.errors import InputError
from saets.experiment.model_config import Model, RandomWeights
from saets.model import load_model, load_tokenizer, random_llama, weights_hash


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


WHOLE: dict[str, int | str] = {"": "cpu"}
PARTS: dict[str, int | str] = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("table", [WHOLE, PARTS])
def test_a_map_of_the_cpu_alone_changes_no_bit(folder: Path, table: dict[str, Any]) -> None:
    spread = load_model(Model(name=str(folder), dtype="float32", device_map=table))
    alone = load_model(Model(name=str(folder), dtype="float32", device="cpu"))
    assert weights_hash(spread.original_model) == weights_hash(alone.original_model)
    rows = [Row("I think", seed, 0) for seed in range(3)]
    found, expected = (
        RolloutEngine(loaded, "blocks.2.hook_resid_post", top_k=20).run(rows, torch.ones(1, 32), 12, torch.relu)
        for loaded in (spread, alone)
    )
    assert torch.equal(found.tokens, expected.tokens)
    assert found.sums is not None
    assert torch.equal(found.sums, expected.sums)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": "cpu", "lm_haed": "cpu"}, "unknown module in model.device_map 'lm_haed'; .* did you mean 'lm_head'"),
        ({"model": "cpu"}, "model.device_map has no place for lm_head.weight; give one for each module"),
        ({"model.layers.1": "cpu", "model.embed_tokens": "cpu"}, "has no place for model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_a_map_of_another_model_is_refused_before_weights_are_read(
    folder: Path, table: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model.LOADERS, "transformers", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=message):
        load_model(Model(name=str(folder), device_map=table))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that are seen and never used, one with a little less memory."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(model, "free_bytes", lambda device: 60_000 + 20_000 * device.index)


@pytest.mark.usefixtures("two_gpus")
def test_a_spread_model_needs_the_memory_of_all_its_gpus_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.LOADERS, "transformers", lambda *_: pytest.fail("weights were read"))
    spec = Model(name=str(folder), dtype="float32", device_map="balanced")
    numbers = sum(p.numel() for p in load_model(Model(name="tiny", loader="random", device="cpu")).plain.parameters())
    assert 4 * numbers > 140_000
    with pytest.raises(InputError, match="cuda:0, cuda:1 together have 0.0 GiB free.* raise execution.gpus_per_actor"):
        load_model(spec)
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        load_model(spec.model_copy(update={"dtype": "bfloat16"}))


@pytest.mark.usefixtures("two_gpus")
def test_weights_are_read_onto_the_devices_of_the_map(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def read(name: str, **options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(hf_device_map={"model": 0, "lm_head": "disk"})

    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", read)
    spec = Model(name=str(folder), dtype="bfloat16", device_map="balanced")
    with pytest.raises(InputError, match="does not fit on its GPUs in whole blocks; raise execution.gpus_per_actor"):
        load_model(spec)
    assert asked == {"dtype": torch.bfloat16, "device_map": "balanced", "max_memory": {0: 60_000, 1: 80_000}}


def test_tied_weights_have_one_place_and_gpus_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, "vocab_size": 61}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    spec = Model(name=str(tmp_path), dtype="float32", device_map={"model": 0, "lm_head": 1})
    with pytest.raises(InputError, match="model.device_map needs 2 GPUs, and torch sees 0 here"):
        load_model(spec)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="model.embed_tokens.weight and lm_head.weight, which are one tensor, in two places"):
        load_model(spec)
