"""`dapo run`, `dapo retrain`: the flow in this process, with everything it needs started early and ended afterwards.

The slow parts of a first run (warm-up of the tiny model, data, ten seconds each for Ray and Prefect's server) all start
at once; the tasks that need them find them running.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dapo.config.run import RunConfig
from dapo.errors import EnvironmentCheckError
from dapo.runtime import cluster
from dapo.runtime.ray_job import already_finished
from flows.server import TemporaryServer, prefect_server
from tasks import inputs, progress

log = logging.getLogger("dapo.flows")


def run_here(config: RunConfig, parameters: dict[str, Any], watcher: Callable[[progress.StageProgress], None]) -> str:
    """Run the flow `dapo` to its end; nothing that was started here is left running.

    Args:
        config: the run.
        parameters: of the flow, meaning this configuration.
        watcher: called with each stage's progress.

    Returns:
        finished | stopped

    Raises:
        DapoError: what the flow raised.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when everything has ended.
    """
    progress.watchers.append(watcher)
    home = Path(config.run_root).resolve() / ".prefect"
    try:
        with _signals(), prefect_server(home) as server, _ray(config, _start_ray), _inputs(config):
            state = _run("dapo", parameters, server)
            return "stopped" if state.is_cancelled() else str(state.result(raise_on_failure=True))
    finally:
        progress.watchers.remove(watcher)


def retrain_here(config: RunConfig, parameters: dict[str, Any]) -> str:
    """Run the flow `retrain` to its end, as `run_here` runs `dapo`; returns its final message."""
    home = Path(config.run_root).resolve() / ".prefect"
    with _signals(), prefect_server(home) as server, _ray(config):
        state = _run("retrain", parameters, server)
        return str(state.message) if state.is_cancelled() else str(state.result(raise_on_failure=True))


def _run(name: str, parameters: dict[str, Any], server: TemporaryServer | None) -> Any:
    """The final state of a flow of ours; Prefect reads its settings when it is imported, so that is done here."""
    flow = getattr(importlib.import_module(f"flows.{name}"), name)
    if server is not None:
        progress.notify(progress.StageProgress("prefect", "running", detail=server.why))
        server.wait()
        progress.notify(progress.StageProgress("prefect", "done", detail=server.api))
    return flow(**parameters, return_state=True)


@contextmanager
def _ray(config: RunConfig, start: Callable[[RunConfig], None] | None = None) -> Iterator[None]:
    """On exit, end the local Ray if no other process uses it; with `start`, start it now."""
    cluster.use_while_running()
    starting = threading.Thread(target=start or (lambda _: None), args=(config,), daemon=True, name="starts-ray")
    starting.start()
    try:
        yield
    finally:
        _ignore_signals()
        starting.join()
        for process in cluster.leave(config):
            log.warning("process %d of Ray could not be ended", process.pid)


@contextmanager
def _inputs(config: RunConfig) -> Iterator[None]:
    """Start to prepare data and weights."""
    inputs.begin("weights", config.model.source, Path(config.data.cache_dir))
    inputs.begin("data", config.data, Path(config.data.cache_dir))
    try:
        yield
    finally:
        _ignore_signals()
        inputs.abort_all()


def _ignore_signals() -> None:
    """A second Ctrl-C during clean-up must not leave anything behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _start_ray(config: RunConfig) -> None:
    try:
        if already_finished(config) is None:
            cluster.connect(config)
    except EnvironmentCheckError:
        log.info("the task find_cluster tries again, and reports")


@contextmanager
def _signals() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C; Ctrl-C works even where a script started us in the background."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def output_kept_in(path: Path) -> Iterator[tuple[int, int]]:
    """What libraries print on standard output and error goes to a file; yields the real ones as file descriptors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    real = os.dup(1), os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield real
        finally:
            for number, descriptor in zip((1, 2), real, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
