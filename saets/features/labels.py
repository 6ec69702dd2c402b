"""What features are about, in a few words: labels that are given, or where a feature fires most, by the cards of its SAE."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from saets.errors import InputError
from saets.experiment.config import PACKAGED, packaged
from saets.experiment.model_config import Sae

BEFORE, AFTER = 40, 20
"""Most characters of a context before and after the token that fires."""

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
    """Labels by feature from a file: `.csv` or `.parquet` with columns `feature` and `label`, or `.json`, a table by feature id.

    Raises:
        InputError: no such file, another kind, damaged, or without these columns.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no such file of labels: {path}")
    if file.suffix not in (*READERS, ".json"):
        raise InputError(f"labels {path}: expected a .csv, .parquet or .json file")
    try:
        pairs = _pairs(file)
        return {int(feature): str(label) for feature, label in pairs}
    except (PolarsError, ValueError, TypeError) as error:
        raise InputError(
            f'labels {path}: expected features and labels, {{"907": "weddings"}} or columns feature and label; {error}'
        ) from error


def _pairs(file: Path) -> Iterable[tuple[Any, Any]]:
    if file.suffix == ".json":
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"got a {type(found).__name__}")
        return list(found.items())
    return list(READERS[file.suffix](file).select("feature", "label").iter_rows())


def _context(context: Mapping[str, Any]) -> str:
    before, token, after = (" ".join(f"|{context[name]}|".split())[1:-1] for name in ("before", "token", "after"))
    return f"{before[-BEFORE:]}«{token}»{after[:AFTER]}".strip()
