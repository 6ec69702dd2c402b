"""The model as plain transformers, so that parts which want a GPU run on a machine without TransformerLens, Ray and SAELens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets.parts import Build
from saets.engine.choice import decoder_for
from saets.engine.decoder import Decoder
from saets.engine.machine import cpu_has_bfloat16
from saets.engine.rollout import RolloutEngine


class LanguageModel(NamedTuple):
    """A causal language model on the GPU, where there is one."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, build: Build) -> LanguageModel:
        """In bfloat16 where the device computes in it, else in float32.

        Raises:
            InputError: no such package.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" or cpu_has_bfloat16() else torch.float32
        if build.weights:
            model: Any = AutoModelForCausalLM.from_pretrained(build.weights, dtype=dtype)
        else:
            from saets.model import LOADERS

            model = LOADERS["gguf"](_spec(build), dtype).model
        return cls(model.to(device).eval().requires_grad_(False), load_tokenizer(build))

    def engine(self, layer: int, *, top_k: int, temperature: float) -> RolloutEngine:
        """Rolls out, steered after the block `layer`."""
        hook_name = f"blocks.{layer}.hook_resid_post"
        return RolloutEngine(self.model, hook_name, top_k=top_k, temperature=temperature, tokenizer=self.tokenizer)

    def decoder(self, layer: int) -> Decoder:
        """Runs the blocks up to `layer`, and those above."""
        return decoder_for(self.model, f"blocks.{layer}.hook_resid_post")


def load_tokenizer(build: Build) -> Any:
    """The model's tokenizer alone."""
    if build.weights:
        return AutoTokenizer.from_pretrained(build.weights)
    from saets import model

    return model.load_tokenizer(_spec(build))


def _spec(build: Build) -> Any:
    from saets.experiment.model_config import Model

    return Model(name=build.settings.subject.model, loader="gguf")
