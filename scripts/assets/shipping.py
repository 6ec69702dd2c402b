"""Part `ship`: into the package goes what a run needs of the other parts, with a card and checksums."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assets import description, measuring
from assets.fitting import held_out_report, moments_of
from assets.parts import Build, whole
from saets.effects.worker import Measurement, effect_of
from saets.errors import InputError
from saets.experiment.config import BASELINE, PRESETS, Experiment
from saets.experiment.loading import effect_settings, load_experiment
from saets.fit.held_out import is_held_out
from saets.model import load_model, weights_hash
from saets.run_folder.rows import Baseline, baseline_rows, effect_rows, shared_baseline
from saets.run_folder.store import RunFolder, Table, versions
from saets.sae import load_sae

PLACE = PRESETS / measuring.PRESET

MOST_BYTES = 30_000_000
"""Of all that is shipped."""

COMPACT: dict[str, Any] = {"compression": "zstd", "compression_level": 19}

STRONGEST = 10
"""Causes and effects kept of each feature."""


def check(build: Build) -> None:
    """Raise `InputError` where the preset steers elsewhere than the SAE reads."""
    steered, read = load_experiment(measuring.PRESET).hook_name, f"blocks.{build.settings.training.layer}.hook_resid_post"
    if steered != read:
        raise InputError(f"the preset steers at {steered}, the SAE reads {read}; make them one")


def make(build: Build, folder: Path) -> Mapping[str, Any]:
    """Replace the package's folder: the SAE, sums over all rows but those held out, these, cards, links, and what all that is.

    All is made in the part's own folder first, so the package has either what it had or what is new.
    """
    experiment = load_experiment(measuring.PRESET)
    found = list(measuring.measurements(build.folder("effects")))
    blocks = sorted((one for one in found if one.item.source == BASELINE), key=lambda one: one.item.index or 0)
    rows = sorted((one for one in found if one.item.source != BASELINE), key=lambda one: one.item.vector_id)
    apart = is_held_out([one.item.vector_id for one in rows], experiment.seed, experiment.fit.held_out)
    held_out, summed = ([one for one, out in zip(rows, apart, strict=True) if out == wanted] for wanted in (True, False))

    making = folder / "package"
    shutil.rmtree(making, ignore_errors=True)
    measured = RunFolder(making / "measured")
    _parquet(measured.baseline, baseline_rows(blocks))
    baseline = shared_baseline(measured.baseline)
    _parquet(measured.effects, effect_rows(held_out, baseline))
    _parquet(measured.summed, effect_rows(summed, baseline).drop(["vector", "effect"]))
    moments = moments_of(summed, baseline)
    moments.save(measured.moments)
    shutil.copytree(build.folder("sae") / "sae", making / "sae")
    shutil.copy(build.folder("cards") / "cards.parquet", making)
    pq.write_table(links(rows, baseline), making / "links.parquet", **COMPACT)
    measured.update_manifest(
        versions=versions(), effects={"settings": effect_settings(experiment), "worker": _weights(build, experiment, making)}
    )
    facts = {
        "rows_summed": len(summed),
        "rows_held_out": len(held_out),
        "held_out": held_out_report(moments, held_out, baseline, experiment.fit.penalties),
    }
    told = ("writing", "passages", "residuals", "sae", "cards", "effects")
    made = {name: build.facts(name) for name in told if build.is_made(name)}  # residuals are large, and may be gone
    (making / "README.md").write_text(description.of(build.settings, made, facts), encoding="utf-8")
    (making / "build.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    sums = "".join(f"{digest}  {name}\n" for name, digest in checksums(making).items())
    (making / "SHA256SUMS").write_text(sums, encoding="utf-8")
    size = sum(path.stat().st_size for path in making.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        print(f"ship: {size / 1e6:.1f} MB, which is more than {MOST_BYTES / 1e6:.0f}", file=sys.stderr)
    whole(PLACE, lambda place: shutil.copytree(making, place))
    return {"bytes": size, **facts}


def _weights(build: Build, experiment: Experiment, made: Path) -> dict[str, Any]:
    """Which weights the effects are of, as a run's workers say it."""
    dtype = build.facts("effects")["dtype"]
    model = load_model(experiment.model.model_copy(update={"dtype": dtype}))
    sae = load_sae(experiment.sae.model_copy(update={"path": str(made / "sae")}), model.cfg.d_model)
    return {"model_hash": weights_hash(model.original_model), "sae_hash": weights_hash(sae), "dtype": dtype}


def links(rows: Sequence[Measurement], baseline: Baseline) -> pa.Table:
    """The strongest causes and effects of each feature, over all measured decoder rows.

    `causes` of feature j are the decoder rows with the largest effect on j, `effects` the features that row j changes most.
    """
    decoder = [one for one in rows if one.item.source == "decoder"]
    numbers = np.array([one.item.index for one in decoder])
    changes = np.stack([effect_of(one.mean, baseline.mean) for one in decoder])
    d_sae = changes.shape[1]
    place = {int(number): i for i, number in enumerate(numbers)}
    causes = np.argsort(-np.abs(changes), axis=0)[:STRONGEST].T
    entry = pa.struct([("feature", pa.uint16()), ("effect", pa.float32())])
    of_causes = [[{"feature": int(numbers[i]), "effect": float(changes[i, j])} for i in causes[j]] for j in range(d_sae)]
    of_effects: list[list[dict[str, Any]] | None] = []
    for j in range(d_sae):
        row = changes[place[j]] if j in place else None
        top = None if row is None else np.argsort(-np.abs(row))[:STRONGEST]
        of_effects.append(None if row is None or top is None else [{"feature": int(i), "effect": float(row[i])} for i in top])
    return pa.table(
        {
            "feature": pa.array(range(d_sae), pa.uint16()),
            "causes": pa.array(of_causes, pa.list_(entry)),
            "effects": pa.array(of_effects, pa.list_(entry)),
        }
    )


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the list itself, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _parquet(table: Table, rows: pa.Table) -> None:
    """One shard, by a name that stays the same."""
    file = io.BytesIO()
    pq.write_table(rows, file, **COMPACT, use_dictionary=False)
    (table.folder / "rows.parquet").write_bytes(file.getvalue())
