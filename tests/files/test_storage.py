"""Files and folders at any place: written whole, read back, listed, and named in errors as the user named them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from saets.errors import InputError
from saets.experiment.loading import load_experiment
from saets.files import storage
from saets.files.storage import Location, is_uri, locate
from saets.fit.approximator import EffectApproximator
from saets.run_folder.store import RunFolder
from saets.vector.vector import SteeringVector


def test_what_is_written_is_read_back_and_replaced_whole(place: Location) -> None:
    file = place / "deep" / "file.txt"
    assert not file.is_file()
    for text in ("ünï", "", "again"):
        file.write_text(text)
        assert file.is_file()
        assert file.read_text() == text
    assert list((place / "deep").entries()) == ["file.txt"]
    assert place.is_folder()


def test_large_content_that_goes_up_in_parts_comes_back_equal(place: Location) -> None:
    content = bytes(range(256)) * 90_000
    (place / "large").write_bytes(content)
    assert (place / "large").read_bytes() == content
    assert place.entries()["large"].size == len(content)


def test_names_sort_and_folders_may_be_empty_or_missing(place: Location) -> None:
    assert place.entries() == {}
    assert not place.is_folder()
    for name in ("b", "a", "c"):
        (place / name).write_text(name)
    assert list(place.entries()) == ["a", "b", "c"]


def test_a_file_is_renamed_and_deleted_once_or_twice(place: Location) -> None:
    file = place / "old"
    file.write_text("text")
    file.rename("new")
    assert list(place.entries()) == ["new"]
    assert (place / "new").read_text() == "text"
    for _ in range(2):
        (place / "new").delete()
    assert "new" not in place.entries()


def test_a_missing_file_is_named_as_the_user_wrote_it(place: Location) -> None:
    with pytest.raises(InputError, match=f"cannot read {place}/none: "):
        (place / "none").read_bytes()


def test_a_location_says_what_the_user_wrote_and_keeps_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(locate("runs/tiny") / "effects") == "runs/tiny/effects"
    assert locate("runs/tiny").local == tmp_path / "runs" / "tiny"
    assert locate(f"file://{tmp_path}/runs").local == tmp_path / "runs"
    there = locate("s3://key:secret@bucket/runs/?region=x")
    assert str(there / "effects") == "s3://key@bucket/runs/effects"
    assert "secret" not in repr(there)
    assert is_uri("s3://bucket/runs")
    assert not is_uri("runs/tiny")


@pytest.mark.parametrize("uri", ["s4://bucket/runs", "s3://", "s3://key:secret@bucket/x?no-such=option", "s3://bucket/a b"])
def test_a_uri_that_cannot_be_is_refused_without_asking_anyone(uri: str) -> None:
    with pytest.raises(InputError, match="cannot be used .*expected a local path or a URI such as s3://bucket/folder") as refused:
        locate(uri)
    assert "secret" not in str(refused.value)


def test_a_service_that_never_answers_is_given_up(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SILENCE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        there = locate(f"{bucket}/runs")
        monkeypatch.setattr(storage, "FIRST_ANSWER_SECONDS", 0.1)
        with pytest.raises(InputError, match="cannot reach s3://tests/runs: no answer in 0.1 seconds; check the address"):
            there.check()
        monkeypatch.setattr(storage, "FIRST_ANSWER_SECONDS", 60.0)
        with pytest.raises(InputError, match="cannot reach s3://tests/runs: .*Timeout was reached.*; check the address"):
            there.check()


def test_vector_approximator_and_experiment_travel_by_uri(remote: Location) -> None:
    vector = SteeringVector.from_tensor(torch.arange(1.0, 5.0), "blocks.1.hook_resid_post", goal="london")
    vector.save(f"{remote}/vector.safetensors")
    loaded = SteeringVector.load(f"{remote}/vector.safetensors")
    assert torch.equal(loaded.direction, vector.direction)
    assert loaded.provenance == {"goal": "london"}
    approximator = EffectApproximator(torch.randn(4, 6), torch.randn(6), {"fit": 1})
    approximator.save(remote / "approximator.safetensors")
    again = EffectApproximator.load(remote / "approximator.safetensors")
    assert torch.equal(again.M, approximator.M)
    assert again.provenance == {"fit": 1}
    experiment = load_experiment("tiny", [f"effects.shipped={remote}/other"])
    RunFolder.create(remote / "run", experiment, {})
    assert load_experiment(f"{remote}/run") == experiment
    assert load_experiment(f"{remote}/run/experiment.toml").effects.shipped == f"{remote}/other"
    with pytest.raises(InputError, match="no run folder at s3://"):
        load_experiment(f"{remote}/none")
