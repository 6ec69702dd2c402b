"""A judge without key or network, out of two figures: similarity to a goal's examples, and the unsteered model's own loss.

It is a proxy: it ranks texts of one model and goal, and its scores do not compare with those of an LLM judge. Its behaviour
score sees topic and tone, not meaning ("I do not love you" is close to "I love you"); its coherence score asks whether the
unsteered model could have written the text, so rare but correct text scores too low.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saets.engine.batch import Row
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed
from saets.errors import InputError
from saets.experiment.config import Evaluation
from saets.experiment.goal import Examples, Goal
from saets.files.storage import shareable
from saets.judge import clean_text
from saets.judge.embedder import Embedder
from saets.records import CRITERIA, Generation, Grade
from saets.scores.measures import CompletionTokens, Measures, completion_losses, distinct_share, measure_texts
from saets.tokens import completion_text, encode, end_tokens

RIDGE = 0.1
"""Penalty on the slope of the calibration, for scores of unit variance: keeps it finite where the examples separate."""

MIN_SLOPE = 0.01
"""Least slope of the calibration, for scores of unit variance: more similar never scores lower."""

REFERENCE_ROWS = 64
"""Unsteered completions that set the reference loss."""

AT_REFERENCE = 0.95
"""Coherence of a text, without repetition, whose loss is the reference mean."""

HALF_NATS = 1.5
"""Coherence falls to 0.5 this far above the reference mean: on SmolLM2-135M unsteered completions have loss 2.5, steered
ones break up visibly from about 4, and unsteered ones with their words shuffled have 7.2. Sentences written by people, which
the model would seldom write itself, have 4.0 to 4.5."""

HALF_DEVIATIONS = 3.0
"""But never nearer than this many standard deviations of the reference, so that short completions, whose mean loss is
noisy, are not called incoherent by chance."""


class Logistic(NamedTuple):
    """The curve 1 / (1 + exp(-(slope x + intercept)))."""

    slope: float
    intercept: float

    def at(self, x: float) -> float:
        """Its value, 0..1; never overflows."""
        return 0.5 * (1.0 + math.tanh(0.5 * (self.slope * x + self.intercept)))


class Calibrated(NamedTuple):
    """What a goal's examples give."""

    direction: NDArray[np.float64]
    """Mean embedding of the positive examples minus that of the negative ones."""
    curve: Logistic
    """From similarity to behaviour score."""
    separation: float
    """Leave-one-out AUC."""


class Behaviour:
    """Behaviour scores from a goal's own examples; needs the embedder alone.

    similarity = mean cosine to the positive examples - mean cosine to the negative examples;
    score = logistic(similarity), fitted to the examples' own similarities, each computed with itself left out.
    """

    def __init__(self, embedder: Embedder) -> None:
        """Computes nothing yet; each goal is calibrated when it is first graded."""
        self._embedder = embedder
        self._calibrated: dict[Examples, Calibrated] = {}

    def separation(self, goal: Goal) -> float:
        """How well the examples tell apart what they should: the probability that a positive example is more similar than
        a negative one, each with itself left out (AUC). 1 is perfect, 0.5 is chance; below 0.9 add or mend examples."""
        return self._calibrate(goal).separation

    def similarities(self, goal: Goal, texts: Sequence[str]) -> list[float]:
        """One figure a text, before calibration."""
        return [float(x) for x in self._embedder.embed(texts) @ self._calibrate(goal).direction]

    def score(self, goal: Goal, similarity: float) -> float:
        """The behaviour score, 0..1, of a similarity."""
        return self._calibrate(goal).curve.at(similarity)

    def _calibrate(self, goal: Goal) -> Calibrated:
        examples = goal.examples
        if examples not in self._calibrated:
            positive = self._embedder.embed(examples.positive).astype(np.float64)
            negative = self._embedder.embed(examples.negative).astype(np.float64)
            scores = np.concatenate(leave_one_out(positive, negative))
            labels = np.arange(len(scores)) < len(positive)
            self._calibrated[examples] = Calibrated(
                positive.mean(axis=0) - negative.mean(axis=0),
                fit_logistic(scores, labels),
                area_under_curve(scores[labels], scores[~labels]),
            )
        return self._calibrated[examples]


class Fluency(NamedTuple):
    """The figures behind a coherence score."""

    loss: float
    """Mean next-token loss in nats of the completion's tokens, given BOS and prompt, under the unsteered model."""
    distinct: float
    """Share of its trigrams that do not repeat, 0..1."""


class Coherence:
    """Coherence scores from the unsteered model's loss, against its own completions of the same prompts.

    score = logistic(loss) x distinct. The logistic is 0.95 at the reference mean and 0.5 at `HALF_NATS` (or `HALF_DEVIATIONS`
    standard deviations, where that is more) above it; a text that loops has a low loss, and loses by `distinct`.
    """

    def __init__(
        self,
        model: Any,
        settings: Evaluation,
        *,
        seed: int,
    ) -> None:
        """Makes and measures the reference completions, spread over the prompts and sampled as the evaluation's texts.

        Raises:
            InputError: a model that writes nothing after the prompts.
        """
        self._model, self._prompt_format = model, settings.prompt_format
        engine = RolloutEngine(model, "blocks.0.hook_resid_post", top_k=settings.top_k, temperature=settings.temperature)
        own = self._own_completions(engine, settings.prompts, settings.new_tokens, seed)
        losses = [fluency.loss for fluency in self.measure(own)]
        if not losses:
            raise InputError(
                f"the unsteered model ends its text at once after each of {len(set(settings.prompts))} prompts, so the local "
                "judge has no reference; choose other evaluation.prompts"
            )
        self.mean = float(np.mean(losses))
        """Mean loss of the unsteered model's own completions."""
        self.deviation = float(np.std(losses))
        """Their standard deviation."""
        slope = -_logit(AT_REFERENCE) / max(HALF_NATS, HALF_DEVIATIONS * self.deviation)
        self._curve = Logistic(slope, _logit(AT_REFERENCE) - slope * self.mean)

    def score(self, fluency: Fluency) -> float:
        """The coherence score, 0..1."""
        return self._curve.at(fluency.loss) * fluency.distinct

    def measure(self, texts: Sequence[tuple[str, str]]) -> list[Fluency]:
        """The figures of each (prompt, completion); a completion must have at least one token."""
        tokens = CompletionTokens(self._model.tokenizer, texts, self._prompt_format)
        losses = completion_losses(self._model, tokens)
        return [
            Fluency(loss, distinct_share(completion, tail))
            for loss, tail, (_, completion) in zip(losses, tokens.tails, texts, strict=True)
        ]

    def _encode(self, prompt: str) -> list[int]:
        return encode(self._model.tokenizer, clean_text(prompt), self._prompt_format)

    def _own_completions(
        self, engine: RolloutEngine, prompts: Sequence[str], new_tokens: int, seed: int
    ) -> list[tuple[str, str]]:
        """Unsteered (prompt, completion) pairs, each cut where the text ends; those that say nothing are left out."""
        tokenizer = engine.tokenizer
        ends = end_tokens(tokenizer, self._prompt_format, self._model.original_model.generation_config)
        groups: dict[int, list[tuple[str, Row]]] = {}
        for i in range(max(REFERENCE_ROWS, len(prompts))):
            prompt = prompts[i % len(prompts)]
            tokens = tuple(self._encode(prompt))
            row = Row(tokens, row_seed(seed, "judge reference", prompt, i))
            groups.setdefault(len(tokens), []).append((prompt, row))
        pairs = []
        for start, group in groups.items():
            rows = [row for _, row in group]
            for (prompt, _), written in zip(group, engine.run(rows, None, start + new_tokens).tokens.tolist(), strict=True):
                pairs.append((prompt, completion_text(tokenizer, written[start:], ends)))
        return [(prompt, completion) for prompt, completion in pairs if completion.strip()]


class Graded(NamedTuple):
    """What the judge finds in texts with one pass of the model over them."""

    grades: list[Grade]
    measures: list[Measures]
    """One a text."""


class LocalJudge:
    """Grades by a sentence embedder and the unsteered model; a proxy whose scores do not compare with an LLM judge's."""

    def __init__(
        self,
        model: Any,
        embedder: str,
        settings: Evaluation,
        *,
        seed: int,
    ) -> None:
        """Loads the embedder and measures the unsteered model's own completions, sampled as the evaluation samples.

        Raises:
            InputError: embedder missing (says what to install), or settings the model cannot sample with.
        """
        self.name = f"local:{shareable(embedder)}"
        self._model, self._prompt_format = model, settings.prompt_format
        self.behaviour = Behaviour(Embedder(embedder, next(model.original_model.parameters()).device))
        self.coherence = Coherence(model, settings, seed=seed)

    def separation(self, goal: Goal) -> float:
        """See `Behaviour.separation`."""
        return self.behaviour.separation(goal)

    def grade(self, goal: Goal, texts: Sequence[Generation]) -> Graded:
        """Two grades a text, behaviour then coherence, in the order of the texts; none has a score where nothing was said."""
        measures = measure_texts(self._model, texts, self._prompt_format)
        said = [i for i, text in enumerate(texts) if text.completion.strip()]
        similarities = self.behaviour.similarities(goal, [texts[i].completion for i in said])
        figures = {i: (similarity, _fluency(measures[i])) for i, similarity in zip(said, similarities, strict=True)}
        grades = [grade for i, text in enumerate(texts) for grade in self._grades(goal, text, figures.get(i))]
        return Graded(grades, measures)

    def _grades(self, goal: Goal, text: Generation, figures: tuple[float, Fluency] | None) -> list[Grade]:
        if figures is None:
            return [Grade(text.generation_id, criterion, None, "", "empty completion", self.name) for criterion in CRITERIA]
        similarity, fluency = figures
        behaviour = self.behaviour.score(goal, similarity)
        coherence = self.coherence.score(fluency)
        reply = _compact({"loss": fluency.loss, "reference_loss": self.coherence.mean, "distinct": fluency.distinct})
        finite = math.isfinite(coherence)
        return [
            Grade(text.generation_id, "behaviour", behaviour, _compact({"similarity": similarity}), None, self.name),
            Grade(
                text.generation_id,
                "coherence",
                coherence if finite else None,
                reply,
                None if finite else "the model's loss is not a number",
                self.name,
            ),
        ]


def _fluency(measures: Measures) -> Fluency:
    """Not a number where the text has no tokens, or the model's loss on it is none."""
    loss, repetition = measures.loss, measures.repetition
    return Fluency(math.nan if loss is None else loss, math.nan if repetition is None else 1.0 - repetition)


def leave_one_out(
    positive: NDArray[np.float64], negative: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Similarities of the positive and of the negative examples, each as if it were not an example itself."""

    def to_others(own: NDArray[np.float64]) -> NDArray[np.float64]:
        cosines = own @ own.T
        others: NDArray[np.float64] = cosines.sum(axis=1) - cosines.diagonal()
        return others / (len(own) - 1)

    across = positive @ negative.T
    return to_others(positive) - across.mean(axis=1), across.mean(axis=0) - to_others(negative)


def area_under_curve(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """The share of (positive, negative) pairs in the right order; ties count half."""
    pairs = positive[:, None] - negative[None, :]
    return float((pairs > 0).mean() + 0.5 * (pairs == 0).mean())


def fit_logistic(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> Logistic:
    """The logistic regression of labels on scores, by Newton's method, with `RIDGE` on the slope and a slope above zero.

    Minimises sum log(1 + exp(-+(b z + a))) + RIDGE b^2 / 2 over z, the scores at zero mean and unit variance.
    """
    centre, spread = float(scores.mean()), float(scores.std()) or 1.0
    design = np.stack([(scores - centre) / spread, np.ones_like(scores)], axis=1)
    penalty = np.diag([RIDGE, 0.0])
    signs = np.where(labels, 1.0, -1.0)

    def objective(weights: NDArray[np.float64]) -> float:
        return float(np.logaddexp(0.0, -signs * (design @ weights)).sum() + 0.5 * weights @ penalty @ weights)

    weights = np.zeros(2)
    for _ in range(100):
        chance = 0.5 * (1.0 + np.tanh(0.5 * (design @ weights)))
        gradient = design.T @ (chance - labels) + penalty @ weights
        if np.abs(gradient).max() < 1e-10:
            break
        curvature = (design.T * (chance * (1.0 - chance))) @ design + penalty
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while objective(weights - size * step) > objective(weights) and size > 1e-6:
            size /= 2
        weights = weights - size * step
    slope, offset = float(weights[0]), float(weights[1])
    if slope < MIN_SLOPE:
        slope, offset = MIN_SLOPE, _logit(float(labels.mean()))
    return Logistic(slope / spread, offset - slope * centre / spread)


def _logit(share: float) -> float:
    return math.log(share / (1.0 - share))


def _compact(figures: dict[str, float]) -> str:
    return json.dumps({name: round(value, 4) for name, value in figures.items()}, separators=(",", ":"))
