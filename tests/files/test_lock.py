"""One writer a folder in an object store: a lease that is renewed, and taken over when its holder is dead."""

from __future__ import annotations

import json

import pytest

from saets.errors import InputError
from saets.files import lock
from saets.files.lock import LEASE_SECONDS, LOCK, Lease, held
from saets.files.storage import Location


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_live_lease_refuses_a_second_writer_and_names_the_first(remote: Location, clock: Clock) -> None:
    Lease(remote, clock).take()
    clock.now += LEASE_SECONDS - 5
    with pytest.raises(InputError, match=r"another saets process is writing s3://.*process \d+ on .*ends in 5 seconds"):
        Lease(remote, clock).take()


def test_the_lease_of_a_killed_writer_is_taken_over(remote: Location, clock: Clock) -> None:
    Lease(remote, clock).take()
    clock.now += LEASE_SECONDS
    second = Lease(remote, clock)
    second.take()
    with pytest.raises(InputError, match="another saets process is writing"):
        Lease(remote, clock).take()
    second.release()
    Lease(remote, clock).take()


def test_a_writer_that_renews_keeps_its_lease(remote: Location, clock: Clock) -> None:
    first = Lease(remote, clock)
    first.take()
    for _ in range(3):
        clock.now += LEASE_SECONDS - 1
        first.renew()
    with pytest.raises(InputError, match="another saets process is writing"):
        Lease(remote, clock).take()


def test_a_writer_that_comes_back_too_late_warns_and_leaves_the_new_lease_alone(
    remote: Location, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Lease(remote, clock), Lease(remote, clock)
    first.take()
    clock.now += LEASE_SECONDS
    second.take()
    before = (remote / LOCK).read_bytes()
    first.renew()
    first.release()
    assert "is written by another saets process too" in caplog.text
    assert (remote / LOCK).read_bytes() == before


def test_a_lease_that_nobody_understands_does_not_keep_the_folder_shut(remote: Location, clock: Clock) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[1]", b'{"time": "noon"}'):
        (remote / LOCK).write_bytes(content)
        lease = Lease(remote, clock)
        lease.take()
        lease.release()
    assert LOCK not in remote.entries()


def test_a_holder_renews_by_itself_and_lets_go_at_the_end(remote: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.01)
    renewed = lock.threading.Event()
    renew = Lease.renew

    def seen(lease: Lease) -> None:
        renew(lease)
        renewed.set()

    monkeypatch.setattr(Lease, "renew", seen)
    with held(remote):
        first = json.loads((remote / LOCK).read_bytes())
        assert renewed.wait(30)
        again = json.loads((remote / LOCK).read_bytes())
        assert again["token"] == first["token"]
        assert again["time"] > first["time"]
    assert LOCK not in remote.entries()
