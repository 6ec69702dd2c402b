"""How strongly to steer: the scale at which a vector has a fixed effect on the model's next-token loss.

The residual stream of the calibration text is the same for every vector and scale, so it is computed once; each loss then
runs only the blocks above the hook (identity 2 of the method). The last token of a chunk predicts nothing and is left out.
Losses of many vectors and scales share a pass, whose shape is always the same.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saets.engine.decoder import Decoder
from saets.errors import InputError
from saets.shapes import Float, Int

PASS_ROWS = {"cpu": 64, "cuda": 256}
"""Chunks in one pass, by kind of device; on a CPU never more than one vector has, since a larger pass gains nothing there."""

LOGITS_AT_ONCE = 64
"""Rows of logits that a loss reads at once: few enough to stay in a CPU's cache."""

PAPER_GRID = tuple(20.0 * step for step in range(11))
"""The reference's scales."""


class ScaleRule(NamedTuple):
    """How a scale is chosen; one of the first three is given."""

    loss_increase: float | None = None
    """Raise the mean next-token loss by this much over the unsteered one (the paper's 0.5)."""
    target_loss: float | None = None
    """Raise it to this (the released code's 4.0 and 3.5 on Gemma)."""
    fixed_scale: float | None = None
    """No search."""
    grid: tuple[float, ...] = PAPER_GRID
    """Scales, rising from 0."""
    search: Literal["bracket", "scan"] = "bracket"
    """`scan` measures grid points in order, as the reference does; `bracket` goes straight for the two around the crossing."""


class Calibration(NamedTuple):
    """The outcome for one vector."""

    scale: float
    """L2 length to add to the residual stream; NaN where `outcome` is `not_finite`."""
    loss: float
    """Mean next-token loss at that scale: measured, or where the line between two grid points meets the target."""
    outcome: Literal["ok", "capped", "fixed", "not_finite"]
    """`ok`: target met; `capped`: never reached on the grid, the scale is the grid's end; `fixed`: no search; `not_finite`: the
    loss is NaN or infinite at `failed_at`."""
    failed_at: float | None = None
    """The scale that broke the model."""


ONSET = 0.1
"""Share of the calibrated rise in loss at which steering begins to show."""

ONSET_GRID = 10
"""Steps from 0 to the calibrated scale in which the onset is sought."""


class ScaleRange(NamedTuple):
    """From where steering shows to where text begins to break, for one vector."""

    low: float
    """Scale at which the loss has risen by `ONSET` of what it rises by at `high.scale`; NaN where it does not rise."""
    high: Calibration
    """The calibrated scale."""
    losses: tuple[tuple[float, float], ...]
    """Scales at which the loss was measured on the way, ascending from 0, and the losses that were finite."""


class Calibrator:
    """Finds scales for one model, hook and calibration text."""

    def __init__(self, decoder: Decoder, tokens: Int[Tensor, "chunks length"], rule: ScaleRule, *, bos: bool = True) -> None:
        """Runs the calibration text, BOS in front of each chunk, once through the blocks below the hook and once through all.

        `bos` says whether BOS is steered as all other positions are.

        Raises:
            InputError: a target that the unsteered model already exceeds.
        """
        self.decoder, self.rule, self._bos = decoder, rule, bos
        self._tokens = tokens.to(decoder.device)
        rows = PASS_ROWS.get(decoder.device.type, 64)
        self._rows = min(rows, len(tokens)) if decoder.device.type == "cpu" else rows
        self._residual = torch.cat([decoder.lower(part)[:, :-1] for part in self._tokens.split(self._rows)])
        """h_L before steering, [chunks, length - 1, d_model]."""
        self.unsteered_loss = self.losses([(torch.zeros(decoder.d_model), 0.0)])[0]
        """Mean next-token loss at scale 0: one number for the whole run."""
        if rule.target_loss is not None and rule.target_loss <= self.unsteered_loss:
            raise InputError(
                f"effects.target_loss is {rule.target_loss}, but the unsteered loss on the calibration text is already "
                f"{self.unsteered_loss:.3f}; give a higher target or effects.loss_increase"
            )
        self._first = len(rule.grid) // 2
        """Which grid scale `bracket` measures first: where a random direction, the same for all workers, crosses the target."""
        if rule.fixed_scale is None and rule.search == "bracket":
            pilot = torch.randn(decoder.d_model, generator=torch.Generator().manual_seed(0))
            found = self.calibrate([pilot / pilot.norm()])[0]
            if found.outcome == "ok":
                self._first = bisect.bisect_left(rule.grid, found.scale)

    @property
    def residual_length(self) -> float:
        """Median L2 length of h_L before steering, BOS left out."""
        return self._residual[:, 1:].float().norm(dim=-1).median().item()

    @property
    def target(self) -> float:
        """The loss that calibration aims at."""
        if self.rule.target_loss is not None:
            return self.rule.target_loss
        return self.unsteered_loss + (self.rule.loss_increase or 0.0)

    @torch.no_grad()
    def losses(self, steered: Sequence[tuple[Float[Tensor, " d_model"], float]]) -> list[float]:
        """Mean next-token loss in nats over the calibration text for each (unit vector, scale), at every position.

        Each figure is the same whatever it is computed together with.
        """
        chunks = len(self._tokens)
        added = torch.stack([scale * direction for direction, scale in steered]).to(self._residual)
        sums: list[Tensor] = []
        jobs = torch.arange(len(steered) * chunks, device=self.decoder.device)
        for part in jobs.split(self._rows):
            filled = torch.cat([part, part[-1:].expand(self._rows - len(part))])
            tokens, at_hook = self._tokens[filled % chunks], filled.to(self._residual.device)
            unsteered = self._residual[at_hook % chunks]
            residual = unsteered + added[at_hook // chunks, None]
            if not self._bos:
                residual[:, 0] = unsteered[:, 0]
            logits = self.decoder.upper(tokens[:, :-1], residual)
            sums.append(token_losses(logits, tokens[:, 1:]).double().sum(dim=1)[: len(part)])
        per_vector = torch.cat(sums).view(len(steered), chunks).sum(dim=1)
        return (per_vector / self._tokens[:, 1:].numel()).tolist()

    def calibrate(self, directions: Sequence[Float[Tensor, " d_model"]]) -> list[Calibration]:
        """The scale of each unit vector.

        `ok` is the reference's rule: the first grid scale whose loss exceeds the target, and from there back along the line to
        the grid point before. Never extrapolated: a target that is not reached gives the grid's end, `capped`. The search
        `bracket` takes the loss to rise with the scale, and then finds the same two points in fewer passes.
        """
        return [found for found, _ in self._calibrated(directions)]

    def _calibrated(self, directions: Sequence[Float[Tensor, " d_model"]]) -> list[tuple[Calibration, dict[float, float]]]:
        """The scale of each unit vector, and the losses measured for it by scale."""
        if not directions:
            return []
        if self.rule.fixed_scale is not None:
            scale = self.rule.fixed_scale
            losses = self.losses([(direction, scale) for direction in directions])
            known = {0.0: self.unsteered_loss}
            return [(_finite(Calibration(scale, loss, "fixed"), scale), {**known, scale: loss}) for loss in losses]
        searches = [_Search(self.rule, self.unsteered_loss, self.target, self._first) for _ in directions]
        return [(found, search.losses()) for found, search in zip(self._found(searches, directions), searches, strict=True)]

    def ranges(self, directions: Sequence[Float[Tensor, " d_model"]]) -> list[ScaleRange]:
        """The scales between which each unit vector is of use.

        The onset is where the loss crosses `ONSET` of the calibrated rise, on the line between two of `ONSET_GRID` steps.
        """
        calibrated = self._calibrated(directions)
        highs, losses = [found for found, _ in calibrated], [measured for _, measured in calibrated]
        rising = [i for i, high in enumerate(highs) if high.loss > self.unsteered_loss and high.scale > 0]
        searches = [self._onset(highs[i]) for i in rising]
        lows = dict(zip(rising, self._found(searches, [directions[i] for i in rising]), strict=True))
        for i, search in zip(rising, searches, strict=True):
            losses[i] |= search.losses()
        finite = [tuple(sorted(pair for pair in measured.items() if math.isfinite(pair[1]))) for measured in losses]
        return [ScaleRange(lows[i].scale if i in lows else math.nan, high, finite[i]) for i, high in enumerate(highs)]

    def _onset(self, high: Calibration) -> _Search:
        """The search for where the loss has risen by a share of what it rises by at a calibrated scale."""
        grid = tuple(high.scale * step / ONSET_GRID for step in range(ONSET_GRID + 1))
        target = self.unsteered_loss + ONSET * (high.loss - self.unsteered_loss)
        return _Search(ScaleRule(grid=grid), self.unsteered_loss, target, first=round(math.sqrt(ONSET) * ONSET_GRID))

    def _found(self, searches: Sequence[_Search], directions: Sequence[Float[Tensor, " d_model"]]) -> list[Calibration]:
        """What each direction's search ends with; losses that several ask for at once are measured together."""
        while any(asking := [search.wanted() for search in searches]):
            points = [(i, scale) for i, scales in enumerate(asking) for scale in scales]
            found = self.losses([(directions[i], scale) for i, scale in points])
            for (i, scale), loss in zip(points, found, strict=True):
                searches[i].take(scale, loss)
        return [search.outcome() for search in searches]


class _Search:
    """The search for one vector's crossing: grid points measured so far, and which are wanted next."""

    def __init__(self, rule: ScaleRule, unsteered_loss: float, target: float, first: int) -> None:
        self._first = first
        self._grid, self._target, self._scan = rule.grid, target, rule.search == "scan"
        self._losses = {0: unsteered_loss}

    def take(self, scale: float, loss: float) -> None:
        """A measured loss; one that is not finite counts as beyond the target."""
        self._losses[self._grid.index(scale)] = loss if math.isfinite(loss) else math.inf

    def losses(self) -> dict[float, float]:
        """What has been measured, by scale."""
        return {self._grid[i]: loss for i, loss in self._losses.items()}

    def _bracket(self) -> tuple[int, int]:
        """The highest measured point from which the loss has not exceeded the target, and the lowest above it that has."""
        above = min((i for i, loss in self._losses.items() if loss > self._target), default=len(self._grid))
        return max(i for i in self._losses if i < above), above

    def wanted(self) -> list[float]:
        """Grid scales to measure next; none when the crossing is found."""
        below, above = self._bracket()
        if above - below <= 1:
            return []
        if self._scan:
            return [self._grid[below + 1]]
        return [self._grid[i] for i in self._guess(below, above)]

    def _guess(self, below: int, above: int) -> list[int]:
        """Where the crossing should be if the loss rises with the square of the scale; both points around it where that helps."""
        known = max(i for i in self._losses if i <= min(above, len(self._grid) - 1) and math.isfinite(self._losses[i]))
        if known == 0:
            return [self._first if below < self._first < above else (below + above) // 2]
        rise = max(self._losses[known] - self._losses[0], 1e-9)
        scale = self._grid[known] * math.sqrt(max(self._target - self._losses[0], 0) / rise)
        high = min(max(bisect.bisect_left(self._grid, scale), below + 1), above)
        points = {high - 1, high} - self._losses.keys()
        return sorted(i for i in points if below < i < min(above, len(self._grid)))

    def outcome(self) -> Calibration:
        """The scale, once `wanted` is empty."""
        below, above = self._bracket()
        if above == len(self._grid):
            return Calibration(self._grid[below], self._losses[below], "capped")
        if not math.isfinite(self._losses[above]):
            return Calibration(math.nan, math.nan, "not_finite", self._grid[above])
        share = (self._target - self._losses[below]) / (self._losses[above] - self._losses[below])
        return Calibration(self._grid[below] + share * (self._grid[above] - self._grid[below]), self._target, "ok")


def _finite(found: Calibration, scale: float) -> Calibration:
    return found if math.isfinite(found.loss) else Calibration(math.nan, math.nan, "not_finite", scale)


def token_losses(logits: Float[Tensor, "rows pos d_vocab"], tokens: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows pos"]:
    """Cross entropy in nats of the tokens that the logits predict, in float32."""
    flat, wanted = logits.flatten(0, 1), tokens.flatten()
    parts = [part.float().logsumexp(dim=-1) for part in flat.split(LOGITS_AT_ONCE)]
    chosen = flat.gather(1, wanted[:, None]).squeeze(1).float()
    return (torch.cat(parts) - chosen).view(tokens.shape)
