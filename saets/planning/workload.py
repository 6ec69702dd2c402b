"""How much work a run has before it: vectors, rollouts, tokens, tokens x blocks and operations, stage by stage.

Everything here is counted, not timed. The last batch of a stage is filled up, which costs time (`jobs`) and counts as no work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from saets.effects.worker import rollouts_per_vector, rows_per_step
from saets.experiment.config import Effects, Experiment
from saets.generation import texts_per_batch
from saets.hooks import blocks_below
from saets.judge.local import REFERENCE_ROWS
from saets.methods.formulas import ingredients_of
from saets.planning.left import Left
from saets.planning.machines import Cost
from saets.planning.sizes import ModelSize, PromptSizes, SaeSize
from saets.stages.evaluate import GRADE_BATCH
from saets.stages.ingredients import READ_BY_ACTORS
from saets.stages.measures import TEXTS_AT_ONCE

LOSSES = {"bracket": 2.4, "scan": 3.6}
"""Losses that a vector's calibration measures, by search; `scripts/measure_calibration.py` on SmolLM2, 2026-11-25."""

ONSET_LOSSES = 2.4
"""And as many again for where steering begins to show."""

EMBEDDER_FLOPS = 2 * 22e6 * 40
"""Operations in which the local judge's embedder reads a text: 22 million weights, some forty word pieces."""

CONTRAST_TOKENS = 16
"""About what a contrast text has."""

LOGIT_PASSES = 2
"""How often logits go through memory in a step: written, and read by the search for the top k."""


class Part(NamedTuple):
    """One kind of work in a stage."""

    stage: str
    what: str
    items: int
    tokens: int
    """That go through the model."""
    token_blocks: float
    """Tokens x blocks, with the unembedding and the SAE's encoder counted in blocks."""
    flops: float
    work: str
    """`decode`, `pass` or `bridge`: how well a device does it."""
    jobs: int
    """Pieces that actors take one at a time."""
    job: Cost
    """Of one piece, which has always the same size."""


class Sizes(NamedTuple):
    """What is run, in which precision."""

    model: ModelSize
    sae: SaeSize
    prompts: PromptSizes
    dtype: torch.dtype


def workload(experiment: Experiment, left: Left, sizes: Sizes, rows: int) -> list[Part]:
    """The work of every stage on the model that is left, where actors decode so many rows together while they measure."""
    found = [
        _rollouts(experiment, left, sizes, rows),
        _calibration(experiment, left, sizes, rows),
        _contrasts(experiment, left, sizes),
        _ranges(experiment, left, sizes),
        _texts(experiment, left, sizes),
        _grades(experiment, left, sizes),
        _figures(experiment, left, sizes),
    ]
    return [part for part in found if part is not None and part.items]


def _rollouts(experiment: Experiment, left: Left, sizes: Sizes, rows: int) -> Part | None:
    """Decoding, and h_L of every generated token through the encoder. A prompt is read once a vector, for all its rows."""
    settings, items = experiment.effects, left.vectors + left.blocks
    starts = sizes.prompts.of(settings.prompts, settings.prompt_format)
    of_model, below, each = sizes.model, blocks_below(experiment.hook_name), rollouts_per_vector(settings)
    context = settings.length / 2
    read = sum(_distinct(settings, starts))
    steps = settings.rollouts * sum(settings.length - start for start in starts)
    whole = read + steps - each  # the last token of a row is read up to the hook
    flops = whole * of_model.flops(of_model.n_blocks, head=True, context=context)
    flops += each * of_model.flops(below, head=False, context=settings.length)
    encoder = steps * sizes.sae.flops()
    token_blocks = whole * _whole(of_model) + each * below + steps * sizes.sae.d_sae * of_model.d_model / of_model.block_weights
    together = max(1, rows_per_step(rows, each) // each)
    pieces = math.ceil(each / rows) if rows < each else 1
    positions = settings.length - min(starts)
    job = Cost(
        together * flops,
        together * encoder,
        _moved(sizes, positions * pieces, together * steps, context),
        float(positions * pieces * of_model.n_blocks),
    )
    return Part(
        "effects",
        "rollouts",
        items * each,
        items * (read + steps),
        items * token_blocks,
        items * (flops + encoder),
        "decode",
        math.ceil(items / together),
        job,
    )


def _distinct(settings: Effects, starts: Sequence[int]) -> list[int]:
    """Tokens of the prompts that are read for a vector: equal ones once."""
    return [start for start, _ in {(start, prompt) for start, prompt in zip(starts, settings.prompts, strict=True)}]


def _calibration(experiment: Experiment, left: Left, sizes: Sizes, rows: int) -> Part | None:
    """Losses on the calibration text, by the blocks above the hook."""
    settings = experiment.effects
    each = rollouts_per_vector(settings)
    losses = 1.0 if settings.fixed_scale is not None else LOSSES[settings.scale_search]
    together = max(1, rows // each)
    return _losses(experiment, sizes, "effects", left.vectors, losses, together)


def _ranges(experiment: Experiment, left: Left, sizes: Sizes) -> Part | None:
    """The scales between which each new vector is of use."""
    settings = experiment.effects
    losses = ONSET_LOSSES + (1.0 if settings.fixed_scale is not None else LOSSES[settings.scale_search])
    return _losses(experiment, sizes, "vectors", len(left.pairs), losses, 1)


def _losses(experiment: Experiment, sizes: Sizes, stage: str, vectors: int, losses: float, together: int) -> Part:
    settings = experiment.effects
    tokens = settings.calibration_chunks * (settings.calibration_length - 1)
    above = sizes.model.n_blocks - blocks_below(experiment.hook_name)
    flops = tokens * sizes.model.flops(above, head=True, context=settings.calibration_length / 2)
    blocks = above + sizes.model.unembedding_blocks()
    job = Cost(together * losses * flops, 0.0, _moved(sizes, losses, 0, 0), losses * above)
    measured = math.ceil(vectors * losses)
    return Part(
        stage,
        "calibration losses",
        measured,
        measured * tokens,
        measured * tokens * blocks,
        measured * flops,
        "pass",
        math.ceil(vectors / together),
        job,
    )


def _contrasts(experiment: Experiment, left: Left, sizes: Sizes) -> Part | None:
    """Contrast texts of the goals whose methods read them, one at a time through the blocks below the hook."""
    names = {goal for goal, method in left.pairs if READ_BY_ACTORS.keys() & set(ingredients_of(method))}
    texts = sum(len(side) for goal in left.goals if goal.id in names for side in (goal.contrast.positive, goal.contrast.negative))
    below = blocks_below(experiment.hook_name)
    flops = CONTRAST_TOKENS * sizes.model.flops(below, head=False, context=CONTRAST_TOKENS / 2)
    each = texts / max(1, len(names))
    return Part(
        "vectors",
        "contrast texts",
        texts,
        texts * CONTRAST_TOKENS,
        texts * CONTRAST_TOKENS * below,
        texts * flops,
        "bridge",
        len(names),
        Cost(each * flops, 0.0, _moved(sizes, each, 0, 0), each * below),
    )


def _texts(experiment: Experiment, left: Left, sizes: Sizes) -> Part | None:
    """Steered text: every row reads its prompt by itself, and all rows of a batch are as long as the longest."""
    settings, texts = experiment.evaluation, left.texts.total()
    starts = sizes.prompts.of(settings.prompts, settings.prompt_format)
    steps = max(starts) + settings.new_tokens - 1
    flops = steps * sizes.model.flops(sizes.model.n_blocks, head=True, context=steps / 2)
    rows = texts_per_batch(experiment)
    job = Cost(rows * flops, 0.0, _moved(sizes, steps, rows * steps, steps / 2), float(steps * sizes.model.n_blocks))
    return Part(
        "texts",
        "texts",
        texts,
        texts * steps,
        texts * steps * _whole(sizes.model),
        texts * flops,
        "decode",
        math.ceil(texts / rows),
        job,
    )


def _grades(experiment: Experiment, left: Left, sizes: Sizes) -> Part | None:
    """The local judge's reading of texts, by the embedder and by the model; a server's calls are not the devices' work."""
    if experiment.judge.kind != "local":
        return None
    texts = left.texts.total() + len(left.ungraded)
    return _reading(experiment, sizes, "grading", "texts, local judge", texts, GRADE_BATCH, EMBEDDER_FLOPS)


def _figures(experiment: Experiment, left: Left, sizes: Sizes) -> Part | None:
    """Perplexity and the other figures of each text, where no local judge finds them."""
    return _reading(experiment, sizes, "figures", "texts", left.unread, TEXTS_AT_ONCE, 0.0)


def _reading(experiment: Experiment, sizes: Sizes, stage: str, what: str, texts: int, together: int, besides: float) -> Part:
    settings = experiment.evaluation
    length = max(sizes.prompts.of(settings.prompts, settings.prompt_format)) + settings.new_tokens
    flops = length * sizes.model.flops(sizes.model.n_blocks, head=True, context=length / 2)
    each = min(together, max(1, texts))
    return Part(
        stage,
        what,
        texts,
        texts * length,
        texts * length * _whole(sizes.model),
        texts * (flops + besides),
        "bridge",
        math.ceil(texts / together),
        Cost(each * flops, each * besides, _moved(sizes, 1, 0, 0), float(sizes.model.n_blocks)),
    )


def reference_cost(experiment: Experiment, sizes: Sizes) -> Cost:
    """What an actor with a local judge does before it grades: the unsteered model's own completions, written and read."""
    steps = experiment.evaluation.new_tokens + 2
    flops = REFERENCE_ROWS * steps * sizes.model.flops(sizes.model.n_blocks, head=True, context=steps / 2)
    return Cost(2 * flops, 0.0, _moved(sizes, steps, REFERENCE_ROWS * steps, steps / 2), float(steps * sizes.model.n_blocks))


def _whole(size: ModelSize) -> float:
    """Blocks that a token goes through, the unembedding among them."""
    return size.n_blocks + size.unembedding_blocks()


def _moved(sizes: Sizes, steps: int | float, row_steps: int | float, context: int | float) -> float:
    """Bytes that steps move: all weights in each, and for each row its keys and values so far and its logits."""
    width, model = sizes.dtype.itemsize, sizes.model
    each = model.cache_per_token(sizes.dtype) * context + LOGIT_PASSES * model.d_vocab * width
    return float(steps * model.weights * width + row_steps * each)
