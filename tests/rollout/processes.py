"""Other processes in tests of engines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def run_two_ranks(
    module: str,
    arguments: Callable[[int], Sequence[object]],
    env: Callable[[int], dict[str, str]],
    timeout_s: float,
) -> list[dict[str, Any]]:
    """The line of JSON behind RESULT that each of two processes of a test module prints.

    Args:
        arguments: of a rank.
        env: variables of a rank beside this process's own.
    """
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments(rank))],
            env=os.environ | env(rank),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [json.loads(text.partition("RESULT ")[2].splitlines()[0]) for text in printed]
