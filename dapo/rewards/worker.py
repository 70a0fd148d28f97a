"""One process that grades answers for `RewardPool`; JSON lines over its standard input and output.

The parent sends one line with the settings, then lines with lists of [response, answer]; every item is answered by a
line of its own as soon as it is judged, so that the parent knows which one is running. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import sys
import traceback
from typing import Any

from dapo.errors import ConfigError
from dapo.rewards.load import Reward, load
from dapo.types import Scored

ORPHAN_CHECK_S = 2.0
"""How often an idle worker looks whether its parent is still there (a closed pipe shows it sooner)."""
GRACE_S = 1.0
"""The parent kills at the deadline; a worker whose parent is gone is killed by its own alarm this much later."""
MAX_REASON = 500


def serve() -> None:
    """Answer requests until the parent closes the pipe or is gone."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.dup(1)
    # What a reward prints must not end up between the replies.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    parent = os.getppid()

    def reply(message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(replies, data) :]

    settings = json.loads(requests.readline())
    sys.path[:] = settings["path"]
    try:
        function = load(settings["function"])
    except ConfigError as error:
        reply({"refused": str(error)})
        return
    reply({"ready": True})
    limit = settings["deadline_s"] + GRACE_S
    while _await_request(requests.fileno(), parent) and (line := requests.readline()):
        for response, answer in json.loads(line):
            signal.setitimer(signal.ITIMER_REAL, limit)
            reply(call_reward(function, response, answer))
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _await_request(descriptor: int, parent: int) -> bool:
    """Wait for input; False: the parent is gone."""
    while not select.select([descriptor], [], [], ORPHAN_CHECK_S)[0]:
        if os.getppid() != parent:
            return False
    return True


def call_reward(function: Reward, response: str, answer: str) -> dict[str, Any]:
    """Call the reward; the fields of `Scored`, or ``{"crashed": reason}``."""
    try:
        return _fields(function(response, answer))
    except BaseException as error:  # a reward that calls sys.exit() is as broken as one that raises
        frames = traceback.extract_tb(error.__traceback__)
        at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        return {"crashed": f"{type(error).__name__}: {error}"[:MAX_REASON] + at}


def _fields(result: object) -> dict[str, Any]:
    """Check what the reward returned; numpy and torch scalars count as the numbers they hold."""
    if isinstance(result, Scored):
        problem = _problem(result)
        if problem:
            return {"crashed": f"the reward returned Scored with {problem}"}
        return {
            "accuracy": result.accuracy,
            "format": float(result.format),
            "overlong": float(result.overlong),
            "extracted": str(result.extracted)[:MAX_REASON],
        }
    value = result.item() if hasattr(result, "item") else result
    if isinstance(value, bool | int | float) and value in (0, 1):
        return {"accuracy": bool(value)}
    if isinstance(value, float | int):
        return {
            "crashed": f"the reward returned {value!r}, which is neither right (1) nor wrong (0); "
            "return Scored(accuracy=..., format=...) for anything between"
        }
    shown = repr(result)[:100]
    return {"crashed": f"the reward returned {type(result).__name__} {shown}, not Scored, a bool, or a number 0 or 1"}


def _problem(scored: Scored) -> str:
    if not isinstance(scored.accuracy, bool):
        return f"accuracy={scored.accuracy!r}, which is not True or False"
    for name, value, low, high in (("format", scored.format, 0, 1), ("overlong", scored.overlong, -math.inf, 0)):
        if not isinstance(value, int | float) or not (math.isfinite(value) and low <= value <= high):
            return f"{name}={value!r}, which is not a number between {low} and {high}"
    return ""
