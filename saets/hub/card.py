"""The README that a pushed run carries: what is in it, how it was made, how well it predicts, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saets.experiment.config import LOSS_RULES, Experiment
from saets.hub.client import Source
from saets.sae import describe_sae


def card(
    experiment: Experiment, source: Source, files: Sequence[str], fit: Mapping[str, Any] | None, manifest: Mapping[str, Any]
) -> str:
    """Markdown with the front matter that the hub reads; `fit` is what fit.json holds, where the run has an approximator."""
    front = ["---", "tags:", "- steering", "- sparse-autoencoder", "- saets", "---"]
    origin = (fit or {}).get("published") or (fit or {}).get("effects_from")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.get("versions", {}).items()))
    parts = [
        "\n".join(front),
        f"# {experiment.name}: SAE-targeted steering of {experiment.model.name}",
        experiment.description,
        "Made with `saets`, which implements SAE-TS (arXiv 2411.02193): the effect of a unit steering vector x on every feature "
        "of the SAE is predicted as x M + b.",
        _settings(experiment, versions, measured=origin is None),
        "## Files\n\n" + "\n".join(f"- `{name}`: {text}" for name, text in _described(files)),
        _quality(fit) if fit else "",
        _use(experiment, source, files),
        _licence(origin),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(experiment: Experiment, versions: str, *, measured: bool) -> str:
    """A table of settings; those of measuring only where effects were measured with them."""
    effects = experiment.effects
    rule = next(f"{name} {value:g}" for name in LOSS_RULES if (value := getattr(effects, name)) is not None)
    model, revision = experiment.model.name, experiment.model.revision
    rows = {
        "model": f"{model} at {revision}" if revision else model,
        "SAE": describe_sae(experiment.sae),
        "hook": experiment.hook_name,
    }
    if measured:
        rows |= {
            "rollouts a vector": f"{len(effects.prompts)} prompts x {effects.rollouts}, {effects.length} tokens each",
            "sampling": f"temperature {effects.temperature:g}, top-k {effects.top_k}",
            "calibration": rule,
            "seed": str(experiment.seed),
        }
    rows["versions"] = versions
    return "## Settings\n\n| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)


FILES = {
    "approximator.safetensors": "M [d_model, d_sae] and b [d_sae], float32",
    "fit.json": "how the approximator was fitted, and how well it predicts vectors held out",
    "experiment.toml": "every setting",
    "manifest.json": "versions, and the settings of each stage",
    "results.md": "scores of every goal and method with intervals",
    "results.parquet": "scores by goal, method and scale",
    "scores.parquet": "held-out scores by goal and method, and which method wins",
    "comparisons.parquet": "every pair of methods compared",
    "agreement.parquet": "how far judges agree",
    "battles.parquet": "pairs of texts compared by a judge",
    "strengths.parquet": "strengths of methods in those battles",
    "side_effects.parquet": "what each method does at its scale to held-out text and other features",
}
FOLDERS = {
    "vectors": "steering vectors of unit length, one file a goal and method",
    "effects": "measured effects as Parquet: vector, scale and effect on every feature, one row a vector",
}


def _described(files: Sequence[str]) -> list[tuple[str, str]]:
    there = {name: text for name, text in FILES.items() if name in files}
    for folder, text in FOLDERS.items():
        count = sum(name.startswith(f"{folder}/") for name in files)
        if count:
            there[f"{folder}/"] = f"{text} ({count} files)"
    return list(there.items())


def _quality(fit: Mapping[str, Any]) -> str:
    if "published" in fit:
        return f"## Approximator\n\nConverted from {_origin(fit['published'])}."
    held_out = fit["held_out"]
    figures = {
        "rows fitted": fit["rows_train"],
        "rows that came with the package": fit.get("rows_shipped"),
        "rows held out": fit["rows_held_out"],
        "solver": fit["solver"],
        **{name: held_out[name] for name in ("mse", "mse_mean_effect", "mse_zero", "mse_noise", "r2", "r2_ceiling", "cosine")},
    }
    shown = "\n".join(f"| {name} | {_figure(value)} |" for name, value in figures.items() if value is not None)
    return (
        "## Approximator\n\nOn vectors held out at random; `mse_noise` is what measurement noise alone leaves, `r2_ceiling` the "
        f"R2 that it allows.\n\n| | |\n|---|---|\n{shown}"
    )


def _origin(origin: Mapping[str, Any]) -> str:
    return f"`{origin['file']}` of the {origin['repo_type']} repository `{origin['repo']}`, commit `{origin['commit']}`"


def _licence(origin: Mapping[str, Any] | None) -> str:
    more = f" Effects or approximator come from {_origin(origin)}, whose licence applies too." if origin else ""
    return (
        "## Licence\n\nVectors, effects and the approximator are derived from the model and the SAE named above; the licences "
        f"and terms of both apply to them.{more} Check these before you pass the files on."
    )


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _use(experiment: Experiment, source: Source, files: Sequence[str]) -> str:
    """Code that fetches one file and uses it; nothing where there are effects alone."""
    if not any(name == "approximator.safetensors" or name.startswith("vectors/") for name in files):
        return ""
    file = next((name for name in files if name.startswith("vectors/")), "approximator.safetensors")
    kind = "SteeringVector" if file.startswith("vectors/") else "EffectApproximator"
    return f"""## Use

At `{experiment.hook_name}`, every position, BOS included; a vector has unit length and is added times a scale.

```python
from huggingface_hub import hf_hub_download
from saets import {kind}

loaded = {kind}.load(hf_hub_download("{source.repo}", "{file}", repo_type="{source.repo_type}"))
```"""
