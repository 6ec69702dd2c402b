"""The trained SAE read without SAELens, for machines that lack it: the same activations from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from saets.errors import InputError
from saets.shapes import Float


class PlainSae(nn.Module):
    """A TopK or JumpReLU SAE as SAELens saves it, in float32; `encode`, `decode`, `W_dec`, `cfg` and `device` as there."""

    W_dec: Float[Tensor, "d_sae d_model"]
    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_model"]

    def __init__(self, folder: Path) -> None:
        """Raises `InputError` for another architecture, or inputs that are scaled as they come."""
        super().__init__()
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        if config["architecture"] not in ("topk", "jumprelu") or config["normalize_activations"] != "none":
            raise InputError(
                f"{folder} holds a {config['architecture']} SAE with normalize_activations {config['normalize_activations']!r}; "
                "expected topk or jumprelu, and none"
            )
        for name, weights in load_file(folder / "sae_weights.safetensors").items():
            self.register_buffer(name, weights.float())
        self.cfg = SimpleNamespace(d_in=config["d_in"], d_sae=config["d_sae"])
        self._threshold = config["architecture"] == "jumprelu"
        self._centred: bool = config["apply_b_dec_to_input"]
        self._k: int = config.get("k") or 1
        self._rescaled: bool = config.get("rescale_acts_by_decoder_norm", False)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.W_dec.device

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations of the residual stream."""
        before = (x - self.b_dec if self._centred else x) @ self.W_enc + self.b_enc
        if self._threshold:
            return before.relu() * (before > self.threshold)
        norms = self.W_dec.norm(dim=1) if self._rescaled else torch.ones_like(self.b_enc)
        top = (before * norms).topk(self._k, dim=-1)
        return torch.zeros_like(before).scatter(-1, top.indices, top.values.relu()) / norms

    @torch.no_grad()
    def decode(self, acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """The residual stream that the activations stand for."""
        return acts @ self.W_dec + self.b_dec
