"""Waiting for a Prefect server through an outage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from prefect.client.orchestration import SyncPrefectClient, get_client

log = logging.getLogger("dapo.tasks")
T = TypeVar("T")

OUTAGE_S = 600.0


def wait_through_outage(ask: Callable[[SyncPrefectClient], T], what: str) -> T:
    """The server's answer, waited for through an outage of `OUTAGE_S` seconds; then raises what the client raised.

    Args:
        ask: is given a client, anew each time.
        what: waits for it, in the log.
    """
    begun, pause = time.monotonic(), 1.0
    while True:
        try:
            with get_client(sync_client=True) as client:
                return ask(client)
        except Exception as error:
            # httpx' and Prefect's own errors alike: an outage looks like many things.
            if time.monotonic() - begun > OUTAGE_S:
                raise
            log.warning("%s waits for the Prefect server (%s)", what, type(error).__name__)
            time.sleep(pause)
            pause = min(2 * pause, 15.0)
