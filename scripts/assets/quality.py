"""What an SAE is worth on text that it was not trained on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from assets import residuals
from assets.language_model import LanguageModel
from assets.parts import Build
from saets.shapes import Float

CHUNKS = 512
"""Chunks on which the loss is measured."""

DENSE = 0.1
"""Latents that fire on more than this share of tokens."""


def of(build: Build, sae: Any, layer: int, held_out: Float[Tensor, "tokens d_model"]) -> dict[str, Any]:
    """Figures of one SAE, on held-out residuals and on the chunks that they come from.

    `fraction_of_variance_unexplained` is against the mean residual. `ce_recovered` is how much of the loss that setting the
    residual stream to zero adds is not added where the SAE's reconstruction stands in its place.
    """
    counts, errors, spread, active = torch.zeros(sae.cfg.d_sae), 0.0, 0.0, 0.0
    mean = held_out.mean(0)
    with torch.no_grad():
        for part in held_out.split(4096):
            acts = sae.encode(part.to(sae.device))
            errors += (sae.decode(acts).cpu() - part).square().sum().item()
            spread += (part - mean).square().sum().item()
            counts += (acts > 0).sum(0).cpu()
            active += (acts > 0).sum().item()
    density = counts / len(held_out)
    losses = cross_entropies(build, sae, layer)
    return {
        "fraction_of_variance_unexplained": round(errors / spread, 4),
        "l0": round(active / len(held_out), 2),
        "dead": int((density == 0).sum()),
        "dense": int((density > DENSE).sum()),
        "median_density": round(density.median().item(), 5),
        "ce": {name: round(loss, 4) for name, loss in losses.items()},
        "ce_recovered": round((losses["zero"] - losses["sae"]) / (losses["zero"] - losses["model"]), 4),
    }


@torch.no_grad()
def cross_entropies(build: Build, sae: Any, layer: int) -> dict[str, float]:
    """Mean next-token loss of the model, with the SAE in the residual stream's place, and with zeros there.

    What no SAE is trained on is left as it is: first positions, and residuals of huge norm. Chunks are of the commonest length.
    """
    loaded, settings = LanguageModel.load(build), build.settings.residuals
    decoder, first = loaded.decoder(layer), settings.skip_positions
    _, held_out = residuals.held_out(build, layer)
    (length, _), *_ = Counter(len(chunk.tokens) for chunk in held_out).most_common()
    rows = [torch.from_numpy(chunk.tokens.astype("int64")) for chunk in held_out if len(chunk.tokens) == length][:CHUNKS]
    totals = {"model": 0.0, "sae": 0.0, "zero": 0.0}
    for tokens in torch.stack(rows).to(loaded.model.device).split(32):
        residual = decoder.lower(tokens)
        theirs = (residual.float().norm(dim=-1, keepdim=True) < settings.max_norm).index_fill(
            1, torch.arange(first, device=residual.device), False
        )
        rebuilt = torch.where(theirs, sae.decode(sae.encode(residual.float().to(sae.device))).to(residual), residual)
        zero = torch.where(theirs, 0, residual)
        for name, stream in {"model": residual, "sae": rebuilt, "zero": zero}.items():
            logits = decoder.upper(tokens, stream)[:, first:-1].float()
            totals[name] += functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, first + 1 :].flatten(), reduction="sum"
            ).item()
    return {name: total / (len(rows) * (length - first - 1)) for name, total in totals.items()}
