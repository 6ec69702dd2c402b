"""Which decoder runs a model."""

from __future__ import annotations

import logging
from typing import Any

from saets.engine.decoder import Decoder, Unsupported
from saets.errors import InputError

logger = logging.getLogger(__name__)

PLAIN = "plain"
"""Attribute under which a bridge made by `load_model` keeps a transformers model that shares its weights."""


def decoder_for(model: Any, hook_name: str) -> Decoder:
    """The fast decoder where the model can be run that way and gives the same logits, else the bridge's.

    `model` is a `TransformerBridge` or a transformers causal language model.

    Raises:
        InputError: no such hook, or a plain model that only a bridge can run.
    """
    from transformers import PreTrainedModel  # what runs models takes two seconds to import, and not all processes run one

    from saets.engine.bridge import BridgeDecoder, check_hook
    from saets.engine.plain import PlainDecoder

    if not isinstance(model, PreTrainedModel):
        check_hook(model, hook_name)
    plain = model if isinstance(model, PreTrainedModel) else getattr(model, "__dict__", {}).get(PLAIN)
    reason = "the bridge has no plain model of the same weights"
    if plain is not None:
        try:
            return PlainDecoder(plain, hook_name)
        except Unsupported as error:
            reason = str(error)
    if isinstance(model, PreTrainedModel):
        raise InputError(f"{type(model).__name__} cannot be steered as it is ({reason}); load it with saets.load_model")
    logger.info("decoding through the bridge's hooks: %s", reason)
    return BridgeDecoder(model, hook_name)
