"""Doctor's checks pass on a sound model, and each finds what it is there to find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saets import doctor
from saets.cli import main
from saets.engine import plain
from saets.engine.bridge import BridgeDecoder
from saets.engine.choice import decoder_for
from saets.engine.decoder import Step, Unsupported
from saets.engine.plain import PlainDecoder
from saets.experiment.config import Experiment

CHECKS = ["environment", "judge", "device", "decoder", "logits", "two halves", "every position", "scale 0", "effects", "hooks"]


def failed(experiment: Experiment) -> set[str]:
    return {finding.check for finding in doctor.examine(experiment) if not finding.ok}


def test_a_sound_model_passes_every_check(tiny_experiment: Experiment) -> None:
    findings = {finding.check: finding for finding in doctor.examine(tiny_experiment)}
    assert list(findings) == CHECKS
    assert [check for check, finding in findings.items() if not finding.ok] == []
    assert "24 of 24 positions" in findings["every position"].detail
    assert "plain transformers modules" in findings["decoder"].detail


def test_the_bridge_passes_too(tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise Unsupported("not here")

    monkeypatch.setattr(PlainDecoder, "_probe", refuse)
    findings = {finding.check: finding for finding in doctor.examine(tiny_experiment)}
    assert "the bridge's hooks" in findings["decoder"].detail
    assert all(finding.ok for finding in findings.values())


@pytest.mark.parametrize("skipped", [0, 3, 23])
def test_a_position_that_is_not_steered_is_found(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch, skipped: int
) -> None:
    forward = plain._PlainSteps._forward

    def leave_out(self: Any, tokens: Tensor, position: int, added: Tensor) -> Tensor:
        return forward(self, tokens, position, 0 * added if position == skipped else added)

    monkeypatch.setattr(plain._PlainSteps, "_forward", leave_out)
    assert "every position" in failed(tiny_experiment)


def test_residuals_caught_after_the_vector_is_added_are_found(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = plain._PlainSteps.step

    def too_late(self: Any, tokens: Tensor, position: int, added: Tensor, *, last: bool) -> Step:
        found = step(self, tokens, position, added, last=last)
        return found._replace(residual=found.residual + added)

    monkeypatch.setattr(plain._PlainSteps, "step", too_late)
    assert failed(tiny_experiment) == {"effects"}


def test_a_hook_that_stays_is_found(tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = PlainDecoder.steps

    def and_leave_one(self: Any, rows: int, length: int) -> Any:
        self._hooked.register_forward_hook(lambda module, args, output: None)
        return steps(self, rows, length)

    monkeypatch.setattr(PlainDecoder, "steps", and_leave_one)
    assert "hooks" in failed(tiny_experiment)


def test_a_bridge_that_is_another_model_is_found(tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    load = doctor.load_model

    def tampered(spec: Any) -> Any:
        bridge = load(spec)
        forward = bridge.forward
        monkeypatch.setattr(bridge, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * 1.1)
        return bridge

    monkeypatch.setattr(doctor, "load_model", tampered)
    assert failed(tiny_experiment) == {"logits"}


def test_the_command_prints_a_line_a_check_and_fails_where_one_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["doctor", "tiny", "--set", "model.dtype=float32", "--set", "model.device=cpu"]
    assert main(settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[8:23].strip() for line in lines] == CHECKS
    assert all(line.startswith("ok") for line in lines)
    monkeypatch.setattr(doctor, "_scale_zero", lambda patient, tokens: doctor.Finding("scale 0", False, "on purpose"))
    assert main(settings) == 1
    assert "FAILED  scale 0         on purpose" in capsys.readouterr().out


def test_in_half_precision_limits_are_wider(tiny_experiment: Experiment) -> None:
    half = tiny_experiment.model_copy(update={"model": tiny_experiment.model.model_copy(update={"dtype": "bfloat16"})})
    assert failed(half) <= {"every position"}
    assert torch.bfloat16 not in doctor.LOGIT_TOLERANCE


def test_bridge_decoder_is_the_other_way_to_steer(tiny: Any) -> None:
    assert isinstance(decoder_for(tiny, "blocks.0.hook_resid_pre"), BridgeDecoder)
