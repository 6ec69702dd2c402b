"""Part `cards`: what each feature fires on in the model's own writing, and which tokens it makes likelier."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from assets import writing
from assets.language_model import LanguageModel
from assets.parts import Build, Need, Progress, whole
from assets.plain_sae import PlainSae
from assets.residuals import STEP_TOKENS, at_layers
from assets.settings import Settings
from saets.shapes import Float, Int

BEFORE, AFTER = 12, 6
"""Tokens of a context around the one that fires."""


def need(settings: Settings) -> Need:
    """The activations of a step, and the contexts kept so far."""
    cards = settings.cards
    return Need(disk=1e8, memory=4.0 * settings.training.d_sae * (3 * 65536 + 40 * cards.contexts) + 2e9)


class Peak(NamedTuple):
    """The largest activations of each feature so far, one a text."""

    value: Float[Tensor, "d_sae contexts"]
    text: Int[Tensor, "d_sae contexts"]
    position: Int[Tensor, "d_sae contexts"]

    def with_texts(self, first: int, acts: Float[Tensor, "texts pos d_sae"]) -> Peak:
        """These and those of more texts, numbered from `first`; the largest."""
        value, position = acts.max(dim=1)
        text = torch.arange(first, first + len(acts), device=acts.device)[:, None].expand_as(position)
        values = torch.cat([self.value, value.T], 1)
        kept = values.topk(self.value.shape[1], dim=1)
        texts, positions = torch.cat([self.text, text.T], 1), torch.cat([self.position, position.T], 1)
        return Peak(kept.values, texts.gather(1, kept.indices), positions.gather(1, kept.indices))


@torch.no_grad()
def make(build: Build, folder: Path) -> Mapping[str, Any]:
    """`cards.parquet`: a row a feature, dead ones too. Only what the model wrote counts, not the openings that it was given."""
    settings, training = build.settings.cards, build.settings.training
    loaded = LanguageModel.load(build)
    device = loaded.model.device
    sae = PlainSae(build.folder("sae") / "sae").to(device)
    found = itertools.islice(writing.texts(build), settings.tokens // build.settings.writing.length)
    texts, starts = zip(*found, strict=True)
    first = build.settings.residuals.skip_positions
    zeros = torch.zeros(sae.cfg.d_sae, settings.contexts, device=device)
    peak, fired, total, count = Peak(zeros, zeros.long(), zeros.long()), zeros[:, 0].clone(), zeros[:, 0].clone(), 0
    step = max(1, STEP_TOKENS[device.type] // build.settings.writing.length)
    progress = Progress("cards, texts", len(texts))
    for at in range(0, len(texts), step):
        tokens = torch.from_numpy(np.stack(texts[at : at + step]).astype(np.int64))
        own = torch.arange(tokens.shape[1]) >= torch.tensor([max(first, start) for start in starts[at : at + step]])[:, None]
        acts = sae.encode(at_layers(loaded.model, tokens, [training.layer])[training.layer].float())
        acts = acts * own.to(device)[:, :, None]
        peak = peak.with_texts(at, acts)
        fired += (acts > 0).sum((0, 1))
        total += acts.sum((0, 1))
        count += int(own.sum())
        progress.at(at + step)
    rows = {
        "feature": np.arange(sae.cfg.d_sae),
        "density": (fired / count).cpu().numpy(),
        "mean_activation": (total / fired.clamp(min=1)).cpu().numpy(),
        "top_tokens": list(top_tokens(loaded, sae.W_dec, settings.top_tokens)),
        "contexts": list(_contexts(loaded.tokenizer, texts, peak)),
    }
    whole(folder / "cards.parquet", lambda path: pq.write_table(pa.table(rows), path, compression="zstd", compression_level=19))
    return {"tokens": count, "live": int((fired > 0).sum())}


def top_tokens(loaded: LanguageModel, W_dec: Float[Tensor, "d_sae d_model"], count: int) -> Iterator[list[str]]:
    """Tokens whose logits a feature's decoder direction raises most, through the last norm's weights and the unembedding."""
    norm = loaded.model.model.norm.weight.float()
    unembedding = loaded.model.get_output_embeddings().weight.float()
    for part in W_dec.split(512):
        for tokens in ((part * norm) @ unembedding.T).topk(count, dim=1).indices.tolist():
            yield [loaded.tokenizer.decode([token]) for token in tokens]


def _contexts(tokenizer: Any, texts: Sequence[np.ndarray], peak: Peak) -> Iterator[list[dict[str, Any]]]:
    """Where each feature fires most: the text before, the token, the text after, and how much."""
    for values, numbers, positions in zip(peak.value.tolist(), peak.text.tolist(), peak.position.tolist(), strict=True):
        yield [
            {"activation": round(value, 2), **_around(tokenizer, texts[number], position)}
            for value, number, position in zip(values, numbers, positions, strict=True)
            if value > 0
        ]


def _around(tokenizer: Any, tokens: np.ndarray, at: int) -> dict[str, str]:
    spans = {"before": tokens[max(1, at - BEFORE) : at], "token": tokens[at : at + 1], "after": tokens[at + 1 : at + 1 + AFTER]}
    return {name: tokenizer.decode(span.tolist()) for name, span in spans.items()}
