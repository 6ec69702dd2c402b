"""Published files in place of stages 1 and 2: fetched from the hub, checked, and converted into the run folder."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from saets.effects.worker import Measurement
from saets.engine.calibration import Calibration
from saets.errors import InputError
from saets.experiment.config import Experiment, Published, settings_hash
from saets.files.tensors import read_header, write_tensors
from saets.fit.approximator import EffectApproximator
from saets.hub import client as hub
from saets.hub import published
from saets.model import model_shape
from saets.records import VectorItem, unit, vector_id
from saets.run_folder.rows import Baseline, effect_rows
from saets.run_folder.store import RunFolder
from saets.sae import load_sae, sae_width
from saets.stages.session import Session

logger = logging.getLogger(__name__)

ROWS = 256
"""Rows converted together."""


def stands_in(session: Session) -> bool:
    """Whether published files are used instead of measuring: the run has no effects of its own and none are asked for.

    Raises:
        InputError: the run's approximator is a published one that does not belong to this experiment.
    """
    experiment, run, spec = session.experiment, session.run, session.experiment.published
    if spec is None or session.measure or experiment.effects.shipped:
        return False
    if any(table.shards() for table in (run.effects, run.baseline, run.waiting)):
        return False
    if mismatch := _mismatch(experiment, spec):
        if _published(run):
            raise InputError(
                f"{run.approximator} was published for another experiment ({mismatch}); set that back, or give --out a new folder"
            )
        logger.warning("the files published at %s are not for this experiment (%s)", spec.repo, mismatch)
    return not mismatch


def use_published(session: Session) -> None:
    """Make the published approximator that of the run, and say so; one that was fitted here is kept."""
    run, there = session.run, session.run.approximator.is_file()
    if there and not _published(run):
        return
    if not there:
        logger.warning(
            "%s holds no effects: taking the approximator published at %s, measured by its authors and not by [effects] here; "
            "`saets run --measure` measures instead",
            run.path,
            _spec(session).repo,
        )
    pull_approximator(session)


def use_published_rotation(session: Session) -> None:
    """Fetch the rotation that was published with the run's approximator, where the experiment names one and it is not there."""
    run, spec = session.run, _spec(session)
    if spec.rotation is not None and _published(run) and not run.rotation.is_file():
        _pull_rotation(session, spec, spec.rotation)


def use_published_effects(session: Session) -> None:
    """Say that published effects are fitted instead of effects measured here, and have them in the run folder."""
    logger.warning(
        "%s holds no effects: fitting those published at %s; `saets effects` measures some here",
        session.run.path,
        _spec(session).repo,
    )
    pull_effects(session)


def pull(session: Session, *, effects: bool = False) -> None:
    """Fetch and convert everything that the experiment's `[published]` names; the effects, which are large, by option.

    Raises:
        InputError: nothing is named, files for another model, SAE or hook, an approximator fitted here already; whatever
            `hub.fetch` and `published` find wrong.
    """
    run = session.run
    spec = _spec(session)
    if run.approximator.is_file() and not _published(run):
        raise InputError(f"{run.path} holds an approximator that was fitted here; give --out a new folder for the published one")
    pull_approximator(session)
    if spec.rotation is not None:
        _pull_rotation(session, spec, spec.rotation)
    if effects:
        pull_effects(session)


def pull_approximator(session: Session) -> None:
    """Make the published approximator that of the run; nothing is done where it is that already."""
    experiment, run, spec = session.experiment, session.run, _spec(session)
    wanted = _wanted(spec, spec.approximator)
    if wanted.items() <= run.manifest().get("fit", {}).get("published", {}).items() and _published(run):
        return
    fetched = hub.fetch(_source(spec), spec.approximator, session.progress)
    approximator = published.read_approximator(fetched.path, model_shape(experiment.model)[0])
    width = sae_width(experiment.sae)
    if width not in (None, len(approximator.b)):
        raise InputError(f"{spec.approximator} predicts {len(approximator.b)} features; the SAE has {width}")
    report: dict[str, Any] = {"published": {**wanted, "commit": fetched.commit, "sha256": fetched.sha256}}
    if spec.bias_direction is not None:
        path = hub.fetch(_source(spec), spec.bias_direction, session.progress).path
        cosine = published.bias_direction_cosine(path, approximator)
        report["bias_direction_cosine"] = cosine
        if cosine < 0.99:
            names = spec.bias_direction, spec.approximator
            logger.warning("cosine %.3f between %s and u(M b) of %s: they were made apart", cosine, *names)
    _save_approximator(session, approximator, report)


def _save_approximator(session: Session, approximator: EffectApproximator, report: dict[str, Any]) -> None:
    run = session.run
    provenance = {"model": session.experiment.model.name, "hook_name": session.experiment.hook_name, **report}
    replace(approximator, provenance=provenance).save(run.approximator)
    run.write_fit(report)
    run.update_manifest(fit={"inputs": settings_hash(report["published"]), **report})


def _pull_rotation(session: Session, spec: Published, name: str) -> None:
    """Write the rotation, turned to the convention Q d, beside what the file's direction was found to be."""
    fetched = hub.fetch(_source(spec), name, session.progress)
    W_dec = load_sae(session.experiment.sae, model_shape(session.experiment.model)[0]).W_dec
    found = published.read_rotation(fetched.path, W_dec, EffectApproximator.load(session.run.approximator).M)
    facts = {
        "file": name,
        "commit": fetched.commit,
        "transposed": found.transposed,
        "mean_cosine": found.mean_cosine,
        "mean_cosine_unrotated": found.mean_cosine_unrotated,
    }
    write_tensors(session.run.rotation, {"Q": found.Q}, {"format": "saets-rotation"})
    session.run.update_stage("published", {"rotation": facts})


def pull_effects(session: Session) -> None:
    """Convert the published effects into rows of `published/effects`; those that are there already are kept.

    A vector's length in the file is its scale. What the file does not tell (losses, rollouts, standard errors) is NaN or 0; a
    scale beyond the grid, which the released code extrapolated, counts as capped. Rows of length zero or with NaN or infinity
    are left out and counted.

    Raises:
        InputError: as for `pull`.
    """
    experiment, run, spec = session.experiment, session.run, _spec(session)
    if spec.effects is None:
        raise InputError(f"[published] of {experiment.name} names no effects; measure them with `saets effects`")
    wanted = {**_wanted(spec, spec.effects), "dtype": experiment.effects.dtype}
    before = run.manifest().get("published", {}).get("effects", {})
    if wanted.items() <= before.items() and "rows" in before:
        return
    fetched = hub.fetch(_source(spec), spec.effects, session.progress)
    found = published.read_effects(fetched.path, model_shape(experiment.model)[0], sae_width(experiment.sae))
    wanted |= {"commit": fetched.commit, "sha256": fetched.sha256}
    if wanted != before:  # what is there was begun from another file
        for shard in run.published_effects.shards():
            shard.delete()
        run.update_stage("published", {"effects": wanted})
    there, rows, left_out = run.published_effects.ids(), len(found.vectors), 0
    grid_end = experiment.effects.scale_grid[-1]
    nothing = Baseline(np.zeros(found.effects.shape[1], np.float32), float("nan"), None)
    with session.progress.stage("converting published effects", rows, 0, "rows") as advance:
        for start in range(0, rows, ROWS):
            part = slice(start, start + ROWS)
            measured, bad = _measurements(found.vectors[part], found.effects[part], start, grid_end)
            fresh = [one for one in measured if one.item.vector_id not in there]
            if fresh:
                run.published_effects.write(effect_rows(fresh, nothing, experiment.effects.dtype))
            there |= {one.item.vector_id for one in fresh}
            left_out += bad
            advance(len(found.vectors[part]))
    run.published_effects.compact()
    if left_out:
        logger.warning("%d of %d rows of %s are zero or not finite; left out", left_out, rows, spec.effects)
    run.update_stage("published", {"effects": {**wanted, "rows": len(there), "left_out": left_out}})


def _measurements(vectors: torch.Tensor, effects: torch.Tensor, start: int, grid_end: float) -> tuple[list[Measurement], int]:
    x, y = vectors.float().numpy(), effects.float().numpy()
    good = np.isfinite(x).all(1) & np.isfinite(y).all(1) & (np.abs(x).max(1) > 0)
    nan = float("nan")
    measured = []
    for row in np.flatnonzero(good):
        direction, scale = unit(x[row], f"row {start + row}"), float(np.linalg.norm(x[row]))
        item = VectorItem(vector_id(direction), "published", int(start + row), direction)
        calibration = Calibration(scale, nan, "capped" if scale > grid_end else "ok")
        measured.append(Measurement(item, y[row], nan, None, calibration, nan, 0, 0))
    return measured, int((~good).sum())


def _spec(session: Session) -> Published:
    spec = session.experiment.published
    if spec is None:
        raise InputError(
            f"{session.experiment.name} names no published files; add a [published] table with repo and approximator, or run "
            "`saets effects` and `saets fit`"
        )
    if mismatch := _mismatch(session.experiment, spec):
        raise InputError(f"the files of {spec.repo} do not belong to this experiment: {mismatch}; measure with `saets effects`")
    return spec


def _wanted(spec: Published, name: str) -> dict[str, Any]:
    return {"repo": spec.repo, "repo_type": spec.repo_type, "revision": spec.revision, "file": name}


def _published(run: RunFolder) -> bool:
    """Whether the run's approximator is a published one; its own header knows, also after a kill."""
    return run.approximator.is_file() and "published" in json.loads(read_header(run.approximator).get("provenance", "{}"))


def _mismatch(experiment: Experiment, spec: Published) -> str:
    """What the files were made for where that is not what the experiment has; empty where all agrees."""
    pairs = {
        "model.name": (experiment.model.name, spec.model),
        "sae.release": (experiment.sae.release, spec.sae_release),
        "sae.id": (experiment.sae.id, spec.sae_id),
        "hook_name": (experiment.hook_name, spec.hook_name),
        "effects.target_loss": (experiment.effects.target_loss, spec.target_loss),
        "effects.prompt_format": (experiment.effects.prompt_format, "plain"),
    }
    return "; ".join(f"{key} is {here!r}, theirs {there!r}" for key, (here, there) in pairs.items() if here != there)


def _source(spec: Published) -> hub.Source:
    return hub.Source(spec.repo, spec.repo_type, spec.revision)
