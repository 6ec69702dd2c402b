"""The Hugging Face hub: files fetched whole or not at all, and a commit of files made in one step.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are read by huggingface_hub as everywhere else.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils.tqdm import tqdm

from saets.errors import InputError
from saets.progress import Progress

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

    A broken download leaves nothing behind; one that is complete is checked against the hub's SHA-256 where the hub gives it.

    Raises:
        InputError: no such repository, revision or file, no access, a hub out of reach, a full disk, a damaged file.
    """
    options: dict[str, Any] = {"repo_type": source.repo_type, "revision": source.revision}
    with _explained(source, name):
        size = hf_hub_download(source.repo, name, dry_run=True, **options).file_size or 0
        total = -(-size // MEGABYTE)
        with progress.stage(f"fetching {name} from {source.repo}", total, 0, "MB") as advance:
            path = Path(hf_hub_download(source.repo, name, tqdm_class=_reporting(advance, total), **options))
    digest = _sha256(path)
    blob = path.resolve()
    if len(blob.name) == 64 and blob.name != digest:  # the hub names large files by their SHA-256
        blob.unlink()
        raise InputError(f"{name} of {source} arrived damaged (SHA-256 {digest[:12]}…, expected {blob.name[:12]}…); run it again")
    parts = path.parts
    return Fetched(path, parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1], digest)


def push(source: Source, files: Mapping[str, Path | bytes], message: str, *, private: bool = False) -> str:
    """Make the repository where there is none, and put all files into it in one commit; gives its address.

    Raises:
        InputError: no token or one that may not write, a hub out of reach, a commit that the hub refuses.
    """
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    api = HfApi(library_name="saets")
    with _explained(source, None):
        url = api.create_repo(source.repo, repo_type=source.repo_type, private=private, exist_ok=True)
        api.create_commit(source.repo, operations, commit_message=message, repo_type=source.repo_type, revision=source.revision)
    return str(url)


def _reporting(advance: Callable[[int], None], total: int) -> type[tqdm]:
    """A bar that shows nothing and counts whole megabytes on, never more than `total`."""
    arrived = shown = 0

    class Reporting(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: int | float | None = 1) -> None:
            nonlocal arrived, shown
            arrived += int(n or 0)
            whole = min(-(-max(arrived, 0) // MEGABYTE), total)
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
    except hub_errors.GatedRepoError as error:
        raise InputError(f"{source} is gated; accept its terms on the hub, then set HF_TOKEN to your token") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise InputError(f"the hub has no {source}, or only for others; check the name, or set HF_TOKEN to your token") from error
    except hub_errors.RevisionNotFoundError as error:
        raise InputError(f"{source}: no such revision; give a branch, tag or commit that it has") from error
    except hub_errors.RemoteEntryNotFoundError as error:
        raise InputError(f"{source} has no file {name}; check the name in [published]") from error
    except (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError) as error:
        raise _unreachable(what, error) from error
    except hub_errors.LocalTokenNotFoundError as error:
        raise InputError(f"{what}: the hub wants a token; set HF_TOKEN, or run `hf auth login`") from error
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        advice = "set HF_TOKEN to a token that may do this" if status in (401, 403) else "try again later"
        raise InputError(f"{what}: the hub answered {status} ({_first_line(error)}); {advice}") from error
    except hub_errors.HFValidationError as error:
        raise InputError(f"{source.repo!r} is not a name on the hub: expected owner/name ({_first_line(error)})") from error
    except hub_errors.HTTPError as error:  # type: ignore[attr-defined]  # no connection, or one that broke
        raise _unreachable(what, error) from error
    except OSError as error:
        raise InputError(f"{what}: {_first_line(error)}; make room or mend what it says, then run it again") from error


def _unreachable(what: str, error: BaseException) -> InputError:
    return InputError(
        f"{what}: the hub cannot be reached ({_first_line(error)}); unset HF_HUB_OFFLINE and check network and HF_ENDPOINT, or "
        "run this once where it can be reached: what has been fetched is kept"
    )


def _first_line(error: BaseException) -> str:
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())[:200]
