"""The trained SAE read without SAELens, for machines that lack it: the same activations from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor

from saets.errors import InputError
from saets.shapes import Float


class PlainSae:
    """A TopK or JumpReLU SAE as SAELens saves it, in float32; `encode`, `decode`, `W_dec` and `cfg` as there."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """Raises `InputError` for another architecture, or inputs that are scaled as they come."""
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        if config["architecture"] not in ("topk", "jumprelu") or config["normalize_activations"] != "none":
            raise InputError(
                f"{folder} holds a {config['architecture']} SAE with normalize_activations {config['normalize_activations']!r}; "
                "expected topk or jumprelu, and none"
            )
        weights = {name: tensor.to(device).float() for name, tensor in load_file(folder / "sae_weights.safetensors").items()}
        self.cfg = SimpleNamespace(d_in=config["d_in"], d_sae=config["d_sae"])
        self.device = torch.device(device)
        self.W_dec: Float[Tensor, "d_sae d_model"] = weights["W_dec"]
        self._W_enc, self._b_enc, self._b_dec = weights["W_enc"], weights["b_enc"], weights["b_dec"]
        self._threshold = weights.get("threshold")
        self._centred: bool = config["apply_b_dec_to_input"]
        self._k: int | None = config.get("k")
        self._norms = self.W_dec.norm(dim=1) if config.get("rescale_acts_by_decoder_norm") else None

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations of the residual stream."""
        before = (x - self._b_dec if self._centred else x) @ self._W_enc + self._b_enc
        if self._threshold is not None:
            return before.relu() * (before > self._threshold)
        if self._norms is not None:
            before = before * self._norms
        top = before.topk(self._k or 1, dim=-1)
        acts = torch.zeros_like(before).scatter(-1, top.indices, top.values.relu())
        return acts if self._norms is None else acts / self._norms

    @torch.no_grad()
    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """The residual stream that the activations stand for."""
        return acts @ self.W_dec + self._b_dec
