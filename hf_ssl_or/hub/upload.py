"""Sends one waiting push to the Hub: large files first, then one commit that makes everything visible at once."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import disable_progress_bars

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.retries import with_retries
from hf_ssl_or.hub.upload_queue import Destination, Entry

# Of what is in the repository but not in the push, these are leftovers of an earlier push; the rest is the user's.
OURS = ("model*.safetensors", "model.safetensors.index.json", "figures/*.png", ".eval_results/*.yaml")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What a push came to.

    Attributes:
        url: Address of the repository.
        commit: Hash of the commit that holds the files.
        changed: Whether a commit was made; False where the repository holds the same already.
        pull_request: Address of the pull request, if one was asked for and needed.
    """

    url: str
    commit: str
    changed: bool
    pull_request: str | None = None


def deliver(entry: Entry, *, resumed: bool = False, sleep: Callable[[float], None] = time.sleep) -> Delivery:
    """Sends a waiting push; does not remove it from the outbox.

    Args:
        entry: The push.
        resumed: It was tried before, so that its pull request may be there already.
        sleep: Waits between attempts.

    Raises:
        InputError: The name is taken, or the repository is public though it must not be.
        HubRefusalError: The Hub refuses for good.
        Exception: All attempts failed.
    """
    api = HfApi(library_name="hf-ssl-or")
    disable_progress_bars()
    return with_retries(lambda number: _attempt(api, entry, again=resumed or number > 0), sleep=sleep)


def _attempt(api: HfApi, entry: Entry, *, again: bool) -> Delivery:
    to = entry.destination
    url = _ensure_repository(api, to)
    head = _head(api, to)
    if again and to.create_pr and (found := _pull_request(api, entry)) is not None:
        return Delivery(url=url, commit=found[1], changed=False, pull_request=f"{url}/discussions/{found[0]}")
    there = api.list_repo_files(to.repo_id, revision=head)
    stale = [path for path in there if path not in entry.sha256 and any(fnmatch.fnmatch(path, own) for own in OURS)]
    info = api.create_commit(
        to.repo_id,
        [
            *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file)) for path, file in entry.files.items()),
            *(CommitOperationDelete(path_in_repo=path) for path in stale),
        ],
        commit_message=to.message,
        commit_description=_signature(entry),
        revision=to.revision,
        create_pr=to.create_pr,
        parent_commit=head,
    )
    return Delivery(url=url, commit=info.oid, changed=info.oid != head, pull_request=info.pr_url)


def _ensure_repository(api: HfApi, to: Destination) -> str:
    """Makes the repository unless it is there; gives its address."""
    there = None
    with suppress(RepositoryNotFoundError):
        there = api.model_info(to.repo_id)
    if there is None:
        for kind in ("dataset", "space"):
            if api.repo_exists(to.repo_id, repo_type=kind):
                raise InputError(f"{to.repo_id}: is a {kind} on the Hub; choose another name for the encoder")
        return str(api.create_repo(to.repo_id, private=to.private or None, exist_ok=True))
    if to.private and not there.private:
        raise InputError(f"{to.repo_id}: is public on the Hub; leave out --private, or make it private there first")
    return f"{api.endpoint}/{to.repo_id}"


def _head(api: HfApi, to: Destination) -> str:
    """Returns the commit that the branch points at; makes the branch from `main` unless it is there."""
    try:
        head = api.model_info(to.repo_id, revision=to.revision).sha
    except RevisionNotFoundError:
        if to.create_pr or to.revision is None:
            raise
        api.create_branch(to.repo_id, branch=to.revision, exist_ok=True)
        head = api.model_info(to.repo_id, revision=to.revision).sha
    assert head is not None  # the server always says
    return head


def _pull_request(api: HfApi, entry: Entry) -> tuple[str, str] | None:
    """Finds the pull request that an earlier attempt opened before its answer was lost: its number and commit."""
    for ref in api.list_repo_refs(entry.destination.repo_id, include_pull_requests=True).pull_requests or []:
        last = api.list_repo_commits(entry.destination.repo_id, revision=ref.ref)[0]
        if _signature(entry) in last.message:
            return ref.ref.rsplit("/", 1)[1], last.commit_id
    return None


def _signature(entry: Entry) -> str:
    return f"Content: sha256 {entry.digest}"
