"""Sparse autoencoders, all reached through SAELens.

Shapes, said once: `encode` maps the residual stream [..., d_model] to feature activations [..., d_sae]; `W_dec` is
[d_sae, d_model], a feature's decoder direction a row. A new kind of SAE is one entry in `LOADERS`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from saets.errors import InputError, unknown
from saets.experiment.config import packaged
from saets.experiment.model_config import Sae


def load_sae(spec: Sae, d_model: int, device: torch.device | str = "cpu") -> Any:
    """The SAELens SAE, in its setting's precision (float32 unless told otherwise), without gradients.

    Raises:
        InputError: unknown release or id, missing or damaged folder, or an SAE whose width of input is not `d_model`.
    """
    check_sae(spec, d_model)
    with contextlib.redirect_stderr(None):
        sae = LOADERS[spec.loader](spec, d_model)
    if sae.cfg.d_in != d_model:
        raise _mismatch(spec, sae.cfg.d_in, d_model)
    return sae.to(device=device, dtype=getattr(torch, spec.dtype)).eval().requires_grad_(False)


def check_sae(spec: Sae, d_model: int) -> None:
    """Everything that can be found wrong with the SAE without reading its weights; raises `InputError`."""
    if spec.loader == "folder":
        d_in = _folder_config(spec).get("d_in")
        if d_in != d_model:
            raise _mismatch(spec, d_in, d_model)
    elif spec.loader == "release":
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

        table = get_pretrained_saes_directory()
        if spec.release not in table and "/" not in str(spec.release):
            raise unknown("SAE release", str(spec.release), table)
        if spec.release in table and spec.id not in table[spec.release].saes_map:
            raise unknown(f"SAE id of {spec.release}", str(spec.id), table[spec.release].saes_map)


def sae_width(spec: Sae) -> int | None:
    """d_sae where it is known without reading weights; None for an SAE of a release."""
    if spec.loader == "folder":
        d_sae = _folder_config(spec).get("d_sae")
        return int(d_sae) if d_sae is not None else None
    return spec.d_sae if spec.loader == "random" else None


def neuronpedia_link(spec: Sae, feature: int) -> str | None:
    """Page of a feature on neuronpedia.org, by SAELens' table or the config in the SAE's folder; None where there is none."""
    name = None
    if spec.loader == "folder":
        name = (_folder_config(spec).get("metadata") or {}).get("neuronpedia_id")
    elif spec.loader == "release":
        name = _listed_neuronpedia_id(str(spec.release), str(spec.id))
    return f"https://www.neuronpedia.org/{name}/{feature}" if name else None


@functools.cache
def _listed_neuronpedia_id(release: str, sae_id: str) -> str | None:
    """Id of an SAE of SAELens' table, or of another entry of the table that has the same weights."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    table = get_pretrained_saes_directory()
    if release not in table or sae_id not in table[release].saes_map:
        return None
    weights = table[release].repo_id, table[release].saes_map[sae_id]
    for entry in (table[release], *table.values()):
        for name, path in entry.saes_map.items():
            if (entry.repo_id, path) == weights and entry.neuronpedia_id.get(name):
                return entry.neuronpedia_id[name]
    return None


def check_features(features: Iterable[int], d_sae: int | None) -> None:
    """Raise `InputError` for a feature outside the SAE; `d_sae` is None where it is not known yet."""
    for feature in features:
        if feature < 0 or (d_sae is not None and feature >= d_sae):
            known = "an SAE's features are numbered from 0" if d_sae is None else f"the SAE has features 0 to {d_sae - 1}"
            raise InputError(f"no feature {feature}; {known}")


def describe_sae(spec: Sae) -> str:
    """The SAE in a few words, for errors and provenance."""
    return {
        "folder": f"folder {spec.path}",
        "release": f"{spec.release} {spec.id}",
        "random": f"random SAE of {spec.d_sae} features",
    }[spec.loader]


def _mismatch(spec: Sae, d_in: object, d_model: int) -> InputError:
    return InputError(
        f"the SAE ({describe_sae(spec)}) reads vectors of {d_in}, the model's residual stream has {d_model}; "
        "give an SAE trained on this model"
    )


def _folder_config(spec: Sae) -> dict[str, Any]:
    folder = packaged(str(spec.path))
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"SAE folder {folder} has no {name}; expected a folder written by SAELens' save_inference_model")
    try:
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / 'cfg.json'} is not valid JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _load_release(spec: Sae, d_model: int) -> Any:
    from sae_lens import SAE

    try:
        return SAE.from_pretrained(str(spec.release), str(spec.id), device="cpu")
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"SAE {spec.release} {spec.id} could not be downloaded: {reason} "
            "Give sae.loader = 'folder' with a local copy, or run where the hub can be reached"
        ) from error


def _load_folder(spec: Sae, d_model: int) -> Any:
    from sae_lens import SAE

    folder = packaged(str(spec.path))
    try:
        return SAE.load_from_disk(str(folder), device="cpu")
    except (RuntimeError, KeyError, ValueError, OSError) as error:
        raise InputError(f"SAE folder {Path(folder)} could not be read: {str(error).strip().splitlines()[0]}") from error


def _load_random(spec: Sae, d_model: int) -> Any:
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=d_model, d_sae=spec.d_sae))
    generator = torch.Generator().manual_seed(spec.d_sae)
    decoder = torch.nn.functional.normalize(torch.randn(spec.d_sae, d_model, generator=generator), dim=-1)
    with torch.no_grad():
        sae.W_dec.copy_(decoder)
        sae.W_enc.copy_(decoder.T)
        sae.b_enc.fill_(-0.5)
        sae.b_dec.zero_()
    return sae


LOADERS: dict[str, Callable[[Sae, int], Any]] = {"release": _load_release, "folder": _load_folder, "random": _load_random}
