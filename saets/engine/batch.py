"""The rows of one rollout batch, and which of them are read at each position."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saets.shapes import Float, Int
from saets.vector.positions import EVERYWHERE, Positions

FREE = -1
"""Marks a position that is sampled, in a matrix of forced tokens."""


class Row(NamedTuple):
    """One rollout to make."""

    prompt: str | tuple[int, ...]
    """Text, or token ids with BOS in front; "" is BOS alone."""
    seed: int
    """Signed 64-bit, from `sampling.row_seed`. Rows of one seed share their noise, whatever vector they have."""
    vector: int | None = None
    """Which of the vectors given to `run` is added; None leaves the row unsteered."""


class Batch:
    """The rows of one run in order of their prompts' lengths, so that at each position the first so many are being read."""

    def __init__(
        self,
        rows: Sequence[Row],
        prompts: Sequence[tuple[int, ...]],
        vectors: Tensor,
        length: int,
        *,
        share: bool,
        positions: Positions = EVERYWHERE,
    ) -> None:
        order = sorted(range(len(rows)), key=lambda i: (len(prompts[i]), i))
        self._prompts, self._starts = [prompts[i] for i in order], [len(prompts[i]) for i in order]
        self._owners = [-1 if rows[i].vector is None else rows[i].vector for i in order]
        self.length, self._share, self._positions = length, share, positions
        self.first = self._starts[0] if share else 0
        """The first position that is read row by row."""
        device = vectors.device
        forced = torch.full((len(rows), length), FREE, dtype=torch.int64)
        for row, prompt in enumerate(self._prompts):
            forced[row, : len(prompt)] = torch.tensor(prompt)
        self.tokens = forced.clamp(min=0).to(device)
        self._forced = forced.to(device)
        self._added = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])[self._owners]
        """Scale x vector of each row, zeros where it is unsteered."""
        self.seeds = torch.tensor([rows[i].seed for i in order], dtype=torch.int64, device=device)
        self.back = torch.tensor(order, device=device).argsort()
        """Where each row of the caller is now."""
        self.sums: Tensor | None = None

    def reading(self, position: int) -> int:
        """How many rows read their token at this position by themselves."""
        return self.generated(position) if self._share else len(self._starts)

    def generated(self, position: int) -> int:
        """How many rows have a generated token at this position."""
        return bisect.bisect_right(self._starts, position)

    def added(self, position: int) -> Float[Tensor, "rows d_model"]:
        """What is added at this position to the rows that read it by themselves: zeros where it is not steered."""
        active, generated = self.reading(position), self.generated(position)
        whole = self._added[:active]
        if self._positions.everywhere:
            return whole
        steered = {"all": slice(active), "prompt": slice(generated, active), "generated": slice(generated)}[self._positions.where]
        parts = torch.zeros_like(whole)
        if position > 0 or self._positions.bos:
            parts[steered] = whole[steered]
        return parts

    def shared_prompts(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """By length of prompt: the rows, the distinct (prompt, vector) pairs as tokens and what is added, and which is whose.

        What is added is [prompts, pos, d_model]; one position stands for all.
        """
        if not self._share:
            return
        for _, group in itertools.groupby(range(len(self._starts)), self._starts.__getitem__):
            rows = list(group)
            pairs = [(self._prompts[row], self._owners[row]) for row in rows]
            number = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
            of = torch.tensor([number[pair] for pair in pairs], device=self.tokens.device)
            examples = torch.tensor([rows[pairs.index(pair)] for pair in number], device=self.tokens.device)
            tokens = self.tokens[examples, : self._starts[rows[0]]]
            yield slice(rows[0], rows[-1] + 1), tokens, self._added_to_prompts(self._added[examples], tokens.shape[1]), of

    def _added_to_prompts(self, whole: Float[Tensor, "prompts d_model"], start: int) -> Float[Tensor, "prompts pos d_model"]:
        if self._positions.where == "generated":
            return torch.zeros_like(whole)[:, None]
        if self._positions.bos:
            return whole[:, None]
        parts = whole[:, None].repeat(1, start, 1)
        parts[:, 0] = 0
        return parts

    def take(self, drawn: Int[Tensor, " rows"], position: int) -> None:
        """Put drawn tokens at this position, but where a prompt still goes on its own token."""
        forced = self._forced[: len(drawn), position]
        self.tokens[: len(drawn), position] = torch.where(forced == FREE, drawn, forced)

    def add(self, encoded: Float[Tensor, "rows features"]) -> None:
        """Add to the sums of the first rows."""
        if self.sums is None:
            self.sums = encoded.new_zeros(len(self._starts), encoded.shape[1])
        self.sums[: len(encoded)] += encoded

    def same_shape(self, other: Batch) -> bool:
        """Whether every step has the same number of rows, steered at the same positions."""
        return all(getattr(self, name) == getattr(other, name) for name in ("_starts", "length", "_share", "_positions"))

    def load(self, other: Batch) -> None:
        """Take the content of another batch of the same shape into these tensors."""
        self._prompts, self._owners = other._prompts, other._owners
        for name in ("tokens", "_forced", "_added", "seeds", "back"):
            getattr(self, name).copy_(getattr(other, name))
        if self.sums is not None:
            self.sums.zero_()
