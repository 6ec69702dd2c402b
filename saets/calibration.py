"""How strongly to steer: the scale at which a vector has a fixed effect on the model's next-token loss.

The residual stream of the calibration text is the same for every vector and scale, so it is computed once; each loss then
runs only the blocks above the hook (identity 2 of the method).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saets.config import DATASET, Effects, packaged
from saets.errors import InputError
from saets.model import check_hook, encode, upper_half

LOSS_BATCH = 64
"""Chunks run together."""


class NotFinite(ArithmeticError):
    """Steering by this vector makes the model's loss NaN or infinite."""


class Calibration(NamedTuple):
    """The outcome for one vector."""

    scale: float
    """L2 length to add to the residual stream."""
    loss: float
    """Mean next-token loss at that scale: measured, or where the line between two grid points meets the target."""
    outcome: Literal["ok", "capped", "fixed"]
    """`ok`: target met; `capped`: never reached on the grid, the scale is the grid's end; `fixed`: no calibration."""


class Calibrator:
    """Finds scales for one model, hook and calibration text."""

    @torch.no_grad()
    def __init__(self, model: Any, hook_name: str, settings: Effects) -> None:
        """Runs the calibration text once.

        Raises:
            InputError: text missing or too short, or a target that the unsteered model already exceeds.
        """
        check_hook(model, hook_name)
        self.model, self.hook_name, self.settings = model, hook_name, settings
        device = next(model.original_model.parameters()).device
        self._tokens = calibration_tokens(model.tokenizer, settings).to(device)
        stop = int(hook_name.split(".")[1]) + 1
        self._residual = [
            model.run_with_cache(part, names_filter=hook_name, stop_at_layer=stop)[1][hook_name]
            for part in self._tokens.split(LOSS_BATCH)
        ]
        self.unsteered_loss = self.loss(torch.zeros(model.cfg.d_model), 0.0)
        """Mean next-token loss at scale 0: one number for the whole run."""
        if settings.target_loss is not None and settings.target_loss <= self.unsteered_loss:
            raise InputError(
                f"effects.target_loss is {settings.target_loss}, but the unsteered loss on the calibration text is already "
                f"{self.unsteered_loss:.3f}; give a higher target or effects.loss_increase"
            )

    @torch.no_grad()
    def loss(self, direction: Float[Tensor, " d_model"], scale: float) -> float:
        """Mean next-token loss in nats over the calibration text, steered at every position, BOS included."""
        total, count = 0.0, 0
        for tokens, residual in zip(self._tokens.split(LOSS_BATCH), self._residual, strict=True):
            added = (scale * direction).to(residual)
            with upper_half(self.model, self.hook_name, residual + added) as upper:
                logits = upper(tokens)
            total += next_token_losses(logits, tokens).sum().item()
            count += tokens[:, 1:].numel()
        return total / count

    def calibrate(self, direction: Float[Tensor, " d_model"]) -> Calibration:
        """The scale of the unit vector `direction`.

        The grid is tried in order until the loss first exceeds the target; the scale lies on the line between that point
        and the one before. Never extrapolated: a target that is not reached gives the grid's end, `capped`.

        Raises:
            NotFinite: the loss is NaN or infinite at a scale that was tried.
        """
        settings = self.settings
        if settings.fixed_scale is not None:
            return Calibration(settings.fixed_scale, self._finite_loss(direction, settings.fixed_scale), "fixed")
        target = self.target
        before = (settings.scale_grid[0], self.unsteered_loss)
        for scale in settings.scale_grid[1:]:
            loss = self._finite_loss(direction, scale)
            if loss > target:
                share = (target - before[1]) / (loss - before[1])
                return Calibration(before[0] + share * (scale - before[0]), target, "ok")
            before = (scale, loss)
        return Calibration(*before, "capped")

    def _finite_loss(self, direction: Float[Tensor, " d_model"], scale: float) -> float:
        loss = self.loss(direction, scale)
        if not math.isfinite(loss):
            raise NotFinite(f"the model's loss is not finite at scale {scale:g}")
        return loss

    @property
    def target(self) -> float:
        """The loss that calibration aims at."""
        if self.settings.target_loss is not None:
            return self.settings.target_loss
        return self.unsteered_loss + (self.settings.loss_increase or 0.0)


def next_token_losses(logits: Float[Tensor, "rows pos d_vocab"], tokens: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos-1"]:
    """Cross entropy in nats of each token given those before it; the first token has none."""
    flat = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], tokens.shape[1] - 1)


def calibration_tokens(tokenizer: Any, settings: Effects) -> Int[Tensor, "chunks length"]:
    """The calibration text in chunks of `calibration_length` tokens, each BOS and then a run of one passage's tokens."""
    length = settings.calibration_length
    chunks: list[list[int]] = []
    for passage in _passages(settings.calibration_text):
        bos, *tokens = encode(tokenizer, passage)
        for at in range(0, len(tokens) - length + 2, length - 1):
            chunks.append([bos, *tokens[at : at + length - 1]])
            if len(chunks) == settings.calibration_chunks:
                return torch.tensor(chunks)
    raise InputError(
        f"calibration text {settings.calibration_text} gives {len(chunks)} chunks of {length} tokens; "
        f"effects.calibration_chunks asks for {settings.calibration_chunks}: give a longer text or ask for fewer"
    )


def _passages(source: str) -> Iterable[str]:
    if source.startswith(DATASET):
        return _dataset(source.removeprefix(DATASET))
    path = packaged(source)
    if not path.is_file():
        raise InputError(f"no such calibration text: {path}")
    return path.read_text(encoding="utf-8").splitlines()


def _dataset(name: str) -> Iterable[str]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        return (row["text"] for row in rows)
    except (OSError, ValueError) as error:
        raise InputError(
            f"calibration dataset {name!r} could not be opened: {str(error).strip().splitlines()[0]} "
            "Set effects.calibration_text to a text file, or run where the hub can be reached"
        ) from error
