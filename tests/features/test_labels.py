"""What features are about: labels of one's own, and the cards of the packaged SAE."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl
import pytest

from saets.errors import InputError
from saets.experiment.config import packaged
from saets.experiment.goal import load_goal
from saets.experiment.loading import load_experiment
from saets.features.labels import feature_labels, read_labels

SAE = load_experiment("smollm2").sae
((WEDDING, _),) = load_goal("wedding").features["smollm2"].target
LABELS = {907: "weddings [sic]", 12: "twelve"}


def test_a_feature_of_the_packaged_sae_is_known_by_where_it_fires_most() -> None:
    cards = pl.read_parquet(packaged("preset:smollm2/cards.parquet"))
    context = cards.row(by_predicate=pl.col("feature") == WEDDING, named=True)["contexts"][0]
    (label,) = feature_labels(SAE, [WEDDING]).values()
    before, rest = label.split("«")
    token, after = rest.split("»")
    assert context["token"].strip() == token.strip() == "married"
    assert before and context["before"].endswith(before)
    assert after and context["after"].startswith(after)
    assert "\n" not in label


def test_a_label_that_is_given_stands_over_a_context_and_one_that_is_empty_does_not() -> None:
    assert feature_labels(SAE, [WEDDING], {WEDDING: "weddings"}) == {WEDDING: "weddings"}
    assert "married»" in feature_labels(SAE, [WEDDING], {WEDDING: ""})[WEDDING]


def test_an_sae_without_cards_has_the_labels_that_are_given_alone() -> None:
    assert feature_labels(load_experiment("tiny").sae, [3, 4], {4: "four"}) == {4: "four"}
    assert feature_labels(load_experiment("gemma-2-2b").sae, [3]) == {}


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_labels_are_read_from_files_of_three_kinds(kind: str, tmp_path: Path) -> None:
    path, frame = (
        tmp_path / f"labels.{kind}",
        pl.DataFrame({"label": list(LABELS.values()), "feature": list(LABELS), "more": [1, 2]}),
    )
    if kind == "csv":
        frame.write_csv(path)
    elif kind == "parquet":
        frame.write_parquet(path)
    else:
        path.write_text(json.dumps(LABELS))
    assert read_labels(str(path)) == LABELS


EXPLAINED = [
    {"modelId": "gemma-2-2b", "layer": "12-gemmascope-res-16k", "index": "907", "description": " weddings [sic]"},
    {"modelId": "gemma-2-2b", "layer": "12-gemmascope-res-16k", "index": "12", "description": "twelve"},
    {"modelId": "gemma-2-2b", "layer": "12-gemmascope-res-16k", "index": "12", "description": "a second explanation"},
    {"modelId": "gemma-2-2b", "layer": "12-gemmascope-res-16k", "index": "13", "description": None},
]
"""As Neuronpedia exports explanations, with more keys than are read."""


@pytest.mark.parametrize("kind", ["list.json", "old.json", "batch-0.jsonl", "batch-0.jsonl.gz", "folder"])
def test_labels_are_read_from_neuronpedias_explanations(kind: str, tmp_path: Path) -> None:
    path, lines = tmp_path / kind, [json.dumps(one).encode() for one in EXPLAINED]
    if kind.endswith(".json"):
        path.write_text(json.dumps({"explanations": EXPLAINED} if kind == "old.json" else EXPLAINED))
    elif kind == "folder":
        path.mkdir()
        (path / "batch-0.jsonl").write_bytes(lines[0])
        (path / "batch-1.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines[1:])))
    else:
        content = b"\n".join(lines) + b"\n"
        path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    assert read_labels(str(path)) == LABELS


def test_a_folder_without_batches_holds_no_labels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder needs batches"):
        read_labels(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.csv", None, "no such file of labels"),
        ("labels.txt", "907 weddings", "expected a .csv, .parquet, .json, .jsonl or .jsonl.gz file"),
        ("labels.csv", "id,name\n907,weddings\n", "expected features and labels"),
        ("labels.csv", "feature,label\nwedding,907\n", "expected features and labels"),
        ("labels.parquet", "no parquet", "expected features and labels"),
        ("labels.json", "[907]", "got a int without these"),
        ("labels.json", '[{"index": "907"}]', "got a dict without these"),
        ("labels.json", "907", "got a int"),
        ("labels.jsonl", "907 weddings", "expected features and labels"),
        ("labels.jsonl.gz", "no gzip", "expected features and labels"),
        ("labels.json", "{", "expected features and labels"),
    ],
)
def test_a_file_that_holds_no_labels_is_refused(name: str, content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=reason):
        read_labels(str(tmp_path / name))
