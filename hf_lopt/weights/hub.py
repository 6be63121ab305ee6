"""Fetches files from the Hugging Face hub: cache first, then the network, with a wait that no server can prolong.

What failed is remembered for the life of the process, so that the wait is paid once.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError


# Seconds that the hub has for its first answer, and for everything that one caller asks of it.
FIRST_ANSWER_S = 10.0
TOTAL_S = 120.0

_THREAD = "hf_lopt-hub"
# What failed: (endpoint, repository or None for the whole hub, file or None for all) -> reason.
_failed: dict[tuple[str, str | None, str | None], str] = {}


class NotAvailable(Exception):
    """A file cannot be had. `scope` is what the reason holds for: the "file", its "repository" or the whole "hub"."""

    def __init__(self, reason: str, scope: str = "hub"):
        super().__init__(reason)
        self.scope = scope


def cached(repo_id: str, filename: str) -> Path | None:
    """The file in the hub's local cache, or None. No network.

    Raises:
        NotAvailable: the cache cannot be read.
    """
    try:
        found = try_to_load_from_cache(repo_id, filename, cache_dir=constants.HF_HUB_CACHE)
    except (OSError, UnicodeError) as error:
        raise NotAvailable(f"the cache {constants.HF_HUB_CACHE} cannot be read: {error}", "repository") from error
    return Path(found) if isinstance(found, str) else None


def fetch(repo_id: str, filenames: Sequence[str], deadline: float) -> Path:
    """The first of `filenames` that the repository has, from the cache when one is there.

    Args:
        deadline: on the clock of `time.monotonic`; nothing is waited for beyond it.

    Raises:
        NotAvailable: with the reason.
    """
    try:
        for filename in filenames:
            if local := cached(repo_id, filename):
                return local
        for filename in filenames[:-1]:
            try:
                return _download(repo_id, filename, deadline)
            except NotAvailable as error:
                if error.scope != "file":
                    raise
        return _download(repo_id, filenames[-1], deadline)
    except HFValidationError as error:
        raise NotAvailable(f"{repo_id!r} is not a hub id: {error}", "repository") from error


def forget(repo_id: str) -> None:
    """Ask for files of a repository again that could not be had earlier in this process."""
    for place in [place for place in _failed if place[1] == repo_id]:
        del _failed[place]


def _download(repo_id: str, filename: str, deadline: float) -> Path:
    """Download one file into the hub's cache; `NotAvailable` when that fails or takes too long."""
    if constants.HF_HUB_OFFLINE:
        raise NotAvailable("HF_HUB_OFFLINE is set and they are not in the cache")
    endpoint = constants.ENDPOINT
    places = {
        "hub": (endpoint, None, None),
        "repository": (endpoint, repo_id, None),
        "file": (endpoint, repo_id, filename),
    }
    for scope, place in places.items():
        if place in _failed:
            raise NotAvailable(f"{_failed[place]} (earlier in this process)", scope)
    url = hf_hub_url(repo_id, filename, endpoint=endpoint)
    wait = max(0.0, min(FIRST_ANSWER_S, deadline - time.monotonic()))
    try:
        # Asked first and alone: hf_hub_download repeats a request that timed out, for minutes.
        _bounded(lambda: get_hf_file_metadata(url, timeout=wait), wait, "gave no answer")
        return Path(
            _bounded(
                lambda: hf_hub_download(
                    repo_id, filename, endpoint=endpoint, cache_dir=constants.HF_HUB_CACHE, etag_timeout=wait
                ),
                max(0.0, deadline - time.monotonic()),
                "did not deliver the file",
            )
        )
    except NotAvailable as error:
        _failed[places[error.scope]] = str(error)
        raise


def _bounded(call: Callable[[], Any], seconds: float, failure: str) -> Any:
    """The result of `call`, waiting at most `seconds`.

    A timeout of the HTTP library bounds one read, so a server that trickles bytes could hold us for ever. The call
    therefore runs in a daemon thread, which is left to itself when time is up and does not keep the process alive.
    """
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except Exception as error:  # whatever the HTTP library raises; it is classified in the calling thread
            outcome.put((None, error))

    for name in ("huggingface_hub.file_download", "huggingface_hub.utils._http"):
        logging.getLogger(name).addFilter(_not_from_hub_thread)
    threading.Thread(target=run, name=_THREAD, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise NotAvailable(f"the hub ({constants.ENDPOINT}) {failure} within {seconds:.3g} s") from None
    if error is not None:
        raise NotAvailable(*_explain(error)) from error
    return result


def _not_from_hub_thread(record: logging.LogRecord) -> bool:
    """Logging filter: the retries of a wait that we bound and report ourselves are noise."""
    return record.threadName != _THREAD


def _explain(error: Exception) -> tuple[str, str]:
    """An error of the hub's library as (reason, scope)."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, EntryNotFoundError):
        return "the repository does not have the file", "file"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such repository, or it is private (HTTP {status})", "repository"
    if status is not None:
        return f"the hub answered with HTTP {status}", "repository" if status in (401, 403, 404) else "hub"
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"the hub ({constants.ENDPOINT}) cannot be used ({type(error).__name__}: {first_line[:200]})", "hub"
