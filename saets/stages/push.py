"""A run on the hub: approximator, effects, vectors and results in one commit, with a generated card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from saets import hub
from saets.card import FILES, card
from saets.errors import InputError
from saets.stages.session import Session
from saets.storage import Location


def push(session: Session, target: hub.Source, *, private: bool = False, effects: bool = True) -> str:
    """Upload what the run has; gives the address of the repository, which is made where there is none.

    Raises:
        InputError: neither approximator, vectors nor effects there; whatever `hub.push` finds wrong.
    """
    run = session.run
    there = dict(_files(session, effects=effects))
    if not any(name.startswith(("approximator", "vectors/", "effects/")) for name in there):
        raise InputError(f"{run.path} holds nothing to push; run `saets run` or `saets fit` first")
    fit = json.loads((run.path / "fit.json").read_text()) if "fit.json" in there else None
    text = card(session.experiment, target, list(there), fit, run.manifest())
    files: dict[str, Path | bytes] = {name: location.local or location.read_bytes() for name, location in there.items()}
    with session.progress.stage(f"pushing to {target}", len(files), 0, "files") as advance:
        url = hub.push(target, {**files, "README.md": text.encode()}, f"{session.experiment.name}, by saets", private=private)
        advance(len(files))
    return url


def _files(session: Session, *, effects: bool) -> Iterator[tuple[str, Location]]:
    """Names in the repository, and what is in them."""
    run = session.run
    there = run.path.entries()
    yield from ((name, run.path / name) for name in FILES if name in there)
    folder = run.path / "vectors"
    yield from ((f"vectors/{name}", folder / name) for name in folder.entries() if name.endswith(".safetensors"))
    if effects:
        yield from ((f"effects/{shard.name}", shard) for shard in run.effects.shards())
        yield from ((f"effects/baseline/{shard.name}", shard) for shard in run.baseline.shards())
