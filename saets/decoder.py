"""Two ways to run a language model for rollouts and for calibration: through plain transformers modules, or a bridge.

`PlainDecoder` is the fast one. It runs the model's own transformers code, with one forward hook on the block that is steered
and buffers of a fixed size for keys and values. `BridgeDecoder` runs any TransformerBridge by its hooks, and is what the fast
one is tested against.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from saets.attention import KERNEL, RolloutCache
from saets.errors import InputError, unknown
from saets.hooks import blocks_below, layer_of
from saets.shapes import Float, Int

logger = logging.getLogger(__name__)

PLAIN = "plain"
"""Attribute under which a bridge made by `load_model` keeps a transformers model that shares its weights."""

PROBE_TOLERANCE = 0.1
"""Largest difference of a logit, as a share of the logits' spread, at which the fast path counts as the same model."""


class Step(NamedTuple):
    """What one step gives."""

    residual: Float[Tensor, "rows d_model"]
    """h_L of the token just read, before the vector is added."""
    logits: Float[Tensor, "rows d_vocab"] | None
    """For the next token; None where only the residual was asked for."""


@runtime_checkable
class Steps(Protocol):
    """A batch of rows being decoded."""

    def prompts(
        self, tokens: Int[Tensor, "prompts pos"], added: Float[Tensor, "prompts d_model"], rows: slice, of: Int[Tensor, " rows"]
    ) -> Float[Tensor, "prompts d_vocab"]:
        """Read prompts once each, for all the rows that begin with them; logits of their next token."""
        ...

    def step(self, tokens: Int[Tensor, " rows"], position: int, added: Float[Tensor, "rows d_model"], *, last: bool) -> Step:
        """Read the token at this position of the first rows; the `last` one is read only up to the hook."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """A language model split at a hook."""

    d_model: int
    d_vocab: int
    n_blocks: int
    device: torch.device
    dtype: torch.dtype
    shares_prompts: bool
    """Whether `Steps.prompts` can be used."""

    def bytes_per_row(self, length: int) -> int:
        """Memory that one more row takes while decoding: keys, values, logits and the widest activations."""
        ...

    def steps(self, rows: int, length: int) -> contextlib.AbstractContextManager[Steps]:
        """Decode up to `rows` rows of `length` tokens; the model is as before afterwards, also after an exception."""
        ...

    def lower(self, tokens: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        """The unsteered residual stream at the hook."""
        ...

    def upper(self, tokens: Int[Tensor, "rows pos"], residual: Float[Tensor, "rows pos d_model"]) -> Tensor:
        """Logits [rows, pos, d_vocab] of the blocks above the hook, from a given residual stream (identity 2 of the method)."""
        ...


def decoder_for(model: Any, hook_name: str) -> Decoder:
    """The fast decoder where the model can be run that way and gives the same logits, else the bridge's.

    `model` is a `TransformerBridge` or a transformers causal language model.

    Raises:
        InputError: no such hook, or a plain model that only a bridge can run.
    """
    if not isinstance(model, PreTrainedModel):
        check_hook(model, hook_name)
    plain = model if isinstance(model, PreTrainedModel) else getattr(model, "__dict__", {}).get(PLAIN)
    reason = "the bridge has no plain model of the same weights"
    if plain is not None:
        try:
            return PlainDecoder(plain, hook_name)
        except NotImplementedError as error:
            reason = str(error)
    if isinstance(model, PreTrainedModel):
        raise InputError(f"{type(model).__name__} cannot be steered as it is ({reason}); load it with saets.load_model")
    logger.info("decoding through the bridge's hooks: %s", reason)
    return BridgeDecoder(model, hook_name)


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model of the same weights: modules and config are copied, tensors are not."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class PlainDecoder:
    """A transformers causal language model, run by its own code."""

    shares_prompts = True

    def __init__(self, model: PreTrainedModel, hook_name: str) -> None:
        """Checks on a few tokens that the rollout attention gives the model's own logits.

        Raises:
            InputError: no such block.
            NotImplementedError: the model is not built of blocks in a row, or needs attention that is not computed here.
        """
        self.model = model
        config = model.config.get_text_config()
        self.d_model, self.d_vocab, self.n_blocks = config.hidden_size, config.vocab_size, config.num_hidden_layers
        self.device, self.dtype = model.device, model.dtype
        self._below = blocks_below(hook_name)
        if layer_of(hook_name) >= self.n_blocks:
            raise unknown("hook name", hook_name, (f"blocks.{i}.hook_resid_post" for i in range(self.n_blocks)))
        self._blocks = find_blocks(model, self.n_blocks)
        if self._below == 0:
            raise NotImplementedError("the hook lies before the first block")
        self._hooked = self._blocks[self._below - 1]
        self._cache: RolloutCache | None = None
        self._probe()

    def bytes_per_row(self, length: int) -> int:
        return _bytes_per_row(self.model.config, length, self.dtype)

    @contextlib.contextmanager
    def steps(self, rows: int, length: int) -> Iterator[_PlainSteps]:
        if self._cache is None or (self._cache.rows, self._cache.length) != (rows, length):
            self._cache = None  # freed before the next one is made
            self._cache = RolloutCache(rows, length, self.n_blocks)
        running = _PlainSteps(self.model, self._cache)
        handle = self._hooked.register_forward_hook(running.steer)
        try:
            with _attention(self.model, KERNEL):
                yield running
        finally:
            handle.remove()

    @torch.no_grad()
    def lower(self, tokens: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        def catch(module: nn.Module, args: Any, output: Any) -> None:
            raise _Caught(_hidden(output))

        handle = self._hooked.register_forward_hook(catch)
        try:
            with _attention(self.model, KERNEL):
                self.model(tokens, use_cache=False)
        except _Caught as caught:
            return caught.residual
        finally:
            handle.remove()
        raise RuntimeError("the hooked block did not run")

    @torch.no_grad()
    def upper(self, tokens: Int[Tensor, "rows pos"], residual: Float[Tensor, "rows pos d_model"]) -> Tensor:
        with _attention(self.model, KERNEL), _skipped(self._blocks[: self._below], residual):
            logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits

    @torch.no_grad()
    def _probe(self) -> None:
        """Compare logits with the model's own attention on a few tokens, step by step and all at once."""
        tokens = (torch.arange(2 * 6, device=self.device).view(2, 6) * 7 + 1) % self.d_vocab
        expected = self.model(tokens, use_cache=False).logits[:, -1].float()
        added = torch.zeros(2, self.d_model, device=self.device, dtype=self.dtype)
        try:
            with self.steps(2, 6) as running:
                running.prompts(tokens[:, :3], added, slice(0, 2), torch.arange(2, device=self.device))
                for position in range(3, 6):
                    found = running.step(tokens[:, position], position, added, last=False)
            upper = self.upper(tokens, self.lower(tokens))[:, -1]
        except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            raise NotImplementedError(f"the rollout attention does not fit {type(self.model).__name__} ({error})") from error
        finally:
            self._cache = None
        assert found.logits is not None
        off = max((logits.float() - expected).abs().max().item() for logits in (found.logits, upper))
        if not off <= PROBE_TOLERANCE * expected.std().item():
            raise NotImplementedError(f"the rollout attention gives {type(self.model).__name__} logits that differ by {off:.3g}")


class _PlainSteps:
    """`Steps` of a `PlainDecoder`."""

    def __init__(self, model: PreTrainedModel, cache: RolloutCache) -> None:
        self._model, self._cache = model, cache
        self._added: Tensor | None = None
        self._residual: Tensor | None = None
        self._last = False

    def steer(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The forward hook on the steered block."""
        hidden = _hidden(output)
        if self._last:
            raise _Caught(hidden)
        assert self._added is not None
        self._residual = hidden
        steered = hidden + self._added[:, None, :]
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    @torch.no_grad()
    def prompts(self, tokens: Tensor, added: Tensor, rows: slice, of: Tensor) -> Tensor:
        self._cache.shared_by = (rows, of)
        try:
            return self._forward(tokens, 0, added)
        finally:
            self._cache.shared_by = None

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, added: Tensor, *, last: bool) -> Step:
        self._last = last
        try:
            logits = self._forward(tokens[:, None], position, added)
        except _Caught as caught:
            return Step(caught.residual[:, -1], None)
        assert self._residual is not None
        return Step(self._residual[:, -1], logits)

    def _forward(self, tokens: Tensor, position: int, added: Tensor) -> Tensor:
        self._added, self._residual = added, None
        self._cache.position = position
        at = torch.arange(position, position + tokens.shape[1], device=tokens.device)[None]
        out: Any = self._model(tokens, position_ids=at, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        if self._residual is None:
            raise RuntimeError("the steered block did not run; the rows were not steered")
        logits: Tensor = out.logits[:, -1]
        return logits


class BridgeDecoder:
    """Any `TransformerBridge`, run through its hooks."""

    shares_prompts = False

    def __init__(self, bridge: Any, hook_name: str) -> None:
        """Raises `InputError` where the bridge has no such hook; it would otherwise be ignored in silence."""
        check_hook(bridge, hook_name)
        self.bridge, self.hook_name = bridge, hook_name
        first = next(bridge.original_model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.d_model, self.d_vocab, self.n_blocks = bridge.cfg.d_model, bridge.cfg.d_vocab, bridge.cfg.n_layers

    def bytes_per_row(self, length: int) -> int:
        return 2 * _bytes_per_row(self.bridge.original_model.config, length, self.dtype)  # the growing cache is copied

    @contextlib.contextmanager
    def steps(self, rows: int, length: int) -> Iterator[_BridgeSteps]:
        running = _BridgeSteps(self.bridge, layer_of(self.hook_name) + 1)
        with self.bridge.hooks(fwd_hooks=[(self.hook_name, running.steer)]):
            yield running

    @torch.no_grad()
    def lower(self, tokens: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos d_model"]:
        stop = layer_of(self.hook_name) + 1
        _, cache = self.bridge.run_with_cache(tokens, names_filter=self.hook_name, stop_at_layer=stop)
        residual: Tensor = cache[self.hook_name]
        return residual

    @torch.no_grad()
    def upper(self, tokens: Int[Tensor, "rows pos"], residual: Float[Tensor, "rows pos d_model"]) -> Tensor:
        below = blocks_below(self.hook_name)
        if below == 0:
            raise InputError(f"hook_name {self.hook_name!r} lies before the first block; use hook_resid_post or a later block")
        with _skipped(list(self.bridge.blocks)[:below], residual):
            logits: Tensor = self.bridge(tokens)
        return logits


class _BridgeSteps:
    """`Steps` of a `BridgeDecoder`."""

    def __init__(self, bridge: Any, stop_at_layer: int) -> None:
        self._bridge, self._stop = bridge, stop_at_layer
        self._cache = DynamicCache(config=bridge.original_model.config)
        self._added: Tensor | None = None
        self._residual: Tensor | None = None

    def steer(self, residual: Tensor, hook: Any) -> Tensor:
        """The forward hook on the residual stream."""
        assert self._added is not None
        self._residual = residual
        return residual + self._added[:, None, :]

    def prompts(self, tokens: Tensor, added: Tensor, rows: slice, of: Tensor) -> Tensor:
        raise NotImplementedError("a bridge reads every row from BOS")

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, added: Tensor, *, last: bool) -> Step:
        self._added, self._residual = added, None
        stop = {"stop_at_layer": self._stop} if last else {}
        out = self._bridge(tokens[:, None], past_key_values=self._cache, use_cache=True, **stop)
        if self._residual is None:
            raise RuntimeError("the hook did not run; the rows were not steered")
        return Step(self._residual[:, -1], None if last else out[:, -1])


def check_hook(bridge: Any, hook_name: str) -> None:
    """Raise `InputError` where the bridge has no such residual-stream hook; it would otherwise be ignored in silence."""
    if hook_name not in bridge.hook_dict:
        raise unknown("hook name", hook_name, (f"blocks.{i}.hook_resid_post" for i in range(bridge.cfg.n_layers)))
    blocks_below(hook_name)


def find_blocks(model: nn.Module, n_blocks: int) -> list[nn.Module]:
    """The model's blocks in order: its one list of that many modules.

    Raises:
        NotImplementedError: no such list, or several.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == n_blocks]
    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    if not lists or sizes.count(max(sizes)) > 1:
        raise NotImplementedError(f"{type(model).__name__} is not one list of {n_blocks} blocks")
    return list(lists[sizes.index(max(sizes))])


def _bytes_per_row(config: Any, length: int, dtype: torch.dtype) -> int:
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cached = 2 * text.num_hidden_layers * heads * d_head * length
    widest = 4 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    return (cached + widest + 2 * text.vocab_size) * dtype.itemsize


class _Caught(Exception):
    """Carries the residual stream out of a forward pass that need not go further."""

    def __init__(self, residual: Tensor) -> None:
        self.residual = residual


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextlib.contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model use another attention function; its own is back afterwards, also after an exception."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise NotImplementedError(f"{type(model).__name__} does not let its attention be chosen")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _skipped(blocks: list[nn.Module], residual: Tensor) -> Iterator[None]:
    """Make blocks pass their input through, and the last of them return `residual`; restored afterwards."""

    def through(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    def enter(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return residual

    try:
        for block in blocks[:-1]:
            block.__dict__["forward"] = through
        blocks[-1].__dict__["forward"] = enter
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
