"""A model spread over devices gives what it gives on one, bit for bit; two devices are pretended (`tests/pretended.py`)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import dispatch_model
from torch import nn

from saets import model as loading
from saets.doctor import examine
from saets.effects.sources import vector_items
from saets.effects.worker import EffectWorker, Measurement, describe
from saets.engine import machine
from saets.engine.batch import Row
from saets.engine.bridge import BridgeDecoder
from saets.engine.calibration import Calibrator, ScaleRule
from saets.engine.plain import PlainDecoder, share_weights
from saets.engine.rollout import RolloutEngine
from saets.experiment.config import Evaluation, Experiment
from saets.experiment.goal import load_goal
from saets.experiment.model_config import Model, RandomWeights
from saets.generation import SteeringWorker
from saets.judge.local import Coherence
from tests.engine.test_decoder import CONFIGS, vectors
from tests.pretended import pretended_devices

LOW, HIGH = torch.device("cpu:1"), torch.device("cpu:2")


@pytest.fixture
def pretended() -> Iterator[None]:
    with pretended_devices():
        yield


def spread(model: Any) -> Any:
    """The model as a balanced map lays it out: what stands before the blocks, two of them and a tied head lie on one device,
    the other blocks and what follows them on another."""
    blocks = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == 4)
    table: dict[str, torch.device] = {}
    place = LOW
    for name, module in model.named_modules():
        if f"{blocks}.".startswith(f"{name}.") or not name:
            continue
        if name == f"{blocks}.2":
            place = HIGH
        tied = module is model.get_output_embeddings() and model.config.tie_word_embeddings
        if not any(name.startswith(f"{placed}.") for placed in table):
            table[name] = LOW if tied else place
    return dispatch_model(model, table, skip_keys=model._skip_keys_device_placement)


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def one(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval().requires_grad_(False)


def test_tensors_of_two_pretended_devices_do_not_mix(pretended: None) -> None:
    ones = torch.ones(3, device=LOW)
    with pytest.raises(RuntimeError, match="expected all tensors to be on one device"):
        ones + torch.ones(3, device=HIGH)
    with pytest.raises(RuntimeError, match="expected all tensors to be on one device"):
        ones[torch.tensor([0], device=HIGH)]
    assert (ones + torch.ones(3, device=HIGH).to(LOW)).cpu().tolist() == [2, 2, 2]


@pytest.mark.parametrize("hook_name", ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"])
def test_rollouts_over_two_devices_are_those_on_one(one: Any, hook_name: str, pretended: None) -> None:
    alone = RolloutEngine(copy.deepcopy(one), hook_name, top_k=20)
    parted = RolloutEngine(share_weights(spread(one)), hook_name, top_k=20)
    assert isinstance(parted.decoder, PlainDecoder)
    assert (parted.device, parted.hook_device) == (LOW, HIGH if "2" in hook_name else LOW)
    assert set(parted.decoder.devices) == {LOW, HIGH}
    rows = [Row(prompt, seed, seed % 2) for seed, prompt in enumerate([(0,), (0, 5, 9), (0,), (0, 7)] * 2)]
    for _ in range(2):
        expected, found = (engine.run(rows, vectors(2), 12, torch.relu) for engine in (alone, parted))
        assert found.sums is not None
        assert found.sums.device == parted.hook_device
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.sums.cpu(), expected.sums)


def test_losses_and_scales_over_two_devices_are_those_on_one(one: Any, pretended: None) -> None:
    text = torch.randint(0, 61, (5, 9), generator=torch.Generator().manual_seed(2))
    rule = ScaleRule(loss_increase=0.3, grid=(0.0, 1.0, 2.0, 4.0, 8.0, 16.0))
    hook_name = "blocks.2.hook_resid_post"
    alone, parted = PlainDecoder(copy.deepcopy(one), hook_name), PlainDecoder(spread(one), hook_name)
    expected, found = (Calibrator(decoder, text, rule).calibrate(list(vectors(2, 1.0))) for decoder in (alone, parted))
    assert found == expected


@pytest.fixture
def parted_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_model` as it is for a map, with the tiny model and two pretended devices."""

    def load(spec: Model, dtype: torch.dtype) -> loading.Weights:
        weights = loading.random_llama(RandomWeights(), dtype)
        return loading.Weights(spread(weights.model), weights.tokenizer)

    monkeypatch.setitem(loading.LOADERS, "transformers", load)
    monkeypatch.setattr(loading, "_check_fit", lambda *_: None)
    monkeypatch.setattr(loading, "model_devices", lambda spec: (LOW, HIGH) if spec.device_map else (torch.device("cpu"),))


def parted_experiment(experiment: Experiment) -> Experiment:
    spec = Model(name="tiny", dtype="float32", device_map={"model": 0, "lm_head": 1})
    return experiment.model_copy(update={"model": spec})


@pytest.mark.usefixtures("parted_loader")
def test_effects_over_two_devices_are_those_on_one(tiny_experiment: Experiment, pretended: None) -> None:
    items = list(itertools.islice(vector_items(tiny_experiment, 32), 3))
    alone, parted = EffectWorker(tiny_experiment), EffectWorker(parted_experiment(tiny_experiment))
    assert parted.sae.W_dec.device == parted.engine.hook_device == HIGH
    assert {p.device for p in parted.model.parameters()} == {LOW, HIGH}
    for found, expected in zip(parted.measure(items), alone.measure(items), strict=True):
        assert isinstance(found, Measurement)
        assert isinstance(expected, Measurement)
        assert np.array_equal(found.mean, expected.mean)
        assert (found.calibration, found.error_variance) == (expected.calibration, expected.error_variance)
    assert describe(parted)["decoder"] == "PlainDecoder"


@pytest.mark.usefixtures("parted_loader")
def test_the_bridge_over_two_devices_decodes_as_on_one(tiny: Any, tiny_experiment: Experiment, pretended: None) -> None:
    model = loading.load_model(parted_experiment(tiny_experiment).model)
    alone, parted = (BridgeDecoder(bridge, tiny_experiment.hook_name) for bridge in (tiny, model))
    assert (parted.device, parted.hook_device) == (LOW, HIGH)
    tokens = torch.arange(12).view(2, 6)
    residual = parted.lower(tokens.to(LOW))
    assert torch.equal(residual.cpu(), alone.lower(tokens))
    assert torch.equal(parted.upper(tokens.to(LOW), residual).cpu(), alone.upper(tokens, residual.cpu()))
    added = torch.randn(2, 32)
    with parted.steps(2, 6) as found, alone.steps(2, 6) as expected:
        for at in range(6):
            step = found.step(tokens[:, at].to(LOW), at, added.to(LOW), last=False)
            assert step.logits is not None
            assert torch.equal(step.logits.cpu(), expected.step(tokens[:, at], at, added, last=False).logits)


@pytest.mark.usefixtures("parted_loader")
def test_contrast_texts_fluency_and_every_check_run_over_two_devices(tiny_experiment: Experiment, pretended: None) -> None:
    experiment = parted_experiment(tiny_experiment)
    alone, parted = SteeringWorker(tiny_experiment), SteeringWorker(experiment)
    goal = load_goal("london")
    for side, expected in alone.contrast(goal).items():
        assert np.array_equal(parted.contrast(goal)[side], expected)
    settings = Evaluation(prompts=("I think",), new_tokens=6, top_k=20)
    assert Coherence(parted.model, settings, seed=0).mean == Coherence(alone.model, settings, seed=0).mean
    findings = list(examine(experiment))
    assert [finding.check for finding in findings if not finding.ok] == []
    assert any("cpu:1, cpu:2" in finding.detail for finding in findings)


def test_the_fullest_device_decides_how_many_rows_fit(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = PlainDecoder(tiny.plain, "blocks.2.hook_resid_post")
    row = decoder.bytes_per_row(16) + 3 * 4 * 64
    decoder.devices = (LOW, HIGH)
    monkeypatch.setattr(machine, "free_bytes", lambda device: {LOW: 1000, HIGH: 100}[device] * row)
    assert machine.rows_that_fit(decoder, 16, 64) == 70


def test_graphs_are_off_where_a_model_has_several_devices(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = PlainDecoder(tiny.plain, "blocks.2.hook_resid_post")
    monkeypatch.setattr("saets.engine.rollout.decoder_for", lambda *_: decoder)
    decoder.device = torch.device("cuda:0")
    for devices, graphed in ((("cuda:0",), True), (("cuda:0", "cuda:1"), False)):
        decoder.devices = tuple(map(torch.device, devices))
        assert (RolloutEngine(tiny, "blocks.2.hook_resid_post")._graphs is not None) == graphed
