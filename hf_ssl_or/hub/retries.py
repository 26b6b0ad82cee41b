"""Which failures of the Hub pass, and how long to wait for that."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from hf_ssl_or.errors import InputError
from hf_ssl_or.hub.redaction import mask

T = TypeVar("T")

ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 60.0
_PASSING = (408, 409, 412, 425, 429)  # and all from 500 on
_UPLOAD_FAILED = "Error while uploading"  # of a large file: what arrived was not what was sent


class PushKeptError(InputError):
    """The Hub did not take the push; all of it waits in the outbox.

    Attributes:
        passing: Whether the same push may succeed later with nothing changed.
    """

    def __init__(self, message: str, *, passing: bool) -> None:
        super().__init__(message)
        self.passing = passing


class HubRefusalError(Exception):
    """The Hub said no, for good: `reason` says why in one line; `keep` whether another token would help."""

    def __init__(self, reason: str, *, keep: bool) -> None:
        super().__init__(reason)
        self.reason, self.keep = reason, keep


def with_retries(attempt: Callable[[int], T], *, sleep: Callable[[float], None] = time.sleep) -> T:
    """Tries up to five times, waiting 1, 2, 4, 8 s and a random part of as much again, or what the Hub asks for.

    Args:
        attempt: Does the work, given the number of attempts before.
        sleep: Waits.

    Raises:
        HubRefusalError: The Hub refuses: no attempt would change that.
        Exception: The error of the last attempt.
    """
    for number in range(ATTEMPTS):
        try:
            return attempt(number)
        except InputError:
            raise
        except Exception as error:  # of the Hub's client, of its HTTP library, or of hf_xet
            refuse(error)
            if number + 1 == ATTEMPTS or _is_offline(error):
                raise
            sleep(waiting_time(error, number))
    raise AssertionError("unreachable")


def waiting_time(error: BaseException, number: int) -> float:
    """Returns the seconds to wait after attempt `number`; never less than the Hub's Retry-After, up to a minute."""
    wait = FIRST_WAIT * 2**number * (1 + random.random())
    answer = _answer(error)
    asked = "" if answer is None else answer.response.headers.get("Retry-After", "")
    return min(max(wait, float(asked) if asked.isdecimal() else 0.0), LONGEST_WAIT)


def refuse(error: BaseException) -> None:
    """Raises a `HubRefusalError` if the Hub's answer is final; returns if it may pass."""
    answer = _answer(error)
    status = None if answer is None else answer.response.status_code
    if status is None or status >= 500 or status in _PASSING:
        return
    unauthorized = status in (401, 403)
    if unauthorized or _UPLOAD_FAILED not in str(error):
        raise HubRefusalError(reason(error), keep=unauthorized) from error


def reason(error: BaseException) -> str:
    """Says in one line, without a token, what went wrong."""
    if _is_offline(error):
        return "this process is offline (HF_HUB_OFFLINE is set)"
    answer = _answer(error)
    if answer is None:
        return mask(" ".join(f"the Hub cannot be reached: {type(error).__name__} {error}".split())[:300])
    status = answer.response.status_code
    if status == 401:
        return "the token is not valid (expired or revoked); run hf auth login"
    said = answer.response.headers.get("X-Error-Message") or answer.server_message or ""
    hint = "; the token needs the permission to write there" if status == 403 else ""
    return mask(" ".join(f"the Hub answered {status} {said}".split())[:300]) + hint


def _answer(error: BaseException) -> HfHubHTTPError | None:
    """Finds the Hub's answer that an error is about, if one arrived."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    return cause


def _is_offline(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OfflineModeIsEnabled):
        cause = cause.__cause__
    return cause is not None
