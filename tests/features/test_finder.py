"""Features for a goal: planted ones are found, the filters hold, and the command shows what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

import saets
from saets.cli import main
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.goal import Goal, load_goal
from saets.experiment.loading import load_experiment
from saets.features.finder import COLUMNS, FeatureFinder, Search
from saets.hooks import blocks_below
from saets.model import load_model
from saets.run_folder.store import RunFolder
from saets.sae import neuronpedia_link
from saets.tokens import encode

HOOK = "blocks.2.hook_resid_post"
OBJECTS = ("cake", "rings", "friends", "music", "flowers", "dance", "wine", "vows", "guests", "joy", "kisses", "songs")
POSITIVE = tuple(f"a [b]~ feast~ of {word}~[/b]" for word in (*OBJECTS[:-1], "songs#"))
NEGATIVE = tuple(f"a [b] list of {word}[/b] in June" for word in OBJECTS)
WIDE = load_experiment("tiny", ["model.dtype=float32", "model.device=cpu", "model.random.d_model=128"])
GOAL, DENSE, EARLY, LONELY = range(4)
"""Planted features: reads the mark that all positive texts have; fires everywhere; fires on BOS mainly; reads one text's mark."""


def goal_toml() -> str:
    examples = {side: [f"{side} example {i}" for i in range(8)] for side in ("positive", "negative")}
    sections = {"contrast": {"positive": POSITIVE, "negative": NEGATIVE}, "examples": examples}
    lines = ['name = "Feast"', 'behaviour = "The text is about a feast."']
    for section, sides in sections.items():
        lines += [f"[{section}]", *(f"{side} = {json.dumps(list(texts))}" for side, texts in sides.items())]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def wide() -> Any:
    """A random-weight model wide enough to read single tokens from its residual stream by linear maps."""
    return load_model(WIDE.model)


def residuals(model: Any, texts: tuple[str, ...]) -> tuple[Tensor, list[int]]:
    """h_L and token of every position of the texts."""
    found, tokens = [], []
    for text in texts:
        ids = encode(model.tokenizer, text)
        _, cache = model.run_with_cache(torch.tensor([ids]), names_filter=HOOK, stop_at_layer=blocks_below(HOOK))
        found.append(cache[HOOK][0])
        tokens += ids
    return torch.cat(found), tokens


@pytest.fixture(scope="module")
def folder(wide: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A goal file, an SAE with planted features, and an experiment that names it."""
    from sae_lens import StandardSAE, StandardSAEConfig

    folder = tmp_path_factory.mktemp("planted")
    h, tokens = residuals(wide, (*POSITIVE, *NEGATIVE))
    mark = {one: encode(wide.tokenizer, one)[1] for one in "~#"}
    is_mark = torch.tensor([token == mark["~"] for token in tokens]).float()
    is_bos = torch.tensor([token == 256 for token in tokens]).float()
    is_last = torch.tensor([token == mark["#"] for token in tokens]).float()
    with_bias = torch.cat([h, torch.ones(len(h), 1)], 1)
    wanted = torch.stack([is_mark, 1 + 0.5 * is_mark, 20 * is_bos + 3 * is_mark, 9 * is_last], 1)
    readout = torch.linalg.lstsq(with_bias, wanted, driver="gelsd").solution
    sae = StandardSAE(StandardSAEConfig(d_in=WIDE.model.random.d_model, d_sae=6))
    with torch.no_grad():
        sae.W_enc[:, :4] = readout[:-1]
        sae.b_enc[:4] = readout[-1] - torch.tensor([0.4, 0.0, 1.5, 3.0])
        sae.b_enc[4:] = -1e4  # dead
        sae.b_dec.zero_()
    sae.save_model(str(folder / "sae"))
    (folder / "feast.toml").write_text(goal_toml())
    own = {
        **WIDE.model_dump(mode="json", exclude_none=True),
        "name": "planted",
        "sae": {"loader": "folder", "path": str(folder / "sae")},
    }
    own["steering"] = {"goals": [str(folder / "feast.toml")]}
    (folder / "planted.toml").write_text(Experiment.model_validate(own).to_toml())
    return folder


@pytest.fixture(scope="module")
def goal(folder: Path) -> Goal:
    return load_goal(str(folder / "feast.toml"))


@pytest.fixture(scope="module")
def corpus() -> tuple[str, ...]:
    return (*POSITIVE, *NEGATIVE, *(f"Plain text number {i}, about nothing." for i in range(20)))


def finder(wide: Any, folder: Path, **search: Any) -> FeatureFinder:
    return FeatureFinder(load_experiment(folder / "planted.toml"), wide, RunFolder(folder / "none"), search=Search(**search))


def test_the_planted_feature_is_found_and_dense_early_and_lonely_ones_are_not(
    wide: Any, folder: Path, goal: Goal, corpus: tuple[str, ...]
) -> None:
    found = finder(wide, folder, corpus=corpus, max_density=0.3).for_goal(goal)
    assert found["feature"].to_list() == [GOAL]
    assert found["wins"][0] == 1
    assert found["contrast"][0] > 3 * found["standard_error"][0] > 0
    assert {context["token"] for context in found["contexts"][0].to_list()} == {"~"}


def test_each_filter_keeps_out_its_own_kind_of_feature(
    wide: Any, folder: Path, goal: Goal, corpus: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(finder(wide, folder, corpus=corpus, max_density=1.0).for_goal(goal)["feature"]) == {GOAL, DENSE}
    monkeypatch.setattr("saets.features.finder.MAINLY_EARLY", 1.0)
    assert set(finder(wide, folder, corpus=corpus, max_density=0.3).for_goal(goal)["feature"]) == {GOAL, EARLY}
    described = finder(wide, folder, corpus=corpus).describe([LONELY, EARLY])
    assert described["feature"].to_list() == [LONELY, EARLY]
    assert described["contrast"].null_count() == 2
    assert {context["token"] for context in described["contexts"][0].to_list()} == {"#"}


def test_a_frame_has_the_columns_that_are_documented(wide: Any, folder: Path, corpus: tuple[str, ...]) -> None:
    found = finder(wide, folder, corpus=corpus).describe([0, 5])
    assert dict(found.schema) == COLUMNS
    assert found["contexts"].list.len().to_list() == [5, 0]
    assert found["density"][1] == 0
    assert found["link"].null_count() == 2
    documented = (Path(saets.__file__).parent.parent / "docs" / "features.md").read_text(encoding="utf-8")
    assert not [name for name in COLUMNS if f"`{name}`" not in documented]


def test_orders_sort_the_candidates_by_what_they_say(tiny: Any, tmp_path: Path) -> None:
    goal, tiny_experiment = load_goal("wedding"), load_experiment("tiny", ["model.dtype=float32", "model.device=cpu"])

    def ordered(sort: str, top: int = 8) -> pl.DataFrame:
        search = Search(top=top, sort=sort, max_density=1.0, corpus=["A river.", "An old mill stands by it."])
        return FeatureFinder(tiny_experiment, tiny, RunFolder(tmp_path / "none"), search=search).for_goal(goal)

    by_contrast = ordered("contrast")
    bound = (by_contrast["contrast"] - by_contrast["standard_error"]).to_numpy()
    assert (np.diff(bound) <= 0).all()
    by_output = ordered("output", top=50)
    assert by_output["output"].is_sorted(descending=True)
    assert set(by_contrast["feature"]) <= set(by_output["feature"])
    everything = ordered("all", top=50).with_columns(bound=pl.col("contrast") - pl.col("standard_error"))
    places = sum(everything[name].rank("min", descending=True) for name in ("bound", "output"))
    assert places.is_sorted()


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"sort": "outptu"}, "unknown order of features.*did you mean 'output'"),
        ({"top": 0}, "0 features asked for"),
        ({"max_density": 0.0}, "largest density is 0"),
        ({"max_density": 3.0}, "largest density is 3"),
        ({"skip_positions": 0}, "expected at least 1, which is BOS"),
    ],
)
def test_a_search_that_cannot_be_is_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Search(**search)


def test_nothing_left_after_the_filters_is_said_with_what_to_do(
    wide: Any, folder: Path, goal: Goal, corpus: tuple[str, ...]
) -> None:
    with pytest.raises(InputError, match="density of at most 1e-06.*larger density"):
        finder(wide, folder, corpus=corpus, max_density=1e-6).for_goal(goal)


def test_a_feature_has_a_page_where_saelens_or_its_folder_names_one(folder: Path, tmp_path: Path) -> None:
    gemma = load_experiment("gemma-2-2b").sae
    assert neuronpedia_link(gemma, 77) == "https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/77"
    own = load_experiment(folder / "planted.toml").sae
    assert neuronpedia_link(own, 77) is None
    config = json.loads((folder / "sae" / "cfg.json").read_text())
    config.setdefault("metadata", {})["neuronpedia_id"] = "mine/2-res"
    for name in ("sae_weights.safetensors", "cfg.json"):
        (tmp_path / name).write_bytes((folder / "sae" / name).read_bytes())
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert neuronpedia_link(own.model_copy(update={"path": str(tmp_path)}), 3) == "https://www.neuronpedia.org/mine/2-res/3"


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("weights were read before the bad input was found")


def command(folder: Path, *words: str) -> int:
    return main(["features", str(folder / "planted.toml"), "--out", str(folder / "run"), *words])


def test_the_command_shows_texts_as_they_are_and_writes_no_run_folder(
    folder: Path, corpus: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "corpus.txt").write_text("\n".join(corpus))
    words = ("--goal", str(folder / "feast.toml"), "--max-density", "0.3", "--corpus", str(folder / "corpus.txt"))
    assert command(folder, *words, "--save", str(folder / "found.parquet")) == 0
    shown = capsys.readouterr().out
    contexts = [line for line in shown.splitlines() if ">>~<<" in line]
    assert len(contexts) == 5
    for line in contexts:
        assert any(line.split("  ")[-1].replace(">>", "").replace("<<", "") in text for text in POSITIVE)
    assert "--set 'steering.features.feast=[[0, 1.0]]'" in shown
    assert "measured" not in shown.splitlines()[0]
    assert pl.read_parquet(folder / "found.parquet")["feature"].to_list() == [GOAL]
    assert not (folder / "run").exists()


def test_chosen_features_are_shown_and_saved_as_csv(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "--feature", "3", "--feature", "5", "--save", str(folder / "found.csv")) == 0
    shown = capsys.readouterr().out
    assert "fires nowhere in this text" in shown
    assert "contrast" not in shown.splitlines()[0]
    saved = pl.read_csv(folder / "found.csv")
    assert saved.columns == list(COLUMNS)
    assert saved["feature"].to_list() == [3, 5]
    assert json.loads(saved["contexts"][1]) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--feature", "6"), "no feature 6; the SAE has features 0 to 5"),
        (("--feature", "-1"), "no feature -1"),
        ((), "choose --goal GOAL, or --feature ID"),
        (("--goal", "love", "--feature", "1"), "choose --goal GOAL, or --feature ID"),
        (("--goal", "lvoe"), "did you mean 'love'"),
        (("--goal", "love", "--save", "found.txt"), "ends in .parquet or .csv"),
        (("--goal", "love", "--corpus", "no-such-file"), "corpus no-such-file cannot be read"),
        (("--goal", "love", "--sort", "size"), "unknown order of features 'size'"),
    ],
)
def test_what_cannot_work_is_said_before_weights_are_read(
    folder: Path, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("saets.explore.load_model", refuse)
    monkeypatch.setattr("saets.features.finder.load_sae", refuse)
    assert command(folder, *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("positive", "message"),
    [
        (POSITIVE[:3], "contrast.positive: .*at least 10 items"),
        (NEGATIVE, "the same texts; nothing would be left to steer"),
        (("x", *POSITIVE[1:]), "'x' has 2 tokens with BOS.*skip fewer positions"),
    ],
)
def test_contrast_texts_that_cannot_tell_features_apart_are_refused_before_weights_are_read(
    folder: Path,
    positive: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "poor.toml").write_text(goal_toml().replace(json.dumps(list(POSITIVE)), json.dumps(list(positive))))
    monkeypatch.setattr("saets.explore.load_model", refuse)
    assert command(folder, "--goal", str(tmp_path / "poor.toml")) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_run_finds_features_in_a_notebook(folder: Path) -> None:
    run = saets.Run(folder / "run", load_experiment(folder / "planted.toml"))
    found = run.features(str(folder / "feast.toml"), Search(max_density=0.3))
    assert GOAL in found["feature"].to_list()
