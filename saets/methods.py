"""The steering methods: one function each, from named ingredients to a direction. The builder normalises in one place.

A new method is one function and one entry in `METHODS`. Ingredients are found by parameter name and computed only when a
method asks for them, so CAA never loads an SAE.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from saets.approximator import EffectApproximator
from saets.config import METHOD_IDS
from saets.errors import unknown
from saets.shapes import Float

Method = Callable[..., Tensor]


def caa(positive: Float[Tensor, "texts d_model"], negative: Float[Tensor, "texts d_model"]) -> Float[Tensor, " d_model"]:
    """mean(h+) - mean(h-): each text is the mean of h_L over its tokens, BOS included (arXiv 2312.06681; paper, section 5)."""
    return positive.mean(0) - negative.mean(0)


def sae(decoder_target: Float[Tensor, " d_sae"], W_dec: Float[Tensor, "d_sae d_model"]) -> Float[Tensor, " d_model"]:
    """sum_j w_j d_j: the weighted decoder rows of the goal's features (paper, section 5)."""
    return decoder_target @ W_dec


def sae_ts(
    target: Float[Tensor, " d_sae"], approximator: EffectApproximator, *, bias_weight: float = 1.0
) -> Float[Tensor, " d_model"]:
    """u(M t) - lambda u(M b): towards the target's effect, away from what every vector does (paper, equation 3).

    Columns of M are not normalised in M t; `bias_weight` is the paper's lambda, 1 there.
    """
    M, b = approximator.M, approximator.b
    return normalize(M @ target, dim=0) - bias_weight * normalize(M @ b, dim=0)


METHODS: dict[str, Method] = {"caa": caa, "sae": sae, "sae_ts": sae_ts}
assert tuple(METHODS) == METHOD_IDS


def build(method: str, ingredients: Any, **options: Any) -> Tensor:
    """The method's direction [d_model], not yet normalised.

    `ingredients` has an attribute for every parameter name; only those that the method names are read. Options the method does
    not have are ignored, so one set serves all methods.

    Raises:
        InputError: unknown method.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    arguments = {}
    for name, parameter in inspect.signature(METHODS[method]).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if name in options:
                arguments[name] = options[name]
        else:
            arguments[name] = getattr(ingredients, name)
    direction: Tensor = METHODS[method](**arguments)
    return direction


def needs(method: str, ingredient: str) -> bool:
    """Whether the method has an ingredient of this name."""
    return ingredient in inspect.signature(METHODS[method]).parameters
