"""Whether this machine, model and SAE do what the method takes for granted: checks that measure, and say what they found."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saets.engine import reference
from saets.engine.batch import Row
from saets.engine.choice import PLAIN
from saets.engine.decoder import Decoder, find_blocks
from saets.engine.machine import free_bytes
from saets.engine.plain import HALF_LOGITS, LOGIT_TOLERANCE, PlainDecoder
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.hooks import blocks_below
from saets.judge.choice import check_judge
from saets.model import load_model
from saets.sae import describe_sae, load_sae

LENGTH = 24
SAMPLES = 4

EFFECT_TOLERANCE = {torch.float32: 1e-4}
"""Relative difference of an effect computed the engine's way and the published way; half precision is allowed `HALF_EFFECTS`."""

HALF_EFFECTS = 0.05


class Finding(NamedTuple):
    """One check."""

    check: str
    ok: bool
    detail: str


class Patient(NamedTuple):
    """What is examined."""

    experiment: Experiment
    bridge: Any
    plain: Any
    engine: RolloutEngine
    sae: Any
    scale: float
    """A fifth of the residual stream's median length: enough to change what is written."""


def examine(experiment: Experiment) -> Iterator[Finding]:
    """Every check in turn, each finding as soon as it is there.

    Raises:
        InputError: the model or the SAE cannot be loaded.
    """
    yield _environment()
    yield _judge(experiment)
    bridge = load_model(experiment.model)
    engine = RolloutEngine(bridge, experiment.hook_name, top_k=experiment.effects.top_k)
    sae = load_sae(experiment.sae, bridge.cfg.d_model, engine.hook_device)
    tokens = engine.run(_rows(None), None, LENGTH).tokens.to(engine.device)
    norm = engine.decoder.lower(tokens)[:, 1:].float().norm(dim=-1).median().item()
    patient = Patient(experiment, bridge, bridge.__dict__[PLAIN], engine, sae, 0.2 * norm)
    yield _device(patient)
    yield _decoder(patient)
    for check in (_logits, _halves, _positions, _scale_zero, _effects, _hooks):
        yield check(patient, tokens)


def _environment() -> Finding:
    cuda = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU"
    return Finding("environment", True, f"Python {platform.python_version()}, torch {torch.__version__}, {cuda}")


def _judge(experiment: Experiment) -> Finding:
    try:
        check_judge(experiment.judge)
    except InputError as error:
        return Finding("judge", False, str(error))
    return Finding("judge", True, f"{experiment.judge.kind} judge is set up")


def _device(patient: Patient) -> Finding:
    engine = patient.engine
    free = min(free_bytes(device) for device in engine.decoder.devices) / 2**30
    row = engine.decoder.bytes_per_row(patient.experiment.effects.length) / 2**20
    dtype = str(engine.dtype).removeprefix("torch.")
    devices = ", ".join(map(str, engine.decoder.devices))
    detail = f"{devices}, {dtype}, {free:.1f} GiB free, {row:.1f} MiB a row; SAE {describe_sae(patient.experiment.sae)}"
    return Finding("device", True, detail)


def _decoder(patient: Patient) -> Finding:
    fast = isinstance(patient.engine.decoder, PlainDecoder)
    return Finding("decoder", True, "plain transformers modules" if fast else "the bridge's hooks (slower)")


@torch.no_grad()
def _logits(patient: Patient, tokens: Tensor) -> Finding:
    """The bridge and the rollout attention against the model as transformers runs it."""
    expected = _full_pass(patient, tokens, None)
    bridge = _difference(patient.bridge(tokens), expected)
    stepped = _difference(_stepped(patient.engine.decoder, tokens, 0 * _vector(patient)), expected[:, -1])
    limit = _limit(LOGIT_TOLERANCE, HALF_LOGITS, patient)
    detail = (
        f"differ from plain transformers by {bridge:.1e} (bridge) and {stepped:.1e} (rollouts) of their spread; limit {limit:g}"
    )
    return Finding("logits", max(bridge, stepped) <= limit, detail)


def _halves(patient: Patient, tokens: Tensor) -> Finding:
    """Blocks below and above the hook, one after the other, against the whole."""
    decoder = patient.engine.decoder
    found = _difference(decoder.upper(tokens, decoder.lower(tokens)), _full_pass(patient, tokens, None))
    limit = _limit(LOGIT_TOLERANCE, HALF_LOGITS, patient)
    return Finding("two halves", found <= limit, f"logits differ by {found:.1e} of their spread; limit {limit:g}")


def _positions(patient: Patient, tokens: Tensor) -> Finding:
    """Steered decoding against a full pass steered everywhere, and against passes that leave out one position."""
    vector = _vector(patient)
    stepped = _stepped(patient.engine.decoder, tokens, vector)
    everywhere = _difference(stepped, _full_pass(patient, tokens, vector.expand(*tokens.shape, -1))[:, -1])
    without = []
    for position in range(tokens.shape[1]):
        added = vector.repeat(*tokens.shape, 1)
        added[:, position] = 0
        without.append(_difference(stepped, _full_pass(patient, tokens, added)[:, -1]))
    limit = _limit(LOGIT_TOLERANCE, HALF_LOGITS, patient)
    steered = sum(found > everywhere for found in without)
    detail = (
        f"{steered} of {len(without)} positions steered, BOS and prompt among them: logits differ by {everywhere:.1e} from a "
        f"pass steered everywhere, by at least {min(without):.1e} from one that leaves a position out"
    )
    return Finding("every position", everywhere <= limit and steered == len(without), detail)


def _scale_zero(patient: Patient, tokens: Tensor) -> Finding:
    nothing = torch.zeros(1, patient.engine.decoder.d_model)
    found = patient.engine.run(_rows(0), nothing, LENGTH).tokens
    changed = int((found != tokens.cpu()).any(dim=1).sum())
    return Finding("scale 0", changed == 0, f"{changed} of {len(tokens)} texts differ from unsteered ones")


def _effects(patient: Patient, tokens: Tensor) -> Finding:
    """The engine's effect against the published algorithm on the same tokens: run unsteered, encode, average, subtract."""
    engine, block = patient.engine, _block(patient)
    vector = _vector(patient)[None].float()
    means = []
    for which in (0, None):
        found = engine.run(_rows(which), vector, LENGTH, _encoder(patient))
        assert found.sums is not None
        literal = reference.mean_activations(patient.plain, block, _encoder(patient), found.tokens.to(engine.device))
        means.append((found.sums.double().mean(0) / LENGTH, literal.mean(0)))
    ours, published = (means[0][i] - means[1][i] for i in (0, 1))
    found_difference = ((ours - published).norm() / published.norm()).item()
    limit = _limit(EFFECT_TOLERANCE, HALF_EFFECTS, patient)
    detail = f"differ by {found_difference:.1e} from the published algorithm on the same tokens; limit {limit:g}"
    return Finding("effects", found_difference <= limit, detail)


def _hooks(patient: Patient, tokens: Tensor) -> Finding:
    """Hooks, attention and blocks after a run, and after one that failed half-way."""
    before = _full_pass(patient, tokens, None)
    calls = iter(range(3))

    def fail(residual: Tensor) -> Tensor:
        if next(calls, None) is None:
            raise RuntimeError("on purpose")
        return residual

    for encode in (None, fail):
        try:
            patient.engine.run(_rows(0), _vector(patient)[None].float(), LENGTH, encode)
        except RuntimeError as error:
            if str(error) != "on purpose":
                raise
    points = [*patient.bridge.hook_dict.values()]
    left = sum(bool(point.fwd_hooks) for point in points) + sum(bool(m._forward_hooks) for m in patient.plain.modules())
    same = torch.equal(_full_pass(patient, tokens, None), before)
    detail = f"{left} hooks left after a run and after one that failed; logits {'unchanged' if same else 'CHANGED'}"
    return Finding("hooks", left == 0 and same, detail)


def _rows(vector: int | None) -> list[Row]:
    return [Row(prompt, row_seed("doctor", prompt, i), vector) for prompt in ("", "I think") for i in range(SAMPLES)]


def _vector(patient: Patient) -> Tensor:
    """The first decoder row, at the patient's scale."""
    row = patient.sae.W_dec[0].float()
    return (patient.scale * row / row.norm()).to(patient.engine.device, patient.engine.dtype)


def _encoder(patient: Patient) -> Callable[[Tensor], Tensor]:
    dtype = patient.sae.W_dec.dtype
    return lambda residual: patient.sae.encode(residual.to(dtype)).float()


def _block(patient: Patient) -> Any:
    blocks = find_blocks(patient.plain, patient.engine.decoder.n_blocks)
    return blocks[blocks_below(patient.experiment.hook_name) - 1]


@torch.no_grad()
def _full_pass(patient: Patient, tokens: Tensor, added: Tensor | None) -> Tensor:
    """Logits of plain transformers with its own attention, steered by `added` [rows, pos, d_model]."""
    with reference.steered(_block(patient), added) if added is not None else contextlib.nullcontext():
        logits: Tensor = patient.plain(tokens, use_cache=False).logits
    return logits


@torch.no_grad()
def _stepped(decoder: Decoder, tokens: Tensor, vector: Tensor) -> Tensor:
    """Logits after the last token, decoded one token a step with the vector added at each."""
    added = vector.expand(len(tokens), -1)
    with decoder.steps(*tokens.shape) as steps:
        for position in range(tokens.shape[1]):
            step = steps.step(tokens[:, position], position, added, last=False)
    assert step.logits is not None
    return step.logits


def _difference(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).square().mean().sqrt() / expected.float().std()).item()


def _limit(limits: dict[torch.dtype, float], half: float, patient: Patient) -> float:
    return limits.get(patient.engine.dtype, half)
