"""Commands `up` and `down`: start and end the services that deployments need."""

from __future__ import annotations

import argparse
import os
from typing import Any


def add_commands(commands: Any) -> None:
    """Add these commands to the parser of `dapo`."""
    up = commands.add_parser(
        "up",
        help="start what deployments need: Prefect server, work pool, worker, MLflow",
        description="Start, or find, a Prefect server, a work pool, a worker and MLflow's pages; register everything "
        "in prefect.yaml. What answers already (PREFECT_API_URL, prefect.toml, the profile, MLFLOW_TRACKING_URI) is "
        "used as it is. Run twice, nothing is started twice. Logs: runs/.up.",
    )
    up.add_argument("--mlflow-port", type=int, default=5000, help="where MLflow's pages are shown (default: 5000)")
    up.set_defaults(command=_up)

    down = commands.add_parser(
        "down",
        help="end what `dapo up` started, and nothing else",
        description="End worker, MLflow and server that `dapo up` started from this folder. Trainings go on; the same "
        "run again follows them.",
    )
    down.add_argument(
        "--stop-runs", action="store_true", help="trainings on this folder's Ray save a checkpoint and stop first"
    )
    down.add_argument(
        "--end-ray",
        action="store_true",
        help="end this folder's Ray with everything that runs on it, without a checkpoint",
    )
    down.add_argument("--wait", type=float, default=300.0, metavar="SECONDS", help="for them (default: 300)")
    down.set_defaults(command=_down)


def _up(arguments: argparse.Namespace) -> int:
    from flows.up import Stack, project_folder

    here = os.getcwd()
    project = project_folder(_say)
    asked = os.environ.get("PREFECT_API_URL"), os.environ.get("MLFLOW_TRACKING_URI")
    stack = Stack(project, _say)
    stack.up(arguments.mlflow_port)
    print(f"\n  prefect deployment run dapo/geo3k-tiny --watch      # {_where(stack, here, asked[0])}")
    print(f"  export PREFECT_API_URL={stack.api}      # first, in any other shell")
    ours = stack.mlflow.running()
    if ours and asked[1] is None:
        print(f"  export MLFLOW_TRACKING_URI={ours.address}      # for `mlflow` and `dapo compare` elsewhere")
    print("  dapo down      # ends what was started here")
    return 0


def _where(stack: Any, here: str, asked: str | None) -> str:
    from flows.server import configured_api

    if asked:
        return "in this shell"
    return "in this folder" if here == str(stack.project) and configured_api() == stack.api else "after the export"


def _down(arguments: argparse.Namespace) -> int:
    from flows.down import down
    from flows.up import Stack, project_folder

    stack = Stack(project_folder(_say), _say)
    down(stack, stop_runs=arguments.stop_runs, end_ray=arguments.end_ray, wait_s=arguments.wait)
    return 0


def _say(words: str) -> None:
    print(words, flush=True)
