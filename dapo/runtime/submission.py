"""How a job gets to a cluster: to the local one as a command in our folder, to one elsewhere with our code."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dapo.errors import TrainingError
from dapo.runtime.dashboard import AlreadySubmitted, Dashboard

_NOT_UPLOADED = [".git", ".venv*", "runs", "cache", "**/__pycache__", "*.egg-info", "mlruns", "mlartifacts", "*.db"]


def submit(
    cluster: Dashboard,
    submission_id: str,
    arguments: Sequence[str],
    env: Mapping[str, str],
    metadata: Mapping[str, str],
) -> None:
    """Start a Python on the cluster's head node.

    Args:
        arguments: of that Python.
        env: variables on top of the cluster's own.

    Raises:
        AlreadySubmitted: the cluster has a job of this id.
        TrainingError: the cluster elsewhere does not take the job.
        DashboardAway: the local one does not answer.
    """
    if cluster.local:
        command = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join([sys.executable, *arguments])}"
        cluster.submit(submission_id, command, dict(env), dict(metadata))
        return
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {cluster.token}"} if cluster.token else None
    client = JobSubmissionClient(cluster.address, headers=headers)
    try:
        client.submit_job(
            submission_id=submission_id,
            entrypoint=shlex.join(["python", *arguments]),
            runtime_env={"env_vars": dict(env), "working_dir": str(Path.cwd()), "excludes": _NOT_UPLOADED},
            metadata=dict(metadata),
        )
    except RuntimeError as error:
        if "already exists" in str(error):
            raise AlreadySubmitted(submission_id) from None
        raise TrainingError(f"Ray at {cluster.address} did not take the job: {error}") from error
