"""What a reward is: a function from a response and the ground truth to an outcome."""

from __future__ import annotations

from typing import Protocol

from dapo.types import Scored


class Reward(Protocol):
    """A user's reward. Runs in a worker process with a deadline; raising is `Crashed`, never a zero."""

    def __call__(self, response: str, answer: str) -> Scored | bool | float:
        """Judge one response against the ground truth. A bool (or 0.0 / 1.0) is an accuracy alone."""
        ...
