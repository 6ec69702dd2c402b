"""The page as one file: template, style and program of this package, with the data and a policy that allows nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Mapping
from importlib import metadata, resources
from typing import Any

from saets.errors import InputError
from saets.explorer.contents import FEATURES, VECTORS, Contents
from saets.explorer.encoding import LETTERS, blob, compressed_size, halves, json_blob, json_text, packed
from saets.explorer.sources import PREDICTED, SUMMED, Sources
from saets.files.storage import shareable
from saets.plots import display_names
from saets.sae import describe_sae, neuronpedia_link

MOST_BYTES = 50_000_000
"""A page is smaller than this."""

ROOM = 0.9
"""How much of it the plan fills, so that what compresses badly has room."""

USUAL = 20
"""Entries of a list where nothing is said and there is room."""

BYTES_A_VECTOR, BYTES_A_FEATURE, PROGRAM = 50, 16, 100_000
"""About what facts of a vector and figures of a feature take, compressed, and all that is no data."""

CONTEXTS = 5
"""Contexts of a feature that are shown, at most."""

FACTS = ("scale", "loss", "unsteered_loss", "standard_error", "n_rollouts")


def planned_top(sources: Sources, texts: Mapping[str, Any], asked: int | None) -> int:
    """Entries a list: what is asked for, else `USUAL`, or fewer where the page would not stay below `MOST_BYTES`.

    Raises:
        InputError: more are asked for than there is room for, or less than one.
    """
    vectors, summed = len(sources.rows or ()), 0 if sources.summed is None else len(sources.summed)
    errors = sources.rows is not None and sources.rows.has("standard_errors")
    fixed = sum(compressed_size(text) for text in texts.values())
    most = most_entries(sources.d_sae, vectors, summed, fixed=fixed, errors=errors)
    if most < 1:
        raise InputError(
            f"{sources.d_sae} features and {vectors + summed} vectors do not fit into a page below {MOST_BYTES / 1e6:g} MB; "
            "give fewer labels, or explore a run of fewer vectors"
        )
    if asked is not None and not 1 <= asked <= most:
        raise InputError(f"--top is {asked}; expected 1 to {most}: a page stays below {MOST_BYTES / 1e6:g} MB")
    return min(most, USUAL) if asked is None else asked


def most_entries(features: int, vectors: int, summed: int = 0, *, fixed: int = 0, errors: bool = False) -> int:
    """How many entries of each list there is room for, beside `fixed` bytes of texts; nothing is taken to compress.

    Only `summed` vectors have effects alone; `errors` says whether effects have standard errors of each feature.
    """
    entry = (2 if max(features, vectors + summed) < 2**16 else 4) + 2
    each = (len(FEATURES) * features + len(VECTORS) * vectors + summed) * entry + (features + vectors + summed) * 2 * errors
    others = fixed + BYTES_A_VECTOR * (vectors + summed) + BYTES_A_FEATURE * features + PROGRAM
    return int((MOST_BYTES * ROOM - others) / (LETTERS * each))


def texts_of(sources: Sources, labels: Mapping[int, str]) -> dict[str, Any]:
    """The texts of features: labels that were given, contexts, and tokens, by feature."""
    within = {str(feature): label for feature, label in sorted(labels.items()) if 0 <= feature < sources.d_sae and label}
    if sources.cards is None:
        return {"labels": within}
    contexts = [
        [[round(one["activation"], 3), one["before"], one["token"], one["after"]] for one in (found or ())[:CONTEXTS]]
        for found in sources.cards["contexts"].to_list()
    ]
    return {"labels": within, "contexts": contexts, "tokens": [found or [] for found in sources.cards["top_tokens"].to_list()]}


def page(sources: Sources, contents: Contents, texts: Mapping[str, Any]) -> bytes:
    """The page in UTF-8.

    Raises:
        InputError: it would be too large.
    """
    shapes, blobs = packed(contents.lists)
    blobs |= {name: json_blob(text) for name, text in texts.items()}
    blobs["vectors"] = json_blob(_columns(contents))
    blobs |= {name: blob(halves(values)) for name, values in contents.on_itself.items()}
    if sources.cards is not None:
        blobs["density"] = blob(sources.cards["density"].to_numpy().astype("<f4").tobytes())
    r2 = sources.fit.approximator.feature_r2 if sources.fit else None
    if r2 is not None:
        blobs["r2"] = blob(halves(r2))
    about = _about(sources, contents) | {"lists": shapes, "blobs": sorted(blobs), "labels": len(texts["labels"])}
    data = {f"data-{name}": letters for name, letters in sorted(blobs.items())}
    title = f"{about['title']} · effects"
    draft = _filled(title, {"about": json_text(about | {"bytes": MOST_BYTES}), **data})
    made = _filled(title, {"about": json_text(about | {"bytes": len(draft)}), **data})
    if len(made) >= MOST_BYTES:
        raise InputError(f"the page would take {len(made) / 1e6:.1f} MB; give a smaller --top than {contents.top}")
    return made


def _filled(title: str, data: Mapping[str, str]) -> bytes:
    """The file with this data, each by the id of a script element of a type that no browser runs.

    The policy lets run this one program, by its hash, and allows no request.
    """
    folder = resources.files(__package__)
    template, style, program = ((folder / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    parts = {
        "POLICY": f"default-src 'none'; script-src {_hash(program)}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'",
        "TITLE": html.escape(title),
        "STYLE": style,
        "DATA": "\n".join(f'<script type="text/plain" id="{id}">{text}</script>' for id, text in data.items()),
        "PROGRAM": program,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()


def _hash(text: str) -> str:
    """A source of the policy: what has this hash, and nothing else."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _about(sources: Sources, contents: Contents) -> dict[str, Any]:
    experiment, fit = sources.experiment, sources.fit
    link = neuronpedia_link(experiment.sae, 0)
    counts: dict[str, int] = {}
    for facts in contents.vectors:
        counts[facts["where"]] = counts.get(facts["where"], 0) + 1
    summed = 0 if sources.summed is None else len(sources.summed)
    held_out = (fit.report.get("held_out") or {}) if fit else {}
    return {
        "title": experiment.name,
        "model": str(shareable(experiment.model.name)),
        "sae": describe_sae(experiment.sae.model_copy(update={"path": shareable(experiment.sae.path)})),
        "hook": experiment.hook_name,
        "features": sources.d_sae,
        "top": contents.top,
        "counts": counts,
        "unseen": max(summed - counts.get(SUMMED, 0), 0),
        "compared": contents.compared,
        "variance_share": round(contents.variance_share, 4),
        "missing": dict(sources.missing),
        "fitted": None
        if fit is None
        else {"here": fit.here, "r2": held_out.get("r2"), "published": "published" in fit.approximator.provenance},
        "bias_weight": experiment.steering.bias_weight,
        "methods": display_names(),
        "goals": _goals(sources),
        "neuronpedia": link.removesuffix("0") if link else None,
        "version": metadata.version("saets"),
    }


def _goals(sources: Sources) -> list[dict[str, Any]]:
    """The experiment's goals with their features, where they have some."""
    from saets.experiment.goal import goal_features, load_goal

    found = []
    for name in sources.experiment.steering.goals:
        try:
            goal = load_goal(name)
            target = [[feature, weight] for feature, weight in goal_features(goal, sources.experiment).target]
        except InputError:
            continue
        found.append({"id": goal.id, "features": [one for one in target if one[0] < sources.d_sae]})
    return found


def _columns(contents: Contents) -> dict[str, Any]:
    """The vectors' facts, a column each; numbers to five digits."""
    vectors = contents.vectors
    columns: dict[str, Any] = {
        "id": [facts["vector_id"] for facts in vectors],
        "feature": [-1 if facts["feature"] is None else facts["feature"] for facts in vectors],
        "index": [facts.get("index") for facts in vectors],
        "names": {str(i): facts["names"] for i, facts in enumerate(vectors) if "names" in facts},
        "measured": sum(facts["where"] != PREDICTED for facts in vectors),
    }
    for name in ("source", "where", "calibration"):
        kinds = sorted({str(facts.get(name) or "") for facts in vectors})
        columns[name] = {"kinds": kinds, "of": [kinds.index(str(facts.get(name) or "")) for facts in vectors]}
    return columns | {name: [_short(facts.get(name)) for facts in vectors] for name in FACTS}


def _short(value: int | float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
