"""Which failures of a task are worth a retry."""

from __future__ import annotations

from typing import Any

from dapo.errors import DapoError


def may_pass(task: Any, run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: an outage of MLflow may be over; our own errors would come again."""
    return not isinstance(state.result(raise_on_failure=False), DapoError)
