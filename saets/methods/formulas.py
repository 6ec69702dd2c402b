"""The steering methods: one function each, from named ingredients to a direction. The builder normalises in one place.

A new method is one function and one entry in `METHODS`. Ingredients are found by parameter name and computed only when a
method asks for them, so CAA never loads an SAE. Options are keyword arguments, by the names that `[steering]` has, all listed in
`METHOD_OPTIONS`; a method named with options of its own (`sae_ts:bias_weight=0`) takes those.

Shapes: M [d_model, d_sae] and b [d_sae] of the approximator, y ~ M'x + b for unit x; `target` t [d_sae], the weights of the
features that should rise; u(x) = x / ||x||.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saets.errors import InputError
from saets.experiment.method_id import METHOD_OPTIONS, parse_method
from saets.fit.approximator import EffectApproximator
from saets.methods.side_effects import SideEffects
from saets.methods.spectrum import gram, solve
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
    return normalize(_towards(M, target), dim=0) - bias_weight * normalize(M @ b, dim=0)


def pinverse(target: Float[Tensor, " d_sae"], approximator: EffectApproximator) -> Float[Tensor, " d_model"]:
    """(M M')^-1 M (u(t) - b): the x whose predicted effect M'x + b is nearest to u(t) (the paper's pseudoinverse; released code).

    Directions that M does not see get nothing. `pinverse_raw` is the same vector at its own length.
    """
    M, b = approximator.M, approximator.b
    _towards(M, target)
    return solve(gram(M), M.double() @ (normalize(target, dim=0) - b).double()).float()


def rotation(
    target: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    Q: Float[Tensor, "d_model d_model"],
    approximator: EffectApproximator,
    *,
    bias_weight: float = 1.0,
) -> Float[Tensor, " d_model"]:
    """u(Q u(sum_j t_j d_j)) - lambda u(M b): decoder rows turned towards the columns of M (paper, appendix D).

    Q is applied from the left; `rotation.procrustes` makes it. `bias_weight` is lambda, 1 in the paper.
    """
    turned = normalize(Q @ normalize(target @ W_dec, dim=0), dim=0)
    return turned - bias_weight * normalize(approximator.M @ approximator.b, dim=0)


def fgaa(
    feature_contrast: Float[Tensor, " d_sae"],
    approximator: EffectApproximator,
    *,
    fgaa_features: int = 4,
    bias_weight: float = 1.0,
) -> Float[Tensor, " d_model"]:
    """SAE-TS whose target is what sets the contrast texts apart: the largest features of mean f(h+) - mean f(h-).

    Feature guided activation additions, arXiv 2501.09929. `feature_contrast` is 0 for features that fire on too many tokens, or
    mainly at the start of a text; only the `fgaa_features` largest positive entries are kept (the source's n1, 1 to 8 there).

    Raises:
        InputError: no feature fires more on the positive texts.
    """
    largest = feature_contrast.topk(min(fgaa_features, len(feature_contrast)))
    target = torch.zeros_like(feature_contrast)
    target[largest.indices] = largest.values.clamp(min=0)
    if not target.any():
        raise InputError(
            "fgaa: no feature fires more on the positive contrast texts than on the negative ones; write texts that differ more, "
            "or raise steering.max_density"
        )
    return sae_ts(target, approximator, bias_weight=bias_weight)


def ridge(
    target: Float[Tensor, " d_sae"],
    approximator: EffectApproximator,
    *,
    ridge_penalty: float = 1.0,
    ridge_target_size: float | None = None,
    bias_weight: float = 1.0,
) -> Float[Tensor, " d_model"]:
    """(M M' + lambda I)^-1 M (tau t - b): a path from the pseudoinverse to SAE-TS (method of this package).

    lambda is `ridge_penalty` times the mean eigenvalue of M M'. At 0 this is the pseudoinverse of tau t, and at infinity
    u(tau M t - M b). `ridge_target_size` is tau; by default that for which the path ends in SAE-TS of weight `bias_weight`, which
    is tau = ||M b|| / (bias_weight ||M t||), where M (tau t - b) is along u(M t) - bias_weight u(M b).
    """
    M, b = approximator.M.double(), approximator.b.double()
    towards, away = _towards(M, target.double()), M @ b
    if ridge_target_size is None:
        wanted = normalize(towards, dim=0) - bias_weight * normalize(away, dim=0)
    else:
        wanted = ridge_target_size * towards - away
    return solve(gram(approximator.M), wanted, ridge_penalty).float()


def constrained(
    target: Float[Tensor, " d_sae"],
    approximator: EffectApproximator,
    stillness: Float[Tensor, " d_sae"],
    *,
    bias_weight: float = 1.0,
    constrained_gamma: float | None = None,
) -> Float[Tensor, " d_model"]:
    """The unit x that maximises m'x - gamma/2 (M'x + b)' D (M'x + b), m = M t: the target, with the rest held still.

    D is diagonal: `stillness`, but 0 on features of the target. `constrained_gamma` None takes the largest gamma that still
    predicts as much of the target as SAE-TS of weight `bias_weight` does: so the predicted cost on the rest is the least
    possible, never above SAE-TS's. Global optimum; `SideEffects` says how (method of this package, no paper).
    """
    problem = SideEffects(approximator, target, torch.where(target == 0, stillness, 0.0))
    if constrained_gamma is not None:
        return problem.best(constrained_gamma).float()
    enough = normalize(sae_ts(target, approximator, bias_weight=bias_weight), dim=0)
    return problem.best(problem.largest_gamma(problem.gain(enough))).float()


def _towards(M: Float[Tensor, "d_model d_sae"], target: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_model"]:
    """M t; without it a method would only go away from M b.

    Raises:
        InputError: it is zero, as for features that no measured vector changed.
    """
    towards = M @ target
    if not towards.any():
        raise InputError(
            "the approximator knows of no vector that changes the target's features; choose other features, or measure "
            "more vectors"
        )
    return towards


METHODS: dict[str, Method] = {
    "caa": caa,
    "sae": sae,
    "sae_ts": sae_ts,
    "pinverse": pinverse,
    "pinverse_raw": pinverse,
    "rotation": rotation,
    "fgaa": fgaa,
    "ridge": ridge,
    "constrained": constrained,
}

KEEPS_LENGTH = ("pinverse_raw",)
"""Methods whose vector the released code leaves at its own length: a scale there adds so many times the vector."""


def build(method: str, ingredients: Any, **options: Any) -> Tensor:
    """The method's direction [d_model], not yet normalised.

    `ingredients` has an attribute for every parameter name; only those that the method names are read. Options the method does
    not have are ignored, so one set serves all methods.

    Raises:
        InputError: unknown method, or what the method finds wrong.
    """
    arguments = {name: getattr(ingredients, name) for name in ingredients_of(method)}
    direction: Tensor = METHODS[parse_method(method).base](**arguments, **options_of(method, options))
    return direction


def ingredients_of(method: str) -> list[str]:
    """Names of what the method is made from.

    Raises:
        InputError: unknown method.
    """
    parameters = inspect.signature(METHODS[parse_method(method).base]).parameters
    return [name for name, parameter in parameters.items() if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]


def options_of(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that the method has; its own go before them.

    Raises:
        InputError: unknown method.
    """
    base, own = parse_method(method)
    return {name: value for name, value in options.items() if name in METHOD_OPTIONS[base]} | dict(own)


def needs(method: str, ingredient: str) -> bool:
    """Whether the method has an ingredient of this name."""
    return ingredient in ingredients_of(method)
