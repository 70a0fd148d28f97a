"""Retries after network failures: how many, with which pauses, and what is reported in the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

ATTEMPTS = 5
"""Per request and per file; a file's attempts start anew whenever bytes arrive."""
FIRST_WAIT_S = 1.0
"""Before the second attempt; doubled for each further one."""

log = logging.getLogger(__name__)
T = TypeVar("T")


def attempt(doing: Callable[[], T], what: str, stop: threading.Event | None = None) -> T:
    """Call it, again after a growing pause where it fails; the last failure is raised.

    Args:
        doing: may be repeated. What it does not find (FileNotFoundError) will not be there later either.
        what: for the log.
        stop: set: no further attempt.
    """
    stop = stop or threading.Event()
    for failures in range(1, ATTEMPTS + 1):
        try:
            return doing()
        except FileNotFoundError:
            raise
        except Exception as error:  # every driver has its own kinds (botocore's are no OSErrors); the answer is one
            if failures == ATTEMPTS or stop.is_set():
                raise
            pause(failures, f"{what} failed ({short(error)})", stop)
    raise AssertionError("unreachable: the last attempt returns or raises")


def pause(failures: int, why: str, stop: threading.Event) -> None:
    """Waits before the next attempt, and says so."""
    wait = FIRST_WAIT_S * 2 ** (failures - 1)
    log.warning("%s; attempt %d of %d in %.0f s", why, failures + 1, ATTEMPTS, wait)
    stop.wait(wait)


def short(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
