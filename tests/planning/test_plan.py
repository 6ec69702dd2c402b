"""Plans of presets and of run folders: the paper's figures, more nodes, what is done already, and what cannot be planned."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import ray
from assets.measuring import live_rows

from saets.cli import main
from saets.distributed.layout import laid_out
from saets.distributed.nodes import Gpu, Node
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.loading import effect_settings, load_experiment
from saets.planning.plan import Plan, make_plan
from saets.run_folder.store import RunFolder
from saets.stages.session import Session

FIVE = "steering.methods=['caa','sae','sae_ts','pinverse','rotation']"


def plan(name: str | Experiment, out: Path, *changes: str, measure: bool = False, **options: object) -> Plan:
    experiment = load_experiment(name, changes) if isinstance(name, str) else name
    return make_plan(Session.looking(experiment, out, measure=measure), **options)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file under a folder, with its size and time of writing."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_the_papers_evaluation_takes_its_number_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    scales = f"evaluation.scales={[20 * step for step in range(1, 17)]}"
    found = plan("gemma-2-2b", tmp_path / "none", FIVE, scales, "evaluation.prompts=['I think']", gpu="h100")
    assert found.judge.calls == 9 * 5 * 16 * 256 * 1 * 2 == 368_640
    assert found.judge.usd == pytest.approx((0.15 * found.judge.tokens.read + 0.60 * found.judge.tokens.written) / 1e6)
    assert any("OPENAI_API_KEY" in note for note in found.notes)
    once = plan("gemma-2-2b", tmp_path / "none", FIVE, "evaluation.prompts=['I think']", gpu="h100")
    assert once.judge.calls == 9 * (5 * 15 + 1) * 256 * 2, "scale 0 is written once for all methods"
    together = plan("gemma-2-2b", tmp_path / "none", FIVE, scales, "judge.calls=together", "evaluation.prompts=['I think']")
    assert together.judge.calls == found.judge.calls / 2


def test_the_papers_vectors_are_measured_only_where_that_is_asked_for(tmp_path: Path) -> None:
    published = plan("gemma-2-2b", tmp_path / "none", gpu="h100")
    assert published.left.published and published.left.vectors == 0 and "effects" not in published.seconds
    assert any("schalnev/sae-ts-effects" in note for note in published.notes)
    measured = plan("gemma-2-2b", tmp_path / "none", gpu="h100", measure=True)
    rollouts = next(part for part in measured.parts if part.what == "rollouts")
    assert measured.left.vectors == 50_000 and rollouts.items - 10 * 896 == 44_800_000
    assert measured.left.rows == 50_000 and "fit" in measured.seconds
    assert {one.what: one.size for one in measured.disk}["effects"] > 50_000 * 16_384 * 2


def test_more_nodes_take_less_time_for_the_same_work_and_cost(tmp_path: Path) -> None:
    options = {"gpu": "h100", "gpus_per_node": 8, "measure": True}
    one, eight = (plan("gemma-2-9b", tmp_path / "none", nodes=nodes, **options) for nodes in (1, 8))
    assert (one.layout.actors, eight.layout.actors) == (8, 64)
    assert one.parts == eight.parts and one.judge == eight.judge and one.disk == eight.disk
    assert one.seconds["effects"] > 4 * eight.seconds["effects"]
    assert one.total_seconds() > eight.total_seconds()
    traffic = "measured rows, to the driver"
    assert traffic not in {each.what for each in one.network} and traffic in {each.what for each in eight.network}
    assert not eight.layout.settings, "the preset's actors are as many as there is room for"
    fixed = plan("gemma-2-9b", tmp_path / "none", "execution.actors=8", nodes=8, **options)
    assert fixed.layout.actors == 64 and fixed.layout.settings == ("execution.actors=64",)


def test_an_actor_that_a_gpu_does_not_hold_is_spread_over_several(tmp_path: Path) -> None:
    fits = plan("gemma-2-9b", tmp_path / "none", gpu="a100-40gb", gpus_per_node=4)
    assert fits.layout.actors == 4 and fits.layout.memory.total() < 40e9
    spread = plan("gemma-2-9b", tmp_path / "none", "model.dtype=float32", gpu="l4", gpus_per_node=4)
    assert spread.layout.actors == 2 and 'model.device_map="balanced"' in spread.layout.settings
    assert any("does not hold" in note for note in spread.notes)
    with pytest.raises(InputError, match="an actor needs 2 GPUs of one node"):
        plan("gemma-2-9b", tmp_path / "none", "model.dtype=float32", gpu="l4")


def test_half_a_gpu_an_actor_makes_two_of_them(tmp_path: Path) -> None:
    found = plan("gemma-2-2b", tmp_path / "none", "execution.gpus_per_actor=0.5", gpu="h100", gpus_per_node=2)
    assert found.layout.actors == 4 and found.layout.actors_per_device == 2
    assert found.layout.memory.total() < 40e9


def test_actors_that_share_a_gpu_by_auto_are_planned_as_a_run_lays_them_out(tmp_path: Path) -> None:
    auto = ("execution.actors=auto", "execution.gpus_per_actor=auto")
    card = Gpu("NVIDIA L4", 24 * 10**9)
    node = Node("host", {}, 8, 64 * 2**30, (card, card), (), True, "", "", False, {"CPU": 8.0, "GPU": 2.0})
    shared = plan("tiny", tmp_path / "none", *auto, gpu="l4", gpus_per_node=2)
    assert shared.layout.actors == laid_out(load_experiment("tiny", auto), [node], None).actors == 8
    assert shared.layout.actors_per_device == 4 and shared.layout.threads == 0.25
    assert shared.layout.settings == ()
    alone = plan("tiny", tmp_path / "none", "execution.gpus_per_actor=1", gpu="l4", gpus_per_node=2)
    assert alone.layout.actors == 2 and alone.layout.threads == 1
    assert plan("gemma-2-2b", tmp_path / "none", gpu="h100").layout.actors_per_device == 1
    assert plan("gemma-2-2b", tmp_path / "none", gpu="h200").layout.actors_per_device == 2


def test_a_preset_that_needs_a_gpu_is_planned_for_the_cpu_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = plan("gemma-2-2b", tmp_path / "none")
    assert not found.layout.hardware.machine.is_gpu
    assert any("torch sees no GPU here" in note for note in found.notes)
    assert found.total_seconds() > 10 * plan("gemma-2-2b", tmp_path / "none", gpu="h100").total_seconds()


def test_vectors_that_are_shipped_are_not_measured_again(tmp_path: Path) -> None:
    live = plan("smollm2", tmp_path / "none")
    assert (live.left.vectors, live.left.blocks) == (8, 0)
    own = plan("smollm2", tmp_path / "none", measure=True)
    assert (own.left.vectors, own.left.blocks) == (8, 20)
    rows = [0, 1, live_rows()[0]]
    shipped_too = plan("smollm2", tmp_path / "none", f"effects.sources=[{{rows={rows}}}, {{kind='random', count=300}}]")
    assert (shipped_too.left.vectors, shipped_too.left.vectors_known) == (1, 302)


def test_vectors_that_the_run_has_are_not_counted(measured: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(str(measured.path), tmp_path / "run")
    changes = ["model.dtype=float32", "model.device=cpu", "effects.sources=[{kind='random', count=50}]"]
    experiment = load_experiment("tiny", changes)
    RunFolder.create(tmp_path / "run", experiment, effect_settings(experiment))
    before = files(tmp_path / "run")
    found = plan(experiment, tmp_path / "run")
    assert (found.left.vectors, found.left.vectors_known, found.left.blocks, found.left.rows) == (10, 40, 0, 50)
    other = plan("tiny", tmp_path / "run", *changes[:2], "effects.sources=[{kind='mixture', name='random', count=50}]")
    assert other.left.vectors == 50, "a source of the same name that means other vectors"
    assert files(tmp_path / "run") == before
    with pytest.raises(InputError, match=r"measured with other settings \(effects\.rollouts: 4 -> 5\)"):
        plan("tiny", tmp_path / "run", *changes, "effects.rollouts=5")


def test_the_command_prints_a_table_or_one_json_object(tmp_path: Path, capsys) -> None:
    given = ["--measure", "--gpu", "h100", "--nodes", "2", "--set", "execution.actors=1"]
    assert main(["plan", "gemma-2-2b", "--out", str(tmp_path / "none"), *given]) == 0
    printed = capsys.readouterr().out
    for words in (
        "44,808,960 rollouts",
        "50,000 rows, ridge",
        "423,936 calls",
        "data sheet",
        "--set execution.actors=2",
        "judge:",
    ):
        assert words in printed
    assert main(["plan", "gemma-2-2b", "--out", str(tmp_path / "none"), "--gpu", "h100", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["judge"]["calls"] == 423_936 and facts["left"]["published"] and facts["machine"]["origin"]
    assert facts["total_seconds"] > 0 and not os.path.exists(tmp_path / "none")
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gemma-2-2b", "--gpu", "cray"], "unknown GPU 'cray'; known: "),
        (["gemma-2-2b", "--gpu", "h100", "--nodes", "0"], "--nodes is 0; expected 1 or more"),
        (["smollm2", "--gpus-per-node", "2"], "--gpus-per-node needs the kind of GPU"),
        (["gemma-2-2b", "--measure", "--set", "effects.sources=[{start=0, stop=90000}]"], "the SAE has rows 0 to 16383"),
        (["smollm2", "--set", "effects.sources=[{kind='file', path='none.safetensors'}]"], "none.safetensors, which is no file"),
        (["smollm2", "--set", "hook_name=blocks.30.hook_resid_post"], "the model has blocks 0 to 29"),
        (["gemma-2-2b", "--set", "sae.id=layer_12/width_17k"], "unknown SAE id"),
        (["tiny", "--set", "sae.loader=folder", "--set", "sae.path=preset:smollm2/sae"], "residual stream has 32"),
        (["nowhere"], "unknown preset 'nowhere'"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(words: list[str], message: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["plan", *words, "--out", str(tmp_path / "none")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("saets: ") and message in error
