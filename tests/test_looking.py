"""`saets steer` and `saets forecast` as they are called: prompts given, piped and typed; what is printed."""

from __future__ import annotations

import io
import os
import pty
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from saets import SteeringVector
from saets.cli import main
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.explore import Run
from saets.run_folder.store import RunFolder

PIN = ["--set", "model.dtype=float32", "--set", "model.device=cpu", "--out", "none"]
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new working folder, and lines wide enough for any table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    SteeringVector.from_tensor(torch.ones(32), HOOK, model="tiny").save("mine.safetensors")


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture
def shipped(measured: RunFolder) -> list[str]:
    return [*PIN, "--set", f"effects.shipped={measured.path}"]


def texts_of(experiment: Experiment, prompt: str, scale: float, **how: int) -> list[str]:
    return Run("none", experiment).complete(prompt, SteeringVector.load("mine.safetensors"), scale=scale, **how)


def shipped_changes(options: list[str]) -> list[str]:
    """The values of --set."""
    return [value for option, value in pairwise(options) if option == "--set"]


def shown(printed: str) -> str:
    """What is printed without frames and white space, since cells are filled up."""
    return "".join(character for character in printed if not character.isspace() and not 0x2500 <= ord(character) < 0x2580)


def test_each_prompt_gets_its_texts_unsteered_and_at_each_scale(
    tiny_experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompt", "I think", "--prompt", "[bold]my weekend[/]"]
    options = ["--scale", "3", "--scale", "6", "--samples", "2", "--new-tokens", "7", "--seed", "5"]
    assert main(["steer", "tiny", *PIN, "--vector", "mine.safetensors", *prompts, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("unsteered") == printed.count("scale 3") == printed.count("scale 6") == 2
    for prompt in ("I think", "[bold]my weekend[/]"):
        for scale in (0.0, 3.0, 6.0):
            for text in texts_of(tiny_experiment, prompt, scale, samples=2, new_tokens=7, seed=5):
                if text.isprintable():
                    assert shown(prompt + text) in shown(printed)


def test_without_a_scale_the_one_of_the_experiments_calibration_is_taken_and_said(
    tiny_experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["steer", "tiny", *PIN, "--vector", "mine.safetensors", "--prompt", "hi"]) == 0
    found = Run("none", tiny_experiment).calibrate(SteeringVector.load("mine.safetensors"))
    printed = capsys.readouterr()
    assert f"scale {found.scale:.3g}" in printed.out
    assert printed.err.strip() == f"scale {found.scale:.3g} by the experiment's calibration"


def test_a_vector_whose_file_recommends_scales_is_shown_at_both(capsys: pytest.CaptureFixture[str]) -> None:
    SteeringVector.from_tensor(torch.ones(32), HOOK, scales={"low": 2.5, "high": 7.5, "outcome": "ok"}).save("own.safetensors")
    assert main(["steer", "tiny", *PIN, "--vector", "own.safetensors", "--prompt", "hi"]) == 0
    printed = capsys.readouterr()
    assert "scale 2.5" in printed.out and "scale 7.5" in printed.out
    assert printed.err == ""


def test_piped_lines_are_prompts_and_commands(
    tiny_experiment: Experiment, piped: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    piped("I think\n/scale 4 8\n/samples 1\n/tokens 5\n\n/quit\nnot read\n")
    assert main(["steer", "tiny", *PIN, "--vector", "mine.safetensors", "--scale", "2"]) == 0
    printed = capsys.readouterr().out
    first, second = printed.split("unsteered")[1:]
    assert "scale 2" in first and "scale 4" not in first
    assert "scale 4" in second and "scale 8" in second and "not read" not in second
    for scale in (0.0, 4.0, 8.0):
        (text,) = texts_of(tiny_experiment, "", scale, samples=1, new_tokens=5)
        if text.isprintable():
            assert shown(text) in shown(second)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/scales 3", "unknown command '/scales'; known: /format, /help, /quit, /samples, /scale, /seed, /tokens; did you mean"),
        ("/", "unknown command '/'"),
        ("/scale", "/scale: expected it as in /scale 40 80"),
        ("/scale x", "/scale x: expected it as in /scale 40 80"),
        ("/scale nan", "scales nan: expected finite numbers"),
        ("/samples 0", "samples is 0; expected 1 or more"),
        ("/format french", "/format french: expected it as in /format chat"),
    ],
)
def test_a_piped_command_that_cannot_be_ends_with_the_reason(
    line: str, reason: str, piped: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    piped(f"{line}\n")
    assert main(["steer", "tiny", *PIN, "--vector", "mine.safetensors", "--scale", "2"]) == 2
    assert reason in capsys.readouterr().err


def test_in_a_terminal_prompts_are_typed_and_what_is_wrong_with_one_is_no_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "wb", buffering=0) as keyboard, os.fdopen(theirs) as terminal:
        keyboard.write(b"/samples 1\n/wrong\nI think\n\x04")
        monkeypatch.setattr(sys, "stdin", terminal)
        assert main(["steer", "tiny", *PIN, "--vector", "mine.safetensors", "--scale", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("a line is a prompt")
    assert printed.out.count("prompt> ") == 4
    assert printed.out.count("unsteered") == 1
    assert "unknown command '/wrong'" in printed.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--scale", "nan"], "scales nan: expected finite numbers"),
        (["--samples", "0"], "samples is 0"),
        (["--new-tokens", "0"], "new_tokens is 0"),
        (["--prompt-format", "chat"], "evaluation.prompt_format is 'chat', and the model's tokenizer has no chat template"),
        (
            ["--set", "hook_name=blocks.1.hook_resid_post"],
            "is for blocks.2.hook_resid_post, and this experiment steers at blocks.1",
        ),
    ],
)
def test_what_cannot_be_steered_is_said_before_the_model_is_read(
    options: list[str], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("saets.explore.load_model")
    assert main(["steer", "tiny", *PIN, "--vector", "mine.safetensors", "--prompt", "hi", *options]) == 2
    assert reason in capsys.readouterr().err


def test_steering_by_features_uses_measured_effects_that_come_with_the_experiment_and_says_so(
    shipped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["steer", "tiny", *shipped, "--feature", "3:1", "--scale", "2", "--prompt", "hi"]) == 0
    said = capsys.readouterr().err
    assert "no approximator in none yet; this one is fitted to 40 measured vectors that come with tiny" in said
    assert not Path("none").exists()


def test_a_forecast_says_what_it_is_worth(shipped: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("labels.csv").write_text("feature,label\n3,[red] three\n")
    options = ["--feature", "3:1", "--feature", "5:0.5", "--top", "4", "--labels", "labels.csv", "--measure"]
    assert main(["forecast", "tiny", *shipped, *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["feature", "target", "predicted", "common", "R2", "measured", "s.e.", "about"]
    assert [line[:2] for line in lines[1:3]] == [["3", "1"], ["5", "0.5"]]
    assert lines[1][-2:] == ["[red]", "three"]
    run = Run("none", load_experiment("tiny", shipped_changes(shipped)))
    vector = run.target({3: 1.0, 5: 0.5})
    found = run.forecast(vector, top=4, features=[3, 5], measure=True)
    assert [int(line[0]) for line in lines[1:7]] == found["feature"].to_list()
    assert float(lines[1][5]) == pytest.approx(found["measured"][0], abs=1e-3)
    text = " ".join(word for line in lines[7:] for word in line)
    record = run.evidence.record()
    assert f"leverage {run.evidence.reach(vector).leverage:.3f}" in text
    assert f"R2 {record.r2:.2f}, cosine {record.cosine:.2f} on all {record.vectors}" in text
    assert "target: predicted" in text and "for any vector" in text
    assert "measured: 12 rollouts at scale" in text


def test_a_forecast_of_an_imported_vector_has_the_target_that_is_asked_for(
    shipped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forecast", "tiny", *shipped, "--vector", "mine.safetensors", "--top", "2"]) == 0
    without = capsys.readouterr().out
    assert "target:" not in without
    assert main(["forecast", "tiny", *shipped, "--vector", "mine.safetensors", "--top", "2", "--target", "9:2"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[:2] == ["9", "2"]
    assert "target: predicted" in printed


def test_a_forecast_of_a_vector_that_steers_some_positions_says_that_effects_are_those_at_all(
    shipped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    SteeringVector.load("mine.safetensors").at("generated").save("some.safetensors")
    assert main(["forecast", "tiny", *shipped, "--vector", "some.safetensors", "--top", "2"]) == 0
    assert "this vector steers generated tokens; its effects are those at every position" in capsys.readouterr().out


def test_where_the_vectors_of_a_fit_are_not_known_a_forecast_says_why(
    shipped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run("none", load_experiment("tiny", shipped_changes(shipped)))
    run.approximator.save("run/approximator.safetensors")
    Path("run/experiment.toml").write_text(load_experiment("tiny").to_toml())
    assert main(["forecast", "run", "--vector", "mine.safetensors", "--top", "2"]) == 0
    assert "reach: not known; the leverage of a vector is known for the exact fit alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--target", "99"], "no feature 99; the SAE has features 0 to 63"),
        (["--target", "x"], "--target 'x': expected ID:WEIGHT"),
        (["--target", "3:0"], "got 3: 0; give at least one feature"),
        (["--labels", "none.csv"], "no such file of labels: none.csv"),
        (["--top", "-1"], "--top is -1"),
        (["--set", "hook_name=blocks.1.hook_resid_post", "--set", "effects.shipped="], "is for blocks.2.hook_resid_post"),
    ],
)
def test_a_forecast_that_cannot_be_made_is_refused_with_the_reason(
    options: list[str], reason: str, shipped: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["forecast", "tiny", *shipped, "--vector", "mine.safetensors", *options]) == 2
    assert reason in capsys.readouterr().err
