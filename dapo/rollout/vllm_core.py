"""An engine process that dies or hangs becomes an error in time.

vLLM (0.23 to 0.32) notices that its core process died, but a caller that waits for an answer then waits for ever: the
thread that would deliver it ends silently (`SyncMPClient`). There is no public way to end that wait, so two private
attributes are used: `outputs_queue`, from which `step` reads, and `utility_results`, the futures of all other calls.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

from dapo.errors import EngineError

_LOOK_EVERY_S = 0.5


def child_processes() -> set[BaseProcess]:
    """Living processes that this one started."""
    return set(multiprocessing.active_children())


def _descendants(processes: Iterable[BaseProcess]) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= set(psutil.Process(process.pid).children(recursive=True))
    return found


def _shared_memory(processes: Iterable[psutil.Process]) -> set[str]:
    """Names of the segments through which they talk to each other (vLLM's message queues)."""
    found: set[str] = set()
    for process in processes:
        with suppress(OSError):
            found |= set(re.findall(r" /dev/shm/(psm_\w+)", Path(f"/proc/{process.pid}/maps").read_text()))
    return found


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # also where another process has its number now
            process.kill()


class CoreWatch:
    """Watches the processes of one engine from a thread. None of them outlives it: a worker that is stopped or stuck
    would keep its device's memory from the engine that is started in its place.

    Args:
        client: vLLM's `SyncMPClient`.
        processes: those it started. With tensor parallelism each is the parent of its workers.
        answer_s: a call that takes longer than this ends with the processes.
    """

    def __init__(self, client: Any, processes: Sequence[BaseProcess], answer_s: float) -> None:
        self._client, self._processes, self._answer_s = client, list(processes), answer_s
        # Now: whose parent has died cannot be found any more.
        self._workers = _descendants(self._processes)
        core = {psutil.Process(process.pid) for process in self._processes if process.is_alive()}
        # Now, too: nothing in the name of a segment says whose it was.
        self._segments = _shared_memory(core | self._workers)
        self._asked: float | None = None
        self._fate: str | None = None
        self._closed = Event()
        self._thread = Thread(target=self._watch, name="vllm-core-watch", daemon=True)
        self._thread.start()

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Round each call to vLLM.

        Raises:
            EngineError: the engine's process ended, or did not answer in time and was killed.
        """
        self._asked = time.monotonic()
        try:
            yield
        except Exception as error:
            if self._fate is None and not any(p.is_alive() for p in self._processes):
                self._fate = self._death()
            if self._fate is None:
                raise
            raise EngineError(self._fate) from error
        finally:
            self._asked = None

    def close(self) -> None:
        """Watch no longer; they are about to be ended in order."""
        self._closed.set()
        self._thread.join()

    def end_workers(self, grace_s: float = 5.0) -> None:
        """Kill what is left of the workers after the engine was shut down, and remove shared memory that a killed core
        could not."""
        _kill(psutil.wait_procs(self._workers, timeout=grace_s)[1])
        for name in self._segments:
            with suppress(FileNotFoundError):
                segment = SharedMemory(name)
                segment.close()
                segment.unlink()

    def _watch(self) -> None:
        while not self._closed.is_set():
            if not wait([p.sentinel for p in self._processes], timeout=_LOOK_EVERY_S):
                self._kill_if_late()
                continue
            self._fate = self._fate or self._death()
            _kill(self._workers)
            self._release()
            self._closed.wait(_LOOK_EVERY_S)  # and again: a call may have come in between

    def _kill_if_late(self) -> None:
        asked = self._asked
        if asked is None or time.monotonic() - asked < self._answer_s:
            return
        pids = ", ".join(str(p.pid) for p in self._processes)
        self._fate = f"vLLM's process {pids} did not answer within {self._answer_s:.0f} s and was killed; restart it"
        workers = self._workers | _descendants(self._processes)
        for process in self._processes:
            process.kill()
        _kill(workers)

    def _death(self) -> str:
        ended = [f"{p.pid} (exit code {p.exitcode})" for p in self._processes if not p.is_alive()]
        return f"vLLM's process {', '.join(ended)} ended while it was needed; out of memory? Restart it"

    def _release(self) -> None:
        """Release the callers that wait for an answer."""
        if self._asked is None:
            return
        gone = EngineError(str(self._fate))
        self._client.outputs_queue.put_nowait(gone)
        for future in list(self._client.utility_results.values()):
            if not future.done():
                future.set_exception(gone)
