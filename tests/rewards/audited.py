"""All our graders under an audit hook: they may compute, and do nothing else."""

from __future__ import annotations

import sys
import time

from dapo.rewards.geometry3k import grade as geometry3k
from dapo.rewards.mathematics import answer_line, boxed, hashes
from dapo.types import Scored

FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "open",
    "os.",
    "subprocess.",
    "pickle.",
    "socket.",
    "ctypes.",
    "shutil.",
    "marshal.",
)


def watched(response: str, answer: str) -> Scored:
    """The verdict of the geometry grader, unless any grader touched the machine.

    Raises:
        RuntimeError: names what was attempted.
    """
    _events.clear()
    started = time.process_time()
    _state["watching"] = True
    try:
        verdict = geometry3k(response, answer)
        for grader in (answer_line, boxed, hashes):
            grader(response, answer)
    finally:
        _state["watching"] = False
    if _events:
        raise RuntimeError(f"the graders attempted {_events}")
    return Scored(verdict.accuracy, verdict.format, 0.0, str(time.process_time() - started))


def tempted(response: str, answer: str) -> bool:
    """Evaluates what the model wrote: what the hook is there to see."""
    _state["watching"] = True
    eval(response, {"__builtins__": {}})
    _state["watching"] = False
    if _events:
        raise RuntimeError(f"the graders attempted {_events}")
    return True


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _state["watching"] and event.startswith(FORBIDDEN):
        _events.append(event)


_events: list[str] = []
_state = {"watching": False}
sys.addaudithook(_note)
