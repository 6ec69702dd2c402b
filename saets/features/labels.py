"""What features are about, in a few words: labels that are given, or where a feature fires most, by the cards of its SAE."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from saets.errors import InputError
from saets.experiment.config import PACKAGED, packaged
from saets.experiment.model_config import Sae

BEFORE, AFTER = 40, 20
"""Most characters of a context before and after the token that fires."""

LINES = (".jsonl", ".jsonl.gz")
"""Names of Neuronpedia's batches end so."""

READERS: dict[str, Callable[[Path], pl.DataFrame]] = {".csv": pl.read_csv, ".parquet": pl.read_parquet}


def feature_labels(sae: Sae, features: Iterable[int], given: Mapping[int, str] | None = None) -> dict[int, str]:
    """Labels of some features: those given, else the context on which a feature fires most where the SAE comes with cards.

    In a context the token that fires stands between « and ». Features of which nothing is known are left out.
    """
    labels = {feature: (given or {}).get(feature, "") for feature in features}
    cards = packaged_cards(sae)
    if cards is not None:
        frame = pl.read_parquet(cards, columns=["feature", "contexts"]).filter(pl.col("feature").is_in(list(labels)))
        for feature, contexts in frame.iter_rows():
            labels[feature] = labels[feature] or (_context(contexts[0]) if contexts else "")
    return {feature: label for feature, label in labels.items() if label}


def packaged_cards(sae: Sae) -> Path | None:
    """The cards that the package has of an SAE of its own; None for any other."""
    if not str(sae.path).startswith(PACKAGED):
        return None
    cards = packaged(str(sae.path)).parent / "cards.parquet"
    return cards if cards.is_file() else None


def read_labels(path: str) -> dict[int, str]:
    """Labels by feature: of a file with columns `feature` and `label`, of a table by feature id, or of a Neuronpedia export.

    `.csv` and `.parquet` have columns; `.json` is a table, {"907": "weddings"}, or Neuronpedia's list of explanations; `.jsonl`
    and `.jsonl.gz` are batches of Neuronpedia's explanations, one or a folder of them. The first explanation of a feature counts.

    Raises:
        InputError: no such file, another kind, damaged, or without these columns.
    """
    file = Path(path)
    batches = sorted([*file.glob("*.jsonl"), *file.glob("*.jsonl.gz")]) if file.is_dir() else [file]
    if not file.exists() or not batches:
        raise InputError(f"no such file of labels: {path}; a folder needs batches that end in .jsonl or .jsonl.gz")
    if not file.is_dir() and not file.name.endswith((*READERS, ".json", *LINES)):
        raise InputError(f"labels {path}: expected a .csv, .parquet, .json, .jsonl or .jsonl.gz file")
    labels: dict[int, str] = {}
    try:
        for batch in batches:
            for feature, label in _pairs(batch):
                if label is not None:
                    labels.setdefault(int(feature), str(label).strip())
    except (PolarsError, ValueError, TypeError, KeyError, OSError, EOFError, zlib.error) as error:
        raise InputError(
            f'labels {path}: expected features and labels, {{"907": "weddings"}} or columns feature and label, or explanations '
            f"of Neuronpedia with index and description; {error}"
        ) from error
    return labels


def _pairs(file: Path) -> Iterable[tuple[Any, Any]]:
    if file.suffix in READERS:
        return list(READERS[file.suffix](file).select("feature", "label").iter_rows())
    if file.name.endswith(LINES):
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return _explained(json.loads(line) for line in content.decode().splitlines() if line.strip())
    found = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found, dict) and isinstance(found.get("explanations"), list):
        found = found["explanations"]
    if isinstance(found, list):
        return _explained(found)
    if not isinstance(found, dict):
        raise ValueError(f"got a {type(found).__name__}")
    return list(found.items())


def _explained(rows: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Feature and description of Neuronpedia's explanations."""
    for row in rows:
        if not isinstance(row, dict) or not {"index", "description"} <= row.keys():
            raise ValueError(f"got a {type(row).__name__} without these")
        yield row["index"], row["description"]


def _context(context: Mapping[str, Any]) -> str:
    before, token, after = (" ".join(f"|{context[name]}|".split())[1:-1] for name in ("before", "token", "after"))
    return f"{before[-BEFORE:]}«{token}»{after[:AFTER]}".strip()
