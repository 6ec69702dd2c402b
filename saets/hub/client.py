"""The Hugging Face hub: files fetched whole or not at all, and a commit of files made in one step.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are read by huggingface_hub as everywhere else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils.tqdm import tqdm

from saets.errors import InputError
from saets.terminal.progress import Progress

MEGABYTE = 2**20


class Source(NamedTuple):
    """A repository of the hub at one revision."""

    repo: str
    repo_type: str = "dataset"
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo_type} {self.repo}" + (f" at {self.revision}" if self.revision else "")


class Fetched(NamedTuple):
    """A file in the local cache."""

    path: Path
    commit: str
    """Commit of the repository it was taken from."""
    sha256: str


def fetch(source: Source, name: str, progress: Progress) -> Fetched:
    """Download a file, or take it from the cache where the hub has no newer one or is out of reach.

    A broken download leaves nothing behind; one that is complete is checked against the SHA-256 that the hub gives for large
    files, where the cache can hold links, and made once more where it differs.

    Raises:
        InputError: no such repository, revision or file, no access, a hub out of reach, a full disk, a damaged file.
    """
    options: dict[str, Any] = {"repo_type": source.repo_type, "revision": source.revision}
    with _explained(source, name):
        total = -(-(hf_hub_download(source.repo, name, dry_run=True, **options).file_size or 0) // MEGABYTE)
        for again in (False, True):
            with progress.stage(f"fetching {name} from {source.repo}", total, 0, "MB") as advance:
                bar = _reporting(advance, total)
                path = Path(hf_hub_download(source.repo, name, tqdm_class=bar, force_download=again, **options))
            digest, promised = _sha256(path), _promised(path)
            if promised in (None, digest):
                parts = path.parts
                return Fetched(path, parts[len(parts) - parts[::-1].index("snapshots")], digest)
    raise InputError(
        f"{name} of {source} arrived damaged twice (SHA-256 {digest[:12]}…, expected {str(promised)[:12]}…); run it again, or "
        "look at what HF_ENDPOINT sends"
    )


def _promised(path: Path) -> str | None:
    """The SHA-256 that the hub gave for a large file: the name its cache entry links to, whatever store lies behind that."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def push(
    source: Source, files: Mapping[str, Path | bytes], message: str, *, owned: Sequence[str] = (), private: bool = False
) -> str:
    """Make the repository where there is none, and put all files into it in one commit; gives its address.

    Files already there whose names begin with one of `owned` and which are not among these are deleted in the same commit.

    Raises:
        InputError: no token or one that may not write, a public repository where a private one was asked for, a hub out of
            reach, a commit that the hub refuses.
    """
    api = HfApi(library_name="saets")
    options: dict[str, Any] = {"repo_type": source.repo_type}
    with _explained(source, None):
        url = api.create_repo(source.repo, private=private, exist_ok=True, **options)
        if private and not api.repo_info(source.repo, **options).private:
            raise InputError(f"{source} is there already and public; push without --private, or choose another name")
        stale = set(api.list_repo_files(source.repo, **options)) - files.keys() if owned else set()
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in sorted(files.items())),
            *(CommitOperationDelete(name) for name in sorted(stale) if name.startswith(tuple(owned))),
        ]
        api.create_commit(source.repo, operations, commit_message=message, **options)
    return str(url)


def _reporting(advance: Callable[[int], None], total: int) -> type[tqdm]:
    """A bar that shows nothing and counts whole megabytes on, never more than `total`.

    Xet shows two bars for one file, what has arrived and what has been put together; the one further on counts.
    """
    shown = 0

    class Reporting(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.arrived = 0

        def update(self, n: int | float | None = 1) -> None:
            nonlocal shown
            self.arrived += int(n or 0)
            whole = min(-(-self.arrived // MEGABYTE), total)
            if whole > shown:
                advance(whole - shown)
                shown = whole

    return Reporting


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _explained(source: Source, name: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into an `InputError` that says what to do."""
    what = f"{name} of {source}" if name else str(source)
    try:
        yield
    except InputError:
        raise
    except hub_errors.GatedRepoError as error:
        raise InputError(f"{source} is gated; accept its terms on the hub, then set HF_TOKEN to your token") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise InputError(f"the hub has no {source}, or only for others; check the name, or set HF_TOKEN to your token") from error
    except hub_errors.RevisionNotFoundError as error:
        raise InputError(f"{source}: no such revision; give a branch, tag or commit that it has") from error
    except hub_errors.RemoteEntryNotFoundError as error:
        raise InputError(f"{source} has no file {name}; check the name in [published]") from error
    except (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError) as error:
        if isinstance(error.__cause__, hub_errors.HfHubHTTPError):
            raise _refused(what, error.__cause__) from error
        raise _unreachable(what, error) from error
    except hub_errors.LocalTokenNotFoundError as error:
        raise InputError(f"{what}: the hub wants a token; set HF_TOKEN, or run `hf auth login`") from error
    except hub_errors.HfHubHTTPError as error:
        raise _refused(what, error) from error
    except hub_errors.HFValidationError as error:
        raise InputError(f"{source.repo!r} is not a name on the hub: expected owner/name ({_first_line(error)})") from error
    except hub_errors.HTTPError as error:  # type: ignore[attr-defined]  # no connection, or one that broke
        raise _unreachable(what, error) from error
    except (OSError, RuntimeError, ValueError) as error:  # the last two are Xet's
        raise InputError(f"{what}: {_first_line(error)}; make room or mend what it says, then run it again") from error


def _refused(what: str, error: hub_errors.HfHubHTTPError) -> InputError:
    status = error.response.status_code
    advice = "set HF_TOKEN to a token that may do this" if status in (401, 403) else "try again later"
    return InputError(f"{what}: the hub answered {status} ({_first_line(error)}); {advice}")


def _unreachable(what: str, error: BaseException) -> InputError:
    return InputError(
        f"{what}: the hub cannot be reached ({_first_line(error)}); unset HF_HUB_OFFLINE and check network and HF_ENDPOINT, or "
        "run this once where it can be reached: what has been fetched is kept"
    )


def _first_line(error: BaseException) -> str:
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())[:200]
