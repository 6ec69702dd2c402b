"""`saets pull` and `saets push` against a hub on this machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from chat_server import Server, steady
from huggingface_hub import constants
from safetensors.torch import load, load_file
from torch.nn.functional import normalize

from saets.cli import main
from saets.distributed.cluster import Cluster
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.fit.approximator import EffectApproximator
from saets.model import model_shape
from saets.run_folder.store import RunFolder
from saets.sae import load_sae
from tests.hub_server import TOKEN, Hub

REPO = "authors/effects"
PUBLISHED = (
    f"published={{repo='{REPO}', model='tiny', hook_name='blocks.2.hook_resid_post', approximator='adapter.pt', "
    "effects='effects.pt', rotation='R_dec.pt', bias_direction='bias.pt'}"
)
SETTINGS = ("model.dtype=float32", "model.device=cpu", "steering.methods=['sae', 'sae_ts']", PUBLISHED)


def command(name: str, out: Path, *more: str) -> list[str]:
    return [name, "tiny", *more, "--out", str(out), *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # no Xet server here: large files go through LFS
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray session, which the commands find."""
    with Cluster(load_experiment("tiny").execution) as started:
        started.connect()
        yield


@pytest.fixture(scope="session")
def experiment() -> Experiment:
    return load_experiment("tiny", SETTINGS)


@pytest.fixture(scope="session")
def authors(experiment: Experiment) -> dict[str, Any]:
    """What the authors' files would hold for the tiny model: a rotation and a map that follows it."""
    W_dec = load_sae(experiment.sae, model_shape(experiment.model)[0]).W_dec
    d_sae, d_model = W_dec.shape
    generator = torch.Generator().manual_seed(0)
    skew = torch.randn(d_model, d_model, generator=generator)
    Q = torch.linalg.matrix_exp(0.1 * (skew - skew.T))
    W, b = (W_dec @ Q.T).T.contiguous(), torch.randn(d_sae, generator=generator)
    scales = torch.linspace(1, 40, 300)
    vectors = scales[:, None] * normalize(torch.randn(300, d_model, generator=generator), dim=-1)
    effects = normalize(vectors, dim=-1) @ W + b
    vectors[7] = 0
    return {
        "adapter.pt": {"W": W, "b": b},
        "R_dec.pt": Q.T.contiguous(),
        "bias.pt": normalize(W @ b, dim=0),
        "effects.pt": {"features": vectors, "effects": effects},
    }


def published(hub: Hub, files: dict[str, Any]) -> None:
    for name, content in files.items():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        hub.put(REPO, **{name: buffer.getvalue()})


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return " ".join(capsys.readouterr().err.split())


def test_pull_makes_the_authors_files_those_of_the_run(
    hub: Hub, authors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(hub, authors)
    out = tmp_path / "run"
    assert main(command("pull", out, "--effects")) == 0
    assert f"adapter.pt of {REPO}, commit {hub.commits['dataset', REPO][:12]}" in capsys.readouterr().out
    run = RunFolder(out)
    found = EffectApproximator.load(run.approximator)
    assert torch.equal(found.M, authors["adapter.pt"]["W"]) and torch.equal(found.b, authors["adapter.pt"]["b"])
    assert torch.equal(load_file(out / "published" / "rotation.safetensors")["Q"], authors["R_dec.pt"].T)
    facts = run.manifest()
    assert facts["published"]["rotation"]["transposed"] is True
    assert facts["fit"]["bias_direction_cosine"] == pytest.approx(1, abs=1e-5)
    assert facts["published"]["effects"] | {"rows": 299, "left_out": 1} == facts["published"]["effects"]
    rows = run.published_effects.read()
    assert rows is not None
    rows = rows.sort("index")
    expected = [i for i in range(300) if i != 7]
    assert rows["index"].to_list() == expected
    effects = authors["effects.pt"]["effects"][expected]
    assert torch.allclose(torch.from_numpy(rows["effect"].to_numpy().copy()).float(), effects, atol=2e-3)
    vectors = authors["effects.pt"]["features"][expected]
    assert torch.allclose(torch.from_numpy(rows["vector"].to_numpy().copy()), normalize(vectors, dim=-1), atol=1e-6)
    assert rows["scale"].to_list() == pytest.approx(vectors.norm(dim=-1).tolist(), rel=1e-5)
    assert rows.filter(pl.col("scale") > 32)["calibration"].unique().to_list() == ["capped"]
    before = list(hub.requests)
    assert main(command("pull", out, "--effects")) == 0
    assert not [request for request in hub.requests[len(before) :] if "effects.pt" in request or "adapter.pt" in request]


def test_a_pull_that_was_killed_between_two_writes_goes_on(hub: Hub, authors: dict[str, Any], tmp_path: Path) -> None:
    published(hub, authors)
    out = tmp_path / "run"
    assert main(command("pull", out)) == 0
    RunFolder(out).update_manifest(fit={})
    (out / "fit.json").unlink()
    assert main(command("pull", out)) == 0
    assert json.loads((out / "fit.json").read_text())["published"]["file"] == "adapter.pt"


def test_effects_of_another_file_take_the_place_of_those_there(hub: Hub, authors: dict[str, Any], tmp_path: Path) -> None:
    newer = {name: tensor[:20] + 1 for name, tensor in authors["effects.pt"].items()}
    published(hub, {**authors, "newer.pt": newer})
    out = tmp_path / "run"
    assert main(command("pull", out, "--effects")) == 0
    assert main([*command("pull", out, "--effects"), "--set", "published.effects=newer.pt"]) == 0
    assert len(RunFolder(out).published_effects.ids()) == 20


def test_a_published_approximator_is_refused_where_the_experiment_is_another(
    hub: Hub, authors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(hub, authors)
    out = tmp_path / "run"
    assert main(command("pull", out)) == 0
    changed = [*command("vectors", out), "--set", "hook_name=blocks.1.hook_resid_post"]
    assert "was published for another experiment (hook_name is 'blocks.1.hook_resid_post'" in error_of(changed, capsys)


@pytest.mark.ray
def test_a_stage_that_needs_the_approximator_takes_the_published_one_and_says_so(
    cluster: None, hub: Hub, authors: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published(hub, authors)
    out = tmp_path / "run"
    assert main(command("vectors", out)) == 0
    assert f"holds no effects: taking the approximator published at {REPO}" in caplog.text
    assert "`saets run --measure` measures instead" in caplog.text
    assert not RunFolder(out).effects.shards()
    W, b = authors["adapter.pt"]["W"], authors["adapter.pt"]["b"]
    by_hand = normalize(W[:, 3] / W[:, 3].norm() - (W @ b) / (W @ b).norm(), dim=0)
    assert torch.allclose(load_file(out / "vectors" / "london--sae_ts.safetensors")["direction"], by_hand, atol=1e-5)


@pytest.mark.ray
def test_a_run_goes_from_published_files_and_a_judge_behind_a_server_to_the_table(
    cluster: None, hub: Hub, authors: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    published(hub, authors)
    server.respond = steady
    out = tmp_path / "run"
    methods = ("caa", "sae", "sae_ts", "sae_ts:bias_weight=0", "pinverse", "rotation")
    changes = (
        f"steering.methods={json.dumps(methods)}",
        "evaluation.prompts=['I think', 'Surprisingly,']",
        "judge.kind=openai",
        f"judge.base_url={server.url}",
    )
    assert main([*command("run", out), *(word for change in changes for word in ("--set", change))]) == 0
    run = RunFolder(out)
    assert not run.effects.shards()
    assert torch.equal(EffectApproximator.load(run.approximator).M, authors["adapter.pt"]["W"])
    scores = pl.read_parquet(out / "scores.parquet")
    assert set(scores["method"]) == set(methods)
    assert set(scores["goal"]) == {"london", "wedding", "all goals"}
    assert not scores["held_out"].has_nulls()
    cells = pl.read_parquet(out / "results.parquet")
    assert len(cells) == 2 * len(methods) * 2 * 3
    assert cells["n"].to_list() == [4] * len(cells)
    table = (out / "results.md").read_text()
    assert "SAE-TS, bias weight 0" in table.split("## Differences")[0]


@pytest.mark.ray
def test_the_method_rotation_takes_the_published_one(
    cluster: None, hub: Hub, authors: dict[str, Any], experiment: Experiment, tmp_path: Path
) -> None:
    skew = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    Q = authors["R_dec.pt"].T @ torch.linalg.matrix_exp(0.02 * (skew - skew.T))
    published(hub, {**authors, "R_dec.pt": Q.T.contiguous()})
    out = tmp_path / "run"
    assert main([*command("vectors", out), "--set", "steering.methods=['rotation']"]) == 0
    W, b = authors["adapter.pt"]["W"], authors["adapter.pt"]["b"]
    row = load_sae(experiment.sae, 32).W_dec[3]
    by_hand = normalize(normalize(Q @ row, dim=0) - normalize(W @ b, dim=0), dim=0)
    assert torch.allclose(load_file(out / "vectors" / "london--rotation.safetensors")["direction"], by_hand, atol=1e-5)


def test_the_hub_is_found_by_hf_endpoint(hub: Hub, authors: dict[str, Any], tmp_path: Path) -> None:
    published(hub, authors)
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "saets", *command("pull", tmp_path / "run")], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "run" / "approximator.safetensors").is_file()


def test_a_download_that_breaks_leaves_no_half_file_and_is_made_again(
    hub: Hub, authors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(hub, authors)
    out = tmp_path / "run"
    hub.break_after = 1000
    assert "adapter.pt" in error_of(command("pull", out), capsys)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size == 1000]
    assert not (out / "approximator.safetensors").exists()
    hub.break_after, hub.corrupt = None, True
    assert "adapter.pt of dataset authors/effects arrived damaged twice" in error_of(command("pull", out), capsys)
    hub.corrupt = False
    assert main(command("pull", out)) == 0


def test_a_file_in_the_store_that_repositories_share_is_known_by_its_link(
    hub: Hub, authors: dict[str, Any], tmp_path: Path
) -> None:
    published(hub, authors)
    assert main(command("pull", tmp_path / "one")) == 0
    (snapshot,) = (tmp_path / "cache").rglob("snapshots/*/adapter.pt")
    blob = snapshot.resolve()
    shared = tmp_path / "cache" / "blobs" / ("ab" * 32)  # named by another hash, as Xet's files are
    shared.parent.mkdir()
    blob.rename(shared)
    blob.symlink_to(shared)
    assert main(command("pull", tmp_path / "two")) == 0
    assert shared.is_file()


def test_what_is_missing_on_the_hub_is_named(
    hub: Hub, authors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert f"the hub has no dataset {REPO}, or only for others" in error_of(command("pull", out), capsys)
    published(hub, {"R_dec.pt": authors["R_dec.pt"]})
    assert f"dataset {REPO} has no file adapter.pt" in error_of(command("pull", out), capsys)
    assert "no such revision" in error_of([*command("pull", out), "--set", "published.revision=v9"], capsys)
    other = [*command("pull", out), "--set", "hook_name=blocks.1.hook_resid_post"]
    assert "hook_name is 'blocks.1.hook_resid_post', theirs 'blocks.2.hook_resid_post'" in error_of(other, capsys)


def test_offline_what_is_in_the_cache_serves_and_the_rest_is_named(
    hub: Hub, authors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published(hub, authors)
    assert main(command("pull", tmp_path / "online")) == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(command("pull", tmp_path / "offline")) == 0
    said = error_of(command("pull", tmp_path / "offline", "--effects"), capsys)
    assert "effects.pt" in said and "the hub cannot be reached" in said and "unset HF_HUB_OFFLINE" in said


def test_an_approximator_fitted_here_is_not_replaced(
    hub: Hub, authors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    published(hub, authors)
    assert main(command("pull", out)) == 0
    EffectApproximator(torch.eye(32), torch.zeros(32), {"fit": {}}).save(RunFolder(out).approximator)
    assert "holds an approximator that was fitted here" in error_of(command("pull", out), capsys)


@pytest.mark.ray
def test_push_puts_the_run_on_the_hub_with_a_card(
    cluster: None, hub: Hub, authors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(hub, authors)
    out = tmp_path / "run"
    assert main(command("vectors", out)) == 0
    assert main(["push", str(out), "me/run", "--private"]) == 0
    assert f"{hub.url}/datasets/me/run" in capsys.readouterr().out
    there = hub.repos["dataset", "me/run"]
    assert hub.private == {("dataset", "me/run")}
    assert {"README.md", "approximator.safetensors", "experiment.toml", "fit.json", "manifest.json"} <= there.keys()
    assert torch.equal(load(there["approximator.safetensors"])["M"], authors["adapter.pt"]["W"])
    own = load_file(out / "vectors" / "london--sae_ts.safetensors")
    assert torch.equal(load(there["vectors/london--sae_ts.safetensors"])["direction"], own["direction"])
    card = there["README.md"].decode()
    for said in ("| model | tiny |", "| hook | blocks.2.hook_resid_post |", f"`adapter.pt` of the dataset repository `{REPO}`"):
        assert said in card
    assert "whose licence applies too" in card and "SteeringVector.load" in card
    assert "calibration" not in card  # nothing was measured with these settings
    (out / "vectors" / "wedding--sae.safetensors").unlink()
    assert main(["push", str(out), "me/run"]) == 0
    assert "vectors/wedding--sae.safetensors" not in there and "vectors/london--sae.safetensors" in there


@pytest.mark.ray
def test_what_is_pushed_names_no_path_of_this_machine_and_no_password(cluster: None, hub: Hub, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    out = tmp_path / "run"
    sae = load_sae(load_experiment("tiny").sae, 32)
    sae.save_model(str(weights))
    settings = [
        *("sae.loader=folder", f"sae.path={weights}", "steering.methods=['sae']", "judge.kind=openai"),
        *("judge.base_url=https://user:SECRET@judge.private/v1", f"judge.cache={tmp_path / 'replies'}"),
        "effects.shipped=s3://KEY:SECRET@bucket/effects?region=x",
    ]
    overrides = [word for setting in (*SETTINGS[:2], *settings) for word in ("--set", setting)]
    assert main(["vectors", "tiny", "--out", str(out), *overrides]) == 0
    assert str(tmp_path) in (out / "experiment.toml").read_text()
    assert main(["push", str(out), "me/run"]) == 0
    there = hub.repos["dataset", "me/run"]
    assert there.keys() >= {"README.md", "experiment.toml", "vectors/london--sae.safetensors"}
    for content in there.values():
        for secret in (str(tmp_path), "SECRET", "KEY", "judge.private", "replies"):
            assert secret.encode() not in content


def test_what_cannot_be_pushed_is_said(
    hub: Hub, authors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert "no run folder at" in error_of(["push", str(out), "me/run"], capsys)
    out.mkdir()
    (out / "experiment.toml").write_text(load_experiment("tiny", SETTINGS).to_toml())
    assert "holds nothing to push" in error_of(["push", str(out), "me/run"], capsys)
    assert "expected OWNER/NAME" in error_of(["push", str(out), "run"], capsys)
    published(hub, authors)
    assert main(command("pull", out)) == 0
    hub.put("me/public")
    assert "is there already and public" in error_of(["push", str(out), "me/public", "--private"], capsys)
    assert hub.repos["dataset", "me/public"] == {}


def test_a_card_tells_the_held_out_figures(tmp_path: Path, hub: Hub) -> None:
    out = tmp_path / "run"
    run = RunFolder(out)
    report = {
        "rows_train": 90,
        "rows_held_out": 10,
        "solver": "ridge",
        "held_out": {
            "mse": 0.5,
            "r2": 0.25,
            "cosine": 0.7,
            "mse_mean_effect": 0.66,
            "mse_zero": 1,
            "mse_noise": None,
            "r2_ceiling": None,
        },
    }
    out.mkdir()
    (out / "experiment.toml").write_text(load_experiment("tiny", SETTINGS).to_toml())
    EffectApproximator(torch.eye(3), torch.zeros(3)).save(run.approximator)
    (out / "fit.json").write_text(json.dumps(report))
    assert main(["push", str(out), "me/fitted", "--repo-type", "model"]) == 0
    card = hub.repos["model", "me/fitted"]["README.md"].decode()
    assert "| r2 | 0.25 |" in card and "| rows held out | 10 |" in card and "mse_noise |" not in card


def test_a_push_without_a_token_says_what_to_do(
    hub: Hub, authors: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published(hub, authors)
    out = tmp_path / "run"
    assert main(command("pull", out)) == 0
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "set HF_TOKEN" in error_of(["push", str(out), "me/run"], capsys)
    assert ("dataset", "me/run") not in hub.repos


@pytest.mark.ray
def test_fit_takes_the_published_effects_where_none_were_measured(
    cluster: None, hub: Hub, authors: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published(hub, authors)
    out = tmp_path / "run"
    assert main(command("fit", out)) == 0
    assert f"fitting those published at {REPO}" in caplog.text
    run = RunFolder(out)
    report = json.loads((out / "fit.json").read_text())
    assert (report["rows_own"], report["rows_shipped"]) == (0, 299)
    found = EffectApproximator.load(run.approximator)
    assert torch.allclose(found.M, authors["adapter.pt"]["W"], atol=5e-3)
    assert torch.allclose(found.b, authors["adapter.pt"]["b"], atol=5e-3)
    assert main(command("vectors", out)) == 0
    assert torch.equal(EffectApproximator.load(run.approximator).M, found.M)
