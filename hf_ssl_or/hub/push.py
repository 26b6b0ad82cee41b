"""From a run's folder to a repository on the Hub: one commit, of files that were proven to load and hold no secret.

First everything is collected in the outbox beside the run, then it is sent from there. Whatever happens meanwhile, the
push is either on the Hub as a whole or still in the outbox as a whole.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.redaction import mask
from hf_ssl_or.hub.retries import HubRefusalError, PushKeptError, reason
from hf_ssl_or.hub.run_folder import Statements, collect
from hf_ssl_or.hub.upload import Delivery, deliver
from hf_ssl_or.hub.upload_queue import Destination, Entry, Outbox


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """What `push_to_hub` did.

    Attributes:
        files: Bytes of each file of the commit, by its path in the repository.
        delivery: What the Hub holds now; None after a dry run.
    """

    files: dict[str, int]
    delivery: Delivery | None

    def describe(self) -> str:
        """Says in one line what was done."""
        size = f"{len(self.files)} files, {sum(self.files.values()) / 2**20:.1f} MiB"
        if self.delivery is None:
            return f"nothing was sent, a push would send {size}"
        if self.delivery.pull_request is not None:
            return f"opened {self.delivery.pull_request} ({size})"
        if not self.delivery.changed:
            return f"nothing changed: {self.delivery.url} holds these files already; no commit was made"
        return f"pushed {size} to {self.delivery.url} in one commit, {self.delivery.commit}"


def push_to_hub(
    run_folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    license: str | None = None,
    data_license: str | None = None,
    dry_run: bool = False,
) -> PushResult:
    """Pushes the encoder of a run, with its card, its results and its recipe, in one commit.

    Args:
        run_folder: Folder of the run.
        repo_id: The repository, "owner/name"; made if absent.
        private: Makes it a private one; one that is there must be private already.
        revision: Branch to commit to, made if absent; None for `main`.
        create_pr: Opens a pull request instead.
        message: First line of the commit.
        license: The Hub's identifier of the model's license, say "apache-2.0", for the card.
        data_license: The license of the training images in any words, for the card.
        dry_run: Collects and proves everything, and sends nothing.

    Raises:
        InputError: Something is wrong with the run, the name, or the account; the message says what.
        PushKeptError: The Hub did not take it; it waits in the outbox, see `resume_pushes`.
    """
    statements = Statements(license=license, data_license=data_license)
    to = Destination(
        repo_id=check_destination(repo_id, token=not dry_run),
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=mask(message or f"Upload encoder with hf_ssl_or {importlib.metadata.version('hf-ssl-or')}"),
    )
    if not Path(run_folder).is_dir():
        raise InputError(f"{run_folder}: there is no such folder; give one that hf-ssl-or train made")
    if dry_run:
        return _dry_run(Path(run_folder), to, statements)
    return push_folder(Path(run_folder), Path(run_folder), to, statements)


def push_folder(run_folder: Path, source: Path, to: Destination, statements: Statements) -> PushResult:
    """Pushes `source`, a folder with the form of a run, from the outbox of `run_folder`; see `push_to_hub`."""
    outbox = Outbox(run_folder)
    with outbox.locked():
        entry = outbox.add(to, lambda folder: collect(source, folder, repo_id=to.repo_id, statements=statements))
        return _send(outbox, entry, run_folder, resumed=False)


def resume_pushes(run_folder: str | Path) -> list[PushResult]:
    """Sends what waits in the outbox of a run, oldest first; none if nothing waits.

    Raises:
        InputError: A waiting push is damaged, or is refused by the Hub.
        PushKeptError: The Hub cannot be reached again; what was not sent keeps waiting.
    """
    outbox = Outbox(Path(run_folder))
    if not outbox.folder.is_dir():
        return []
    _need_token()
    with outbox.locked():
        return [_send(outbox, entry, Path(run_folder), resumed=True) for entry in outbox.waiting()]


def _send(outbox: Outbox, entry: Entry, run_folder: Path, *, resumed: bool) -> PushResult:
    files = {path: file.stat().st_size for path, file in entry.files.items()}
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        delivery = deliver(entry, resumed=resumed)
    except InputError:
        outbox.discard(entry)
        raise
    except HubRefusalError as error:
        if not error.keep:
            outbox.discard(entry)
            raise InputError(f"{entry.destination.repo_id}: {error.reason}; nothing was pushed") from error
        raise PushKeptError(_kept(entry, error.reason, run_folder), passing=False) from error
    except Exception as error:  # all attempts failed
        raise PushKeptError(_kept(entry, reason(error), run_folder), passing=True) from error
    outbox.discard(entry)
    return PushResult(files=files, delivery=delivery)


def _kept(entry: Entry, why: str, run_folder: Path) -> str:
    return (
        f"{entry.destination.repo_id}: {why}; nothing was pushed, all of it waits in {entry.folder}: "
        f"hf-ssl-or push {run_folder} --resume"
    )


def _dry_run(run_folder: Path, to: Destination, statements: Statements) -> PushResult:
    with tempfile.TemporaryDirectory(prefix="hf-ssl-or-push-") as name:
        collect(run_folder, Path(name), repo_id=to.repo_id, statements=statements)
        files = {
            p.relative_to(name).as_posix(): p.stat().st_size for p in sorted(Path(name).rglob("*")) if p.is_file()
        }
    return PushResult(files=files, delivery=None)


def check_destination(repo_id: str, *, token: bool = True) -> str:
    """Returns the name back if it is one that the Hub takes, and if there is a token to push with.

    Raises:
        InputError: It is not, or there is none.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"repository: {repo_id!r} is no Hub id such as owner/name: {error}") from error
    if repo_id.count("/") != 1:
        raise InputError(f"repository: {repo_id!r} names no owner; write owner/name")
    if token:
        _need_token()
    return repo_id


def _need_token() -> None:
    if get_token() is None:
        raise InputError("there is no access token for the Hub: run hf auth login, or set HF_TOKEN")
