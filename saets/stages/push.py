"""A run on the hub: approximator, effects, vectors and results in one commit, with a generated card.

What is pushed names no path of this machine and no password: paths become their last part, URIs lose user and options.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save

from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.files.storage import Location, Where, shareable
from saets.files.tensors import read_tensors
from saets.hub import client as hub
from saets.hub.card import FILES, FOLDERS, card
from saets.run_folder.store import RunFolder
from saets.terminal.progress import Progress

REPLACED = tuple(f"{folder}/" for folder in FOLDERS)
"""What a later push replaces as a whole."""


def push(where: Where, target: hub.Source, progress: Progress, *, private: bool = False, effects: bool = True) -> str:
    """Upload what a run folder has; gives the address of the repository, which is made where there is none.

    The card takes the place of a README.md that is there; effects and vectors there that the run has no more are deleted.

    Raises:
        InputError: no run folder; neither approximator, vectors nor effects in it; whatever `hub.push` finds wrong.
    """
    run = RunFolder(where)
    experiment = load_experiment(run.path)
    with run.locked(), tempfile.TemporaryDirectory(prefix="saets-push-") as folder:
        there = dict(_files(run, effects=effects))
        if not any(name.startswith(("approximator", *REPLACED)) for name in there):
            raise InputError(f"{run.path} holds nothing to push; run `saets run` or `saets fit` first")
        fit = json.loads((run.path / "fit.json").read_text()) if "fit.json" in there else None
        files = {name: _shareable_file(name, location, experiment, Path(folder)) for name, location in there.items()}
        files["README.md"] = card(_shareable_settings(experiment), target, list(there), fit, run.manifest()).encode()
        with progress.stage(f"pushing to {target}", len(files), 0, "files") as advance:
            url = hub.push(target, files, f"{experiment.name}, by saets", owned=REPLACED, private=private)
            advance(len(files))
    return url


def _files(run: RunFolder, *, effects: bool) -> Iterator[tuple[str, Location]]:
    """Names in the repository, and what is in them."""
    there = run.path.entries()
    yield from ((name, run.path / name) for name in FILES if name in there)
    folder = run.path / "vectors"
    yield from ((f"vectors/{name}", folder / name) for name in folder.entries() if name.endswith(".safetensors"))
    if effects:
        yield from ((f"effects/{shard.name}", shard) for shard in run.effects.shards())
        yield from ((f"effects/baseline/{shard.name}", shard) for shard in run.baseline.shards())


def _shareable_settings(experiment: Experiment) -> Experiment:
    """The settings without paths, passwords, and where the judge's server and its replies are."""
    settings = experiment.model_dump(mode="json", exclude_none=True)
    for key in ("base_url", "cache"):
        settings["judge"].pop(key, None)
    return Experiment.model_validate(shareable(settings))


def _shareable_file(name: str, location: Location, experiment: Experiment, folder: Path) -> Path | bytes:
    """The file as it goes up; one of an object store is copied to this machine, since effects may not fit into memory."""
    if name == "experiment.toml":
        return _shareable_settings(experiment).to_toml().encode()
    if name.endswith(".json"):
        return json.dumps(shareable(json.loads(location.read_text())), indent=1).encode()
    if name.endswith(".safetensors"):
        tensors, header = read_tensors(location, f"{location} is gone")
        if "provenance" in header:
            header["provenance"] = json.dumps(shareable(json.loads(header["provenance"])), sort_keys=True)
        return save(tensors, metadata=header)
    if location.local is not None:
        return location.local
    copy = folder / name.replace("/", "-")
    copy.write_bytes(location.read_bytes())
    return copy
