"""The watch over an engine's processes, on real processes that do not answer."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace

import psutil
import pytest

from dapo.errors import EngineError
from dapo.rollout.vllm_core import CoreWatch


def core_with_a_worker(sender: Connection) -> None:
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    segment = SharedMemory(create=True, size=64)
    sender.send((worker.pid, segment.name))
    worker.wait()
    time.sleep(600)


class Engine:
    """A core, its worker, and somebody who waits for their answer."""

    def __init__(self, answer_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        self.core = context.Process(target=core_with_a_worker, args=(sender,), daemon=True)
        self.core.start()
        worker, self.segment = receiver.recv()
        self.worker = psutil.Process(worker)
        self.answer: Future[None] = Future()
        self.client = SimpleNamespace(outputs_queue=queue.Queue(), utility_results={1: self.answer})
        self.watch = CoreWatch(self.client, [self.core], answer_s)

    def ask(self) -> None:
        with self.watch.asked():
            self.answer.result(timeout=60)


@pytest.fixture
def start() -> Iterator[Callable[[float], Engine]]:
    engines: list[Engine] = []

    def begin(answer_s: float) -> Engine:
        engines.append(Engine(answer_s))
        return engines[-1]

    yield begin
    for engine in engines:
        engine.watch.close()
        engine.core.kill()
        if engine.worker.is_running():
            engine.worker.kill()


def gone(process: psutil.Process) -> bool:
    """Within some seconds; nobody may be there to bury it."""
    until = time.monotonic() + 10
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("stopped", ["core", "worker", "none"])
def test_processes_that_do_not_answer_are_killed_and_whoever_waits_is_told(
    start: Callable[[float], Engine], stopped: str
) -> None:
    engine = start(1.0)
    if stopped != "none":
        os.kill(engine.core.pid or 0 if stopped == "core" else engine.worker.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="did not answer within 1 s and was killed"):
        engine.ask()
    assert isinstance(engine.client.outputs_queue.get(timeout=10), EngineError)
    engine.core.join(10)
    assert engine.core.exitcode == -signal.SIGKILL
    assert gone(engine.worker), "it would keep the device's memory"


def test_a_stopped_worker_does_not_outlive_a_core_that_dies(start: Callable[[float], Engine]) -> None:
    engine = start(60.0)
    engine.worker.suspend()
    engine.core.kill()
    with pytest.raises(EngineError, match="ended while it was needed"):
        engine.ask()
    assert gone(engine.worker)


def test_a_stopped_worker_does_not_outlive_an_engine_that_is_closed(start: Callable[[float], Engine]) -> None:
    engine = start(60.0)
    engine.worker.suspend()
    engine.watch.close()
    engine.core.kill()  # as vLLM's shutdown does at last
    assert engine.worker.status() == psutil.STATUS_STOPPED
    engine.watch.end_workers(grace_s=0.5)
    assert gone(engine.worker)


def test_shared_memory_of_a_killed_core_is_removed_and_of_others_is_not(start: Callable[[float], Engine]) -> None:
    another = SharedMemory(create=True, size=64)
    engine = start(60.0)
    engine.core.kill()
    engine.core.join()
    SharedMemory(engine.segment).close()  # still there
    engine.watch.close()
    engine.watch.end_workers()
    with pytest.raises(FileNotFoundError):
        SharedMemory(engine.segment)
    SharedMemory(another.name).close()
    another.close()
    another.unlink()
