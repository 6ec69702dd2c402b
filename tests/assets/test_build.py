"""A small build from text to SAE: what each part leaves out, that it goes on where it was stopped, and what its figures mean."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import build_assets
import numpy as np
import polars as pl
import pytest
import torch
from assets import measuring, passages, quality, residuals, shipping, studies, training, writing
from assets.language_model import LanguageModel
from assets.parts import Build
from assets.plain_sae import PlainSae
from assets.settings import Settings

from saets.cli import main
from saets.distributed.cluster import Cluster
from saets.errors import InputError
from saets.experiment.config import PRESETS
from saets.experiment.loading import load_experiment
from saets.fit.approximator import Moments
from saets.forecast.evidence import evidence
from saets.run_folder.fitted import fitted
from saets.run_folder.store import RunFolder
from saets.stages.effects import measure_effects
from saets.stages.session import Session

WORDS = ("stone", "river", "lamp", "under", "often", "green", "seven", "walked", "because", "honest")
LAYER = 1

PRESET = """
name = "small"
hook_name = "blocks.1.hook_resid_post"
model = {{ name = "{model}", dtype = "float32", device = "cpu" }}
sae = {{ loader = "folder", path = "{place}/sae" }}
[effects]
prompts = ["", "I"]
rollouts = 3
length = 10
baseline_blocks = 3
loss_increase = 0.2
scale_grid = [0, 2, 4, 8, 16]
calibration_chunks = 4
calibration_length = 16
shipped = "{place}/measured"
[[effects.sources]]
rows = [3, 5]
[fit]
held_out = 0.3
[execution]
rows = 12
"""


def sentences() -> Iterator[str]:
    draw = np.random.default_rng(0)
    for _ in range(400):
        yield " ".join(draw.choice(WORDS, 20)) + "."


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Build]:
    """A build of which everything but `ship` is made, by a preset of its own that ships into a folder of its own."""
    place = tmp_path_factory.mktemp("package") / "shipped"
    preset = place.parent / "small.toml"
    preset.write_text(PRESET.format(model=tiny_folder, place=place))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(passages, "SOURCES", {"words": passages.Source(("words",), "MIT", 1.0, sentences)})
        patched.setattr(residuals, "FILE_CHUNKS", 256)
        patched.setattr(writing, "FILE_TEXTS", 50)
        patched.setattr(measuring, "PRESET", str(preset))
        patched.setattr(shipping, "PLACE", place)
        settings = Settings().replaced(
            [
                *("writing.tokens=16000", "writing.length=80"),
                *("passages.tokens=30000", "passages.chunk=40"),
                *("residuals.layers=[1, 2]", "residuals.max_norm=1e9"),
                *(f"training.layer={LAYER}", "training.d_sae=64", "training.k=8", "training.batch=256", "training.tokens=60000"),
                *("training.held_out=2048", "cards.tokens=8000", "effects.mixtures=20", "effects.random=10", "effects.rows=64"),
                *("compare.tokens=4096", "layers.rows=40", "layers.random=10", "targets.rows=40", "targets.random=10"),
                *(
                    "targets.loss_increases=[0.1, 0.3]",
                    "rollouts.tokens=800",
                    "rollouts.each=[1, 3]",
                    "rollouts.lengths=[8, 10]",
                ),
                *("rollouts.truth_vectors=6", "rollouts.truth_each=4", "rollouts.truth_length=10"),
            ]
        )
        made = Build(tmp_path_factory.mktemp("assets"), settings, build_assets.PARTS, tiny_folder)
        made.make(["cards", "effects"])
        yield made


def test_texts_begin_with_bos_and_an_opening_and_are_the_same_when_made_again(build: Build, tmp_path: Path) -> None:
    loaded = LanguageModel.load(build)
    texts = list(writing.texts(build))
    assert len(texts) == 16000 // 80
    assert all(tokens[0] == loaded.tokenizer.bos_token_id and len(tokens) == 80 for tokens, _ in texts)
    folder = build.folder("writing")
    taken = sorted(folder.glob("texts-*.npz"))[1]
    before = taken.read_bytes()
    taken.unlink()
    build_assets.PARTS["writing"].make(build, folder)
    assert taken.read_bytes() == before


def test_residuals_are_those_of_the_model_without_first_positions_and_openings(build: Build) -> None:
    loaded = LanguageModel.load(build)
    file, chunks = residuals.held_out(build, LAYER)
    found = torch.from_numpy(np.load(file)).float()
    expected = []
    for chunk in chunks:
        ids = torch.from_numpy(chunk.tokens.astype(np.int64))[None]
        hidden = loaded.model(ids, output_hidden_states=True).hidden_states[LAYER + 1]
        expected.append(hidden[0, max(2, chunk.start) :].float())
    wanted = torch.cat(expected)
    assert found.shape == wanted.shape
    assert torch.allclose(found.norm(dim=1).sort().values, wanted.norm(dim=1).sort().values, rtol=0.05)
    assert torch.allclose(found.mean(0), wanted.mean(0), atol=0.02 * wanted.norm(dim=1).mean().item())


def test_own_writing_counts_from_where_the_model_began(build: Build) -> None:
    starts = sorted(start for _, start in writing.texts(build))
    own = sorted(chunk.start for chunk in residuals.all_chunks(build) if chunk.start > 2)
    assert own == [start for start in starts if start > 2]


def test_the_sae_explains_most_of_what_it_has_not_seen(build: Build) -> None:
    facts = build.facts("sae")
    assert facts["fraction_of_variance_unexplained"] < 0.5
    assert 4 < facts["l0"] < 16
    assert set(facts["ce"]) == {"model", "sae", "zero"}
    assert not (build.folder("sae") / "checkpoints").exists()


def test_unexplained_variance_is_squared_error_over_squared_distance_from_the_mean(build: Build) -> None:
    sae = PlainSae(build.folder("sae") / "sae")
    file, _ = residuals.held_out(build, LAYER)
    x = torch.from_numpy(np.load(file)[:2048]).float()
    acts = sae.encode(x)
    unexplained = ((x - sae.decode(acts)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    facts = quality.of(build, sae, LAYER, x)
    assert facts["fraction_of_variance_unexplained"] == pytest.approx(unexplained.item(), abs=1e-3)
    assert facts["l0"] == pytest.approx((acts > 0).sum().item() / 2048, abs=0.01)
    assert facts["dead"] == int((acts.amax(0) == 0).sum())


def test_an_sae_is_trained_about_the_mean_residual_and_reads_residuals_as_they_are(build: Build) -> None:
    sae = PlainSae(build.folder("sae") / "sae")
    files = residuals.files(build, LAYER)
    mean = torch.from_numpy(np.concatenate([np.load(file) for file in files])).float().mean(0)
    assert torch.nn.functional.cosine_similarity(sae.b_dec, mean, dim=0) > 0.9
    assert (sae.b_dec - mean).norm() < 0.5 * mean.norm()


def test_a_perfect_sae_recovers_all_of_the_loss_and_one_that_gives_zero_none(build: Build) -> None:
    class Scaled:
        device = "cpu"

        def __init__(self, by: float) -> None:
            self.by = by

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return self.by * x

    whole, nothing = (quality.cross_entropies(build, Scaled(by), LAYER) for by in (1.0, 0.0))
    assert whole["sae"] == pytest.approx(whole["model"], rel=1e-3)
    assert nothing["sae"] == pytest.approx(nothing["zero"], rel=1e-6)


@pytest.mark.parametrize("kind", training.KINDS)
def test_the_plain_reader_gives_saelens_activations(build: Build, tmp_path: Path, kind: str) -> None:
    from sae_lens import SAE

    some = replace(build.settings.training, kind=kind, tokens=2048)
    training.trained(build, some, tmp_path)
    theirs: Any = SAE.load_from_disk(str(tmp_path / "sae"), device="cpu").float()
    ours = PlainSae(tmp_path / "sae")
    x = torch.from_numpy(np.load(residuals.files(build, LAYER)[0])[:100]).float()
    assert torch.allclose(ours.encode(x), theirs.encode(x), atol=1e-4 * x.norm(dim=1).max().item())
    assert torch.allclose(ours.decode(ours.encode(x)), theirs.decode(theirs.encode(x)), atol=1e-3)


def test_jumprelu_comes_near_the_latents_it_is_told_to_reach(build: Build, tmp_path: Path) -> None:
    facts = training.trained(build, replace(build.settings.training, kind="jumprelu"), tmp_path)
    assert 4 < facts["l0"] < 16, "told to reach 8 of 64"


def test_an_sae_is_trained_on_no_fewer_tokens_than_asked_for(build: Build, tmp_path: Path) -> None:
    assert training.trained(build, replace(build.settings.training, tokens=2049), tmp_path)["tokens"] == 2048 + 256


def test_an_sae_whose_figures_were_not_taken_is_not_trained_again(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = replace(build.settings.training, tokens=2048)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(quality, "of", stop)
        training.trained(build, some, tmp_path)
    weights = (tmp_path / "sae" / "sae_weights.safetensors").stat().st_mtime_ns
    assert training.trained(build, some, tmp_path)["tokens"] == 2048
    assert (tmp_path / "sae" / "sae_weights.safetensors").stat().st_mtime_ns == weights


def test_training_that_was_stopped_goes_on_from_its_last_checkpoint(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.trained(build, build.settings.training, tmp_path / "whole")
    taken = itertools.count()
    give = training.Batches.__next__

    def stop_once(batches: training.Batches) -> torch.Tensor:
        if next(taken) == 150:
            raise KeyboardInterrupt
        return give(batches)

    monkeypatch.setattr(training.Batches, "__next__", stop_once)
    with pytest.raises(KeyboardInterrupt):
        training.trained(build, build.settings.training, tmp_path / "stopped")
    assert any((tmp_path / "stopped" / "checkpoints").iterdir())
    again: Mapping[str, Any] = training.trained(build, build.settings.training, tmp_path / "stopped")
    assert again["fraction_of_variance_unexplained"] == pytest.approx(whole["fraction_of_variance_unexplained"], abs=0.01)
    assert next(taken) < 150 + 60000 // 256


ELSEWHERE = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import pickle
from pathlib import Path
import build_assets
from assets import passages
from assets.parts import Build
passages.SOURCES = {{"words": passages.Source(("words",), "MIT", 1.0, list)}}
settings, preset, work, weights = pickle.loads(bytes.fromhex(sys.argv[1]))
build = Build(work, settings, build_assets.PARTS, weights)
"""
"""As on a machine that lacks some packages, to which the work folder was carried."""


def elsewhere(build: Build, code: str, *blocked: str) -> None:
    """Run code there."""
    given = pickle.dumps((build.settings, measuring.PRESET, build.work, build.weights)).hex()
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE.format(blocked=blocked) + code, given],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(build_assets.__file__).parent)},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_cards_and_effects_need_neither_ray_nor_saelens_nor_transformerlens(build: Build) -> None:
    places = {part: build.work / "elsewhere" / part for part in ("cards", "effects")}
    for place in places.values():
        place.mkdir(parents=True)
    code = "from assets import measuring\nmeasuring.PRESET = preset\n"
    code += "for part in ('cards', 'effects'): build.parts[part].make(build, work / 'elsewhere' / part)"
    elsewhere(build, code, "ray", "sae_lens", "transformer_lens")
    there, here = (list(measuring.measurements(folder)) for folder in (places["effects"], build.folder("effects")))
    assert [one.item.vector_id for one in there] == [one.item.vector_id for one in here]
    assert np.allclose(np.stack([one.mean for one in there]), np.stack([one.mean for one in here]), atol=1e-3)


def test_residuals_need_only_torch_and_transformers(build: Build) -> None:
    changed = Build(build.work, build.settings.replaced(["residuals.layers=[1]"]), build.parts, build.weights)
    names = ("pydantic", "jaxtyping", "transformer_lens", "sae_lens", "ray", "polars", "pyarrow", "psutil")
    elsewhere(changed, "build.make(['residuals'])", *names)
    assert changed.is_made("residuals")
    assert changed.facts("residuals")["tokens"] == build.facts("residuals")["tokens"]


def test_a_card_tells_where_a_feature_fires_most_and_how_often(build: Build) -> None:
    cards = pl.read_parquet(build.folder("cards") / "cards.parquet")
    loaded, sae = LanguageModel.load(build), PlainSae(build.folder("sae") / "sae")
    found = list(writing.texts(build))[: 8000 // 80]
    texts = [tokens.astype(np.int64) for tokens, _ in found]
    own = torch.tensor([[position >= max(2, start) for position in range(80)] for _, start in found])
    acts = sae.encode(residuals.at_layers(loaded.model, torch.from_numpy(np.stack(texts)), [LAYER])[LAYER].float())
    acts = acts * own[:, :, None]
    density = ((acts > 0).sum((0, 1)) / own.sum()).numpy()
    assert np.allclose(cards["density"], density, atol=1e-3)
    feature = int(density.argmax())
    peaks = acts[:, :, feature].amax(1)
    contexts = cards["contexts"][feature].to_list()
    assert [context["activation"] for context in contexts] == pytest.approx(peaks.topk(5).values.tolist(), rel=1e-2)
    text = int(peaks.argmax())
    at = int(acts[text, :, feature].argmax())
    assert contexts[0]["token"] == loaded.tokenizer.decode([texts[text][at]])
    assert contexts[0]["before"] == loaded.tokenizer.decode(texts[text][max(1, at - 12) : at].tolist())


def test_top_tokens_are_those_whose_logits_a_decoder_row_raises_most(build: Build) -> None:
    loaded, sae = LanguageModel.load(build), PlainSae(build.folder("sae") / "sae")
    logits = loaded.model.lm_head.weight.float() @ (loaded.model.model.norm.weight.float() * sae.W_dec[7])
    best = loaded.tokenizer.decode([int(logits.argmax())])
    assert pl.read_parquet(build.folder("cards") / "cards.parquet")["top_tokens"][7][0] == best


def test_effects_are_of_all_decoder_rows_but_those_measured_live_of_mixtures_and_of_random_vectors(build: Build) -> None:
    found = [one.item for one in measuring.measurements(build.folder("effects"))]
    assert Counter(item.source for item in found) == {"baseline": 3, "decoder": 62, "mixture": 20, "random": 10}
    assert {item.index for item in found if item.source == "decoder"} == set(range(64)) - {3, 5}


@pytest.fixture(scope="module")
def shipped(build: Build) -> Path:
    build.make(["ship"])
    return shipping.PLACE


def test_what_is_shipped_are_sums_of_some_rows_the_others_and_the_scales_of_all(build: Build, shipped: Path) -> None:
    found = list(measuring.measurements(build.folder("effects")))
    baseline = np.mean([one.mean for one in found if one.item.source == "baseline"], axis=0)
    vectors = {one.item.vector_id: one for one in found if one.item.source != "baseline"}
    held_out = pl.read_parquet(shipped / "measured" / "effects" / "rows.parquet")
    summed = pl.read_parquet(shipped / "measured" / "effects" / "summed" / "rows.parquet")
    assert set(held_out["vector_id"]) | set(summed["vector_id"]) == set(vectors)
    assert not set(held_out["vector_id"]) & set(summed["vector_id"])
    assert (
        dict(zip(summed["vector_id"], summed["scale"], strict=True)).items()
        <= {name: one.calibration.scale for name, one in vectors.items()}.items()
    )
    X = np.stack([vectors[name].item.direction for name in summed["vector_id"]]).astype(np.float64)
    Y = np.stack([vectors[name].mean - baseline for name in summed["vector_id"]]).astype(np.float64)
    moments = Moments.load(shipped / "measured" / "moments.safetensors")
    assert moments.rows.item() == len(X)
    assert np.allclose(moments.xy.numpy(), X.T @ Y, rtol=1e-5, atol=1e-5 * np.abs(X.T @ Y).max())
    assert np.allclose(moments.xx.numpy(), X.T @ X, rtol=1e-5, atol=1e-6)


def test_links_name_the_strongest_causes_and_effects(build: Build, shipped: Path) -> None:
    found = list(measuring.measurements(build.folder("effects")))
    baseline = np.mean([one.mean for one in found if one.item.source == "baseline"], axis=0)
    rows = {one.item.index: one.mean - baseline for one in found if one.item.source == "decoder"}
    links = pl.read_parquet(shipped / "links.parquet")
    strongest = int(np.abs(rows[7]).argmax())
    assert links["effects"][7][0] == {"feature": strongest, "effect": pytest.approx(float(rows[7][strongest]), rel=1e-4)}
    assert links["causes"][7][0]["feature"] == max(rows, key=lambda row: abs(rows[row][7]))
    assert links["effects"][3] is None


def test_checksums_and_the_card_are_of_what_is_shipped(build: Build, shipped: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=shipped, check=True)
    names = {line.split("  ")[1] for line in (shipped / "SHA256SUMS").read_text().splitlines()}
    assert names == {path.relative_to(shipped).as_posix() for path in shipped.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    card = (shipped / "README.md").read_text()
    assert "| words | words | MIT |" in card
    recorded = json.loads((shipped / "build.json").read_text())
    assert recorded["sae"] == build.facts("sae")
    assert recorded["writing"]["settings"]["subject"]["seed"] == build.settings.subject.seed
    assert f"{build.facts('sae')['l0']} latents a token" in card


def test_checksums_in_the_package_are_of_what_is_there_and_it_is_not_too_large() -> None:
    place = PRESETS / "smollm2"
    named = dict(reversed(line.split("  ")) for line in (place / "SHA256SUMS").read_text().splitlines())
    assert shipping.checksums(place) == named
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) <= shipping.MOST_BYTES


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"training.kind": "topj"}, "unknown kind of SAE 'topj'"),
        ({"training.layer": "3"}, r"training.layer is 3, and residuals.layers \[1, 2\]"),
        ({"residuals.layers": "[1, 40]"}, r"residuals.layers is \[1, 40\]; expected some of the model's blocks 0 to 3"),
        ({"training.layer": "2"}, "the preset steers at blocks.1.hook_resid_post, the SAE reads blocks.2"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_made(
    build: Build, tmp_path: Path, changed: dict[str, str], said: str
) -> None:
    settings = build.settings.replaced([f"{key}={value}" for key, value in changed.items()])
    with pytest.raises(InputError, match=said):
        Build(tmp_path, settings, build_assets.PARTS, build.weights).make(["ship"])
    assert list(tmp_path.iterdir()) == []


def test_kinds_layers_and_widths_are_compared_on_fewer_tokens(build: Build) -> None:
    build.make(["compare"])
    found = build.facts("compare")["variants"]
    names = {"topk-layer1-64", "batch_topk-layer1-64", "jumprelu-layer1-64", "topk-layer2-64", "topk-layer1-128"}
    assert found.keys() == names
    assert all(report["tokens"] == 4096 for report in found.values())
    assert found["topk-layer2-64"]["layer"] == 2


def test_layers_and_targets_are_compared_by_fits_to_the_same_rows(build: Build) -> None:
    build.make(["layers", "targets"])
    assert build.facts("layers")["fits"].keys() == {"layer 1", "layer 2"}
    by_target = build.facts("targets")["fits"]
    assert by_target["loss increase 0.1"]["capped"] < by_target["loss increase 0.3"]["capped"]
    assert all(report["vectors"] == 50 and report["r2"] < 1 for report in by_target.values())


def test_rollouts_are_compared_at_the_same_number_of_tokens(build: Build) -> None:
    build.make(["rollouts"])
    found = build.facts("rollouts")["fits"]
    assert {name: report["vectors"] for name, report in found.items()} == {
        "2 rollouts of 8 tokens": 800 // (2 * 8),
        "2 rollouts of 10 tokens": 800 // (2 * 10),
        "6 rollouts of 8 tokens": 800 // (6 * 8),
        "6 rollouts of 10 tokens": 800 // (6 * 10),
    }
    truth, baseline = studies.parted(list(measuring.measurements(build.folder("rollouts") / "truth")))
    assert {one.n_tokens for one in truth} == {2 * 4 * 10}
    changes = np.stack([one.mean - baseline.mean for one in truth])
    assert found["6 rollouts of 10 tokens"]["mse_zero"] == pytest.approx(float(np.square(changes).mean()), rel=1e-4)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray session, which the commands find."""
    with Cluster(load_experiment("tiny").execution) as started:
        started.connect()
        yield


@pytest.fixture(scope="module")
def measured_live(cluster: None, shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the preset after `saets effects`."""
    out = tmp_path_factory.mktemp("live") / "run"
    assert main(["effects", measuring.PRESET, "--out", str(out)]) == 0
    return out


@pytest.fixture
def live(measured_live: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(measured_live, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))


def fit_of(run: Path) -> dict[str, Any]:
    assert main(["fit", measuring.PRESET, "--out", str(run)]) == 0
    return json.loads((run / "fit.json").read_text())


@pytest.mark.ray
def test_a_run_measures_only_what_is_not_shipped_and_fits_it_with_the_sums(live: Path) -> None:
    report = fit_of(live)
    assert (report["rows_own"], report["rows_shipped"]) == (2, 92)
    assert report["rows_train"] + report["rows_held_out"] == 94


@pytest.mark.ray
def test_without_a_fit_a_run_has_the_approximator_that_one_would_give(live: Path) -> None:
    run, experiment = RunFolder(live), load_experiment(measuring.PRESET)
    here = fitted(run, experiment)
    report = fit_of(live)
    found = fitted(run, experiment)
    assert (bool(here.here), found.here) == (True, None)
    assert {key: here.report[key] for key in ("rows_train", "rows_held_out", "penalty")}.items() <= report.items()
    assert here.report["held_out"]["r2"] == pytest.approx(report["held_out"]["r2"], rel=1e-4)
    assert torch.allclose(here.approximator.M, found.approximator.M, rtol=1e-4, atol=1e-6)
    behind = [evidence(run, experiment, fit) for fit in (here, found)]
    assert torch.allclose(*(each.leverages for each in behind))
    assert behind[0].record().vectors == report["rows_held_out"]


@pytest.mark.ray
def test_a_vector_of_the_sums_that_was_measured_again_counts_once(shipped: Path, tmp_path: Path, cluster: None) -> None:
    summed = pl.read_parquet(shipped / "measured" / "effects" / "summed" / "rows.parquet").filter(pl.col("source") == "decoder")
    experiment = load_experiment(measuring.PRESET, [f"effects.sources=[{{rows=[3, 5, {summed['index'][0]}]}}]"])
    with Session.open(experiment, tmp_path, measure=True) as session:
        measure_effects(session)
    assert len(RunFolder(tmp_path).effects.ids()) == 3
    report = fit_of(tmp_path)
    assert (report["rows_own"], report["rows_shipped"]) == (2, 92)
    assert report["rows_train"] + report["rows_held_out"] == 94


@pytest.mark.ray
def test_sums_of_other_rows_or_of_another_sae_are_refused(shipped: Path, live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named, manifest = shipped / "measured" / "effects" / "summed" / "rows.parquet", shipped / "measured" / "manifest.json"
    for path, damaged, said in (
        (named, lambda: pl.read_parquet(named)[1:].write_parquet(named), "rows, "),
        (manifest, lambda: manifest.write_text(manifest.read_text().replace('"sae_hash": "', '"sae_hash": "0')), "other weights"),
    ):
        before = path.read_bytes()
        damaged()
        assert main(["fit", measuring.PRESET, "--out", str(live)]) == 2
        path.write_bytes(before)
        assert said in capsys.readouterr().err
