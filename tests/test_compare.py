"""`saets compare` on a run folder with texts and grades, by the local judge's scores and by a chat model over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from chat_server import KEY, Answer, Server, message_of, says

from saets.cli import main
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.goal import load_goal
from saets.experiment.loading import load_experiment
from saets.records import CRITERIA, Generation, GenerationItem, Grade
from saets.run_folder.rows import generation_rows, grade_rows
from saets.run_folder.store import RunFolder
from saets.scores import statistics
from saets.scores.battles import BattleTables
from saets.stages.asking import Asking
from saets.stages.compare import Wanted, compare
from saets.stages.evaluate import generation_items, grade_settings
from saets.stages.session import Session
from saets.vector.vector import SteeringVector

METHODS = ("caa", "sae", "sae_ts")
BEST = {("caa", 8.0): 0.5, ("caa", 16.0): 0.2, ("sae", 8.0): 0.2, ("sae", 16.0): 0.3, ("sae_ts", 8.0): 0.4, ("sae_ts", 16.0): 0.9}
"""Behaviour by method and scale; sae_ts at 16 beats caa at 8 and sae at 16."""

BATTLES = 3 * 2 * 2 * 4
"""Pairs, criteria, orders, samples."""


def experiment(*changes: str) -> Experiment:
    found = load_experiment("tiny", changes)
    alone = {"goals": ("london",), "features": {"london": ((3, 1.0),)}}
    return found.model_copy(update={"steering": found.steering.model_copy(update=alone)})


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose completions name their method and scale, graded by each judge."""
    monkeypatch.setattr(statistics, "FLIPS", 500)
    for judge in ("local", "openai"):
        with Session.open(experiment(f"judge.kind={judge}", "judge.model=m"), tmp_path / "run") as session:
            fill(session, lambda item: f" {item.method} {item.scale:g}")
    return tmp_path / "run"


def of_different_texts(folder: Path, server: Server) -> Path:
    """A run folder of eight samples, each text another, graded by the model at the server; nothing compared."""
    asked = ("judge.kind=openai", "judge.model=m", f"judge.base_url={server.url}", "judge.concurrency=4")
    with Session.open(experiment(*asked, "evaluation.samples=8"), folder) as session:
        fill(session, lambda item: f" {item.method} {item.scale:g} {item.sample}")
    return folder


DIFFERENT = 2 * BATTLES
"""Battles of these texts."""


def battles_of(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "battles.parquet").sort("battle_id")


def of_battles(server: Server) -> Counter[str]:
    """How often each battle was asked about."""
    return Counter(message for message in server.messages() if "<text_a>" in message)


def fill(session: Session, completion: Callable[[GenerationItem], str]) -> None:
    vectors = {}
    for number, method in enumerate(METHODS):
        vector = SteeringVector(torch.eye(32)[number], session.experiment.hook_name)
        vector.save(session.run.vector("london", method))
        vectors["london", method] = vector
    texts = [Generation(**asdict(item), completion=completion(item)) for item in generation_items(session, vectors)]
    if session.run.generations.read() is None:
        session.run.generations.write(generation_rows(texts))
    grades = [
        Grade(text.generation_id, criterion, BEST.get((text.method, text.scale), 0.0) if which == 0 else 0.8, "", None, "judge")
        for text in texts
        for which, criterion in enumerate(CRITERIA)
    ]
    session.run.grades("london", grade_settings(session, load_goal("london"))).write(grade_rows(grades))


def fight(out: Path, *changes: str, **wanted: Any) -> BattleTables:
    with Session.open(experiment(*changes), out) as session:
        return compare(session, Wanted(**wanted))


def test_the_local_judges_scores_fight_without_key_or_calls(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Session.open(experiment(), out):
        pass
    assert main(["compare", str(out)]) == 0
    battles = pl.read_parquet(out / "battles.parquet")
    assert len(battles) == BATTLES
    behaviour = battles.filter(pl.col("criterion") == "behaviour")
    assert set(behaviour["winner"]) == {"first", "second"}
    assert set(battles.filter(pl.col("criterion") == "coherence")["winner"]) == {"tie"}
    strengths = pl.read_parquet(out / "strengths.parquet").filter(pl.col("criterion") == "behaviour")
    assert strengths["method"].to_list() == ["sae_ts", "caa", "sae"]
    printed = capsys.readouterr().out
    assert "a proxy, the same in both orders" in printed
    page = (out / "results.md").read_text()
    assert "## Battles" in page
    assert "a proxy" in page


def test_each_method_fights_with_its_text_at_the_scale_that_the_other_half_chose(out: Path) -> None:
    fight(out)
    texts = RunFolder(out).generations.read()
    assert texts is not None
    battles = pl.read_parquet(out / "battles.parquet")
    said = battles.join(texts, left_on="first_id", right_on="generation_id")
    assert set(said["completion"]) == {" caa 8", " sae 16", " sae_ts 16"}
    assert (said["first"] == said["method"]).all()
    assert (said["prompt"] == said["prompt_right"]).all()
    assert (said["sample"] == said["sample_right"]).all()


def prefers_sae_ts(request: dict[str, Any]) -> Answer:
    """A model that likes sae_ts, then caa, and shouts its answer in prose now and then."""
    message = request["messages"][0]["content"]
    if "<text_a>" not in message:
        return says('{"score": 10}')
    first, second = (message.rpartition(f"<text_{which}>")[2].split("</")[0].split()[0] for which in "ab")
    ranks = {"sae_ts": 0, "caa": 1, "sae": 2}
    return says(json.dumps({"answer": "A" if ranks[first] < ranks[second] else "B"}))


def test_a_chat_model_compares_over_http_and_is_asked_nothing_twice(out: Path, server: Server) -> None:
    server.respond = prefers_sae_ts
    asked = ("judge.kind=openai", f"judge.base_url={server.url}", "judge.model=m")
    tables = fight(out, *asked)
    assert tables.strengths["method"].to_list() == ["sae_ts", "caa", "sae"] * 2
    assert tables.order["first"].to_list() == [0.5, 0.5]
    assert tables.order["consistent"].to_list() == [1.0, 1.0]
    messages = [message for request in server.requests if "<text_a>" in (message := request["messages"][0]["content"])]
    assert len(messages) == len(set(messages)) <= BATTLES, "battles of the same texts share a reply"
    server.requests.clear()
    again = fight(out, *asked)
    assert not server.requests
    assert again.strengths.equals(tables.strengths)
    assert not [path for path in out.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_model_that_always_says_a_shows_as_position_bias(out: Path, server: Server) -> None:
    server.respond = lambda request: says('{"answer": "A"}')
    tables = fight(out, "judge.kind=openai", f"judge.base_url={server.url}", "judge.model=m")
    assert tables.order["first"].to_list() == [1.0, 1.0]
    assert tables.order["consistent"].to_list() == [0.0, 0.0]
    assert tables.strengths["strength"].to_list() == pytest.approx([0] * 6, abs=1e-6)


def test_what_was_fought_before_is_kept_and_only_the_rest_is_fought(
    out: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.respond = prefers_sae_ts
    asked = ("judge.kind=openai", f"judge.base_url={server.url}", "judge.model=m")
    with Session.open(experiment(*asked), out):
        pass
    assert main(["compare", str(out), "--criterion", "behaviour", "--methods", "caa", "sae_ts", "--samples", "2"]) == 0
    assert "50% of decided battles won by the text shown first (50% is fair); 4 battles" in capsys.readouterr().out
    before = pl.read_parquet(out / "battles.parquet")
    assert len(before) == 2 * 2
    first = {request["messages"][0]["content"] for request in server.requests}
    server.requests.clear()
    fight(out, *asked)
    after = pl.read_parquet(out / "battles.parquet")
    assert len(after) == BATTLES
    assert after.join(before, on=before.columns, nulls_equal=True).height == len(before)
    assert not first & {message for r in server.requests if "<text_a>" in (message := r["messages"][0]["content"])}


def test_failed_battles_stay_failed_until_they_are_asked_for_again(out: Path, server: Server) -> None:
    server.respond = lambda request: says("no idea") if "<text_a>" in request["messages"][0]["content"] else says('{"score": 1}')
    asked = ("judge.kind=openai", f"judge.base_url={server.url}", "judge.model=m")
    tables = fight(out, *asked, criteria=("behaviour",))
    assert tables.order["n_failed"].to_list() == [BATTLES // 2]
    assert tables.strengths.is_empty()
    server.respond = prefers_sae_ts
    assert fight(out, *asked, criteria=("behaviour",)).strengths.is_empty()
    with Session.open(experiment(*asked), out) as session:
        tables = compare(session, Wanted(criteria=("behaviour",)), Asking(retry_failed=True))
    assert tables.order["n_failed"].to_list() == [0]


def test_a_comparison_that_is_killed_asks_again_only_what_was_in_flight_and_ends_with_the_same_battles(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers 30 battles, and then nothing until the process that asks is gone."""
    monkeypatch.setattr(statistics, "FLIPS", 500)
    out = of_different_texts(tmp_path / "run", server)
    stuck, gone, lock = threading.Event(), threading.Event(), threading.Lock()
    arrived: Counter[str] = Counter()

    def respond(request: dict[str, Any]) -> Answer:
        with lock:
            arrived["battles"] += "<text_a>" in message_of(request)
            if arrived["battles"] > 30:
                stuck.set()
        if stuck.is_set():
            gone.wait(120)
        return prefers_sae_ts(request)

    server.respond = respond
    process = subprocess.Popen([sys.executable, "-m", "saets", "compare", str(out)], start_new_session=True)
    try:
        assert stuck.wait(300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        gone.set()
    assert (out / "calls.log").exists() and not (out / "battles.parquet").exists()
    assert main(["compare", str(out)]) == 0
    calls = json.loads((out / "manifest.json").read_text())["judge_calls"]
    again = sum(count - 1 for count in of_battles(server).values())
    assert again <= calls["unanswered"] <= 4
    assert calls["unanswered"] > 0
    on_the_way = calls["sent"] - len(server.requests)
    assert 0 <= on_the_way <= calls["unanswered"], "a call is counted before it is sent, so a kill may come between"
    assert len(of_battles(server)) == len(battles_of(out)) == DIFFERENT
    assert battles_of(out)["winner"].null_count() == 0
    server.respond = prefers_sae_ts
    undisturbed = of_different_texts(tmp_path / "undisturbed", server)
    assert main(["compare", str(undisturbed), "--set", f"judge.cache={tmp_path / 'other'}"]) == 0
    assert battles_of(undisturbed).equals(battles_of(out))


PRICES = ("--set", "judge.price_in=10.0", "--set", "judge.price_out=10.0")


def test_a_comparison_that_would_cost_more_than_it_may_is_refused_before_any_call(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    out = of_different_texts(tmp_path / "run", server)
    assert main(["compare", str(out), "--max-cost", "5"]) == 2
    assert "set judge.price_in and judge.price_out" in capsys.readouterr().err
    assert main(["compare", str(out), *PRICES, "--max-cost", "0.01"]) == 2
    said = capsys.readouterr().err
    assert f"about {DIFFERENT} calls" in said and "--max-cost is $0.01" in said
    assert server.requests == []


def test_a_ceiling_met_while_comparing_keeps_what_was_fought_and_the_command_goes_on_later(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server counts a token a byte, four times what was estimated."""
    monkeypatch.setattr(statistics, "FLIPS", 500)
    out = of_different_texts(tmp_path / "run", server)

    def respond(request: dict[str, Any]) -> Answer:
        tokens = {"prompt_tokens": len(message_of(request).encode()), "completion_tokens": 200}
        return says(json.loads(prefers_sae_ts(request).body)["choices"][0]["message"]["content"], tokens)

    server.respond = respond
    assert main(["compare", str(out), *PRICES, "--max-cost", "0.6"]) == 2
    assert "--max-cost $0.6 is reached" in capsys.readouterr().err
    spent = sum(10 * (len(message.encode()) + 200) / 1e6 for message in server.messages())
    assert 0.5 < spent <= 0.6
    fought = RunFolder(out).battles.read()
    assert fought is not None and 0 < len(fought) < DIFFERENT
    assert main(["compare", str(out), *PRICES, "--max-cost", "50"]) == 0
    assert len(battles_of(out)) == DIFFERENT
    assert set(of_battles(server).values()) == {1}


def test_a_model_that_never_answers_stops_the_comparison_with_the_reason(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    out = of_different_texts(tmp_path / "run", server)
    server.respond = lambda request: says("no idea") if "<text_a>" in message_of(request) else says('{"score": 1}')
    assert main(["compare", str(out)]) == 2
    said = capsys.readouterr().err
    assert "50 of 50 battles could not be decided, more than judge.max_failed (0.05): the reply holds no answer" in said
    assert "`saets compare --retry-failed`" in said
    assert len(of_battles(server)) < 2 * DIFFERENT


def test_battles_that_cannot_be_are_refused_by_name(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"needs two methods; got caa"):
        fight(out, methods=("caa",))
    with pytest.raises(InputError, match="unknown method 'sae_tt'.*did you mean 'sae_ts'"):
        fight(out, methods=("caa", "sae_tt"))
    with pytest.raises(InputError, match="unknown method of this experiment 'ridge'.*sae_ts"):
        fight(out, methods=("caa", "ridge"))
    assert main(["compare", str(out), "--samples", "0"]) == 2
    assert "--samples is 0" in capsys.readouterr().err
