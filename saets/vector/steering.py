"""A model steered while a `with` block runs: a `TransformerBridge`, or a transformers causal language model as it is.

Which tokens are the prompt and which were generated is read off the key and value cache: a forward pass without earlier keys
reads a prompt, one token on top of earlier keys was generated. What cannot be told apart is refused, never guessed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saets.engine.decoder import Unsupported, find_blocks
from saets.errors import InputError, unknown
from saets.hooks import blocks_below, layer_of
from saets.shapes import Float
from saets.vector.positions import Positions


class Steerable(NamedTuple):
    """What is known of a model before it is steered."""

    name: str
    """Empty where the model does not say."""
    d_model: int
    n_blocks: int


def steerable(model: Any) -> Steerable:
    """Name and sizes of a `TransformerBridge` or a transformers model.

    Raises:
        InputError: something else.
    """
    if is_bridge(model):
        return Steerable(str(model.cfg.model_name or ""), model.cfg.d_model, model.cfg.n_layers)
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "get_text_config"):
        raise InputError(
            f"a {type(model).__name__} cannot be steered; expected a TransformerBridge (saets.load_model) or a transformers "
            "causal language model"
        )
    sizes = config.get_text_config()
    return Steerable(str(getattr(model, "name_or_path", "")), sizes.hidden_size, sizes.num_hidden_layers)


def is_bridge(model: Any) -> bool:
    """Whether the model has TransformerLens' hooks."""
    return hasattr(model, "hook_dict")


@contextlib.contextmanager
def steered(model: Any, hook_name: str, added: Float[Tensor, " d_model"], positions: Positions) -> Iterator[Any]:
    """Add a vector to the residual stream at a hook while the block runs; the model is unhooked afterwards, whatever happens.

    Several may be active at once, and add up. Rows may be padded on either side; one row holds one text.

    Raises:
        InputError: the model has no such hook or another width; on the way, positions that cannot be told; at the end, where no
            exception is on its way already, that nothing was steered.
    """
    _, d_model, n_blocks = steerable(model)
    if not (hook_name in model.hook_dict if is_bridge(model) else layer_of(hook_name) < n_blocks):
        raise unknown("hook name", hook_name, (f"blocks.{i}.hook_resid_post" for i in range(n_blocks)))
    if len(added) != d_model:
        raise InputError(
            f"the vector has {len(added)} numbers, the model's residual stream {d_model}; it belongs to another model"
        )
    steering = _Steering(added, positions)
    with _bridge_hooked(model, hook_name, steering) if is_bridge(model) else _plain_hooked(model, hook_name, steering):
        yield model
    steering.check(hook_name)


@contextlib.contextmanager
def _bridge_hooked(bridge: Any, hook_name: str, steering: _Steering) -> Iterator[None]:
    def steer(residual: Tensor, hook: Any) -> Tensor:
        return steering.add(residual)

    handle = bridge.original_model.register_forward_pre_hook(steering.begin, with_kwargs=True)
    try:
        with bridge.hooks(fwd_hooks=[(hook_name, steer)]):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _plain_hooked(model: nn.Module, hook_name: str, steering: _Steering) -> Iterator[None]:
    try:
        blocks = find_blocks(model, steerable(model).n_blocks)
    except Unsupported as error:
        raise InputError(f"{error}; load the model with saets.load_model and steer that") from error

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (steering.add(output[0]), *output[1:])
        return steering.add(output)

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            return (steering.add(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": steering.add(kwargs["hidden_states"])}

    handles = [model.register_forward_pre_hook(steering.begin, with_kwargs=True)]
    try:
        if (below := blocks_below(hook_name)) == 0:
            handles.append(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(blocks[below - 1].register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Steering:
    """Adds a vector where it belongs, and knows whether that was anywhere."""

    def __init__(self, added: Tensor, positions: Positions) -> None:
        self._added, self._positions = added, positions
        self._passed: Mapping[str, Any] | None = None
        """What the model was last called with."""
        self._cached = 0
        """How many positions had been read before that call; blocks add to the cache as they run."""
        self._text: Tensor | None = None
        """What the last pass without earlier keys read."""
        self._ran, self._steered = False, False

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-hook of the whole model: a forward pass begins."""
        if self._positions.everywhere:
            return
        self._passed = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        self._cached = _length(self._passed.get("past_key_values"))
        if self._positions.where != "all" and self._cached == 0:
            self._new_text()

    def add(self, residual: Tensor) -> Tensor:
        """The residual stream [rows, pos, d_model] with the vector added where it belongs."""
        self._ran = True
        if self._positions.everywhere:
            self._steered = True
            return residual + self._added.to(residual)
        if self._passed is None:
            raise InputError(f"a block was called by itself, and only {self._positions} may be steered; call the whole model")
        starts, length = self._cached == 0, residual.shape[1]
        if self._positions.where != "all":
            if not starts and length > 1:
                raise InputError(
                    f"{length} tokens were read on top of earlier keys, so prompt and generated tokens cannot be told apart; "
                    "give the prompt in one pass and generate token by token, or steer every position"
                )
            if starts != (self._positions.where == "prompt"):
                return residual
        skip_bos = starts and not self._positions.bos
        self._steered |= not skip_bos or length > 1
        if not skip_bos:
            return residual + self._added.to(residual)
        first = self._first(residual)
        steered = torch.arange(length, device=residual.device) != first[:, None]
        return residual + steered[..., None] * self._added.to(residual)

    def check(self, hook_name: str) -> None:
        """Raise `InputError` where nothing was steered."""
        if not self._ran:
            raise InputError(
                f"nothing was steered: the model never ran {hook_name} inside the `with` block. Call the very model that was "
                "given, not a copy or a compiled or wrapped one"
            )
        if not self._steered:
            raise InputError(
                f"nothing was steered: only {self._positions} may be, and the model read none inside the `with` block. A text "
                "that is given counts as prompt; generated tokens are those that `generate` reads again"
            )

    def _new_text(self) -> None:
        """Refuse a text that is read again from its start with more tokens: which of them are the prompt is not known."""
        assert self._passed is not None
        text = self._passed.get("input_ids")
        text = self._passed.get("inputs_embeds") if text is None else text
        before, self._text = self._text, text
        if before is None or text is None or len(before) != len(text) or before.shape[1] >= text.shape[1]:
            return
        if torch.equal(text[:, : before.shape[1]], before):
            raise InputError(
                "the same text came again, longer and without earlier keys, so prompt and generated tokens cannot be told apart; "
                "generate with a cache (use_cache=True), score each text in a `with` block of its own, or steer every position"
            )

    def _first(self, residual: Tensor) -> Tensor:
        """Index of each row's first token that is not padding, [rows]."""
        assert self._passed is not None
        mask = self._passed.get("attention_mask")
        if mask is None:
            return torch.zeros(len(residual), dtype=torch.int64, device=residual.device)
        if not isinstance(mask, Tensor) or mask.shape != residual.shape[:2]:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(
                f"attention_mask is {shape}, so where each text begins is not known; expected {list(residual.shape[:2])}, or "
                "steer BOS too"
            )
        return mask.to(residual.device).long().argmax(dim=1)


def _length(past: Any) -> int:
    """How many positions a key and value cache holds."""
    if past is None:
        return 0
    if not hasattr(past, "get_seq_length"):
        raise InputError(f"past_key_values is a {type(past).__name__}, whose length is unknown; give a transformers Cache")
    return int(past.get_seq_length())
