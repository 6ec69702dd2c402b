"""A score is found however it is written, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from saets.judge.scores import UnusableReply, parse_score, parse_scores


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 7}', 7),
        ('{"score": "7"}', 7),
        ('{"score": 7.0}', 7),
        ('{"score": "7/10"}', 7),
        ('```json\n{"score": 10}\n```', 10),
        ('Sure! Here it is: {"score": 3} Hope that helps.', 3),
        ('{"reason": "it names {places}", "score": 4}', 4),
        ('{"grade": {"score": 6}}', 6),
        ('{"score": 8', 8),
        ("8/10", 8),
        ("I would say **8**/10.", 8),
        ("8 out of 10", 8),
        ("Score: 9.", 9),
        ("**Score:** 9", 9),
        (" 1\n", 1),
        ("10.", 10),
    ],
)
def test_a_score_is_found_however_it_is_written(reply: str, score: int) -> None:
    assert parse_score(reply) == score


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "no score"),
        ("I cannot grade this.", "no score"),
        ('{"score": null}', "no score"),
        ('{"score": true}', "no score"),
        ('{"score": 7.5}', "no score"),
        ("7.5/10", "no score"),
        ("80/100", "no score"),
        ("It names 3 places in 1666.", "no score"),
        ('{"score": 11}', "score 11 is outside 1..10"),
        ('{"score": 0}', "score 0 is outside 1..10"),
        ("-3", "score -3 is outside 1..10"),
        ("12/10", "score 12 is outside 1..10"),
        ("A 2/10 would be worse, so 8/10", "several scores: 2, 8"),
        ('{"score": 2} or {"score": 8}', "several scores: 2, 8"),
        ("9" * 5000, "no score"),
    ],
)
def test_a_reply_without_one_usable_score_is_refused_with_the_reason(reply: str, reason: str) -> None:
    with pytest.raises(UnusableReply, match=reason):
        parse_score(reply)


@pytest.mark.parametrize(
    "reply",
    [
        '{"behaviour": 3, "coherence": 8}',
        'First {"behaviour": 3}, then {"coherence": "8/10"}.',
        "**Behaviour**: 3\n**Coherence**: 8",
        "behaviour = 3, coherence = 8",
    ],
)
def test_two_scores_are_told_apart_by_their_names(reply: str) -> None:
    assert parse_scores(reply, ("behaviour", "coherence")) == {"behaviour": 3, "coherence": 8}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ('{"behaviour": 3}', "no score for coherence"),
        ("3 and 8", "no score for behaviour"),
        ('{"behaviour": 3, "coherence": 11}', "coherence 11 is outside 1..10"),
        ('{"behaviour": null, "coherence": 8}', "no score for behaviour"),
    ],
)
def test_one_score_of_two_is_not_enough(reply: str, reason: str) -> None:
    with pytest.raises(UnusableReply, match=reason):
        parse_scores(reply, ("behaviour", "coherence"))
