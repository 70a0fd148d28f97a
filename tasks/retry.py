"""Which failures of a task may be gone the next time."""

from __future__ import annotations

from typing import Any

from dapo.errors import DapoError


def may_pass(task: Any, run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: an outage of MLflow's may be over; what our own errors name is there again."""
    return not isinstance(state.result(raise_on_failure=False), DapoError)
