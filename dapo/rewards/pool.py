"""Grading in worker processes: a deadline per item, a hard kill, and an outcome for every failure."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dapo.errors import ConfigError, RewardError
from dapo.types import Crashed, Scored, TimedOut

STARTUP_S = 120.0
"""For importing the reward's module."""
EXIT_S = 1.0
"""Between a worker's closed pipe and its exit code."""
MAX_CHUNK = 64
"""Items per message; a hang costs its own item only, the others of its message are given to another worker."""
MAX_CHUNK_CHARS = 1 << 20

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from dapo.rewards.worker import serve; serve()"
_ROOT = str(Path(__file__).resolve().parents[2])

Judged = Scored | TimedOut | Crashed


class RewardPool:
    """Worker processes that call one reward. A context manager; the workers end with it, or with this process."""

    def __init__(self, function: str, *, workers: int = 1, deadline_s: float = 5.0) -> None:
        """Start the workers and wait until they have imported the reward.

        Args:
            function: `module:name`, see `dapo.rewards.load`.
            workers: processes (about 15 MB each, and what the reward's module imports).
            deadline_s: seconds one check may take.

        Raises:
            ConfigError: the function cannot be loaded.
            RewardError: a worker died or hung while it imported the module.
        """
        self.function, self.deadline_s = function, deadline_s
        self.replaced = 0
        """Workers that hung or died and were replaced."""
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._finalizer = weakref.finalize(self, _kill_all, self._processes)
        self._workers: list[_Worker] = []
        try:
            self._workers = [self._start() for _ in range(workers)]
            while not all(worker.ready for worker in self._workers):
                self._turn([], deque())
        except BaseException:
            self.close()
            raise

    def score(self, items: Sequence[tuple[str, str]]) -> list[Judged]:
        """Judge (response, answer) pairs; outcomes in their order. A check that hangs or dies loses its own item only.

        Raises:
            RewardError: a replaced worker could not load the reward again, or the pool is closed.
        """
        with self._lock:
            if not self._finalizer.alive:
                raise RewardError(f"the pool for {self.function} is closed; make a new one")
            outcomes: list[Judged | None] = [None] * len(items)
            queue = deque((i, *item) for i, item in enumerate(items))
            try:
                while queue or any(worker.pending for worker in self._workers):
                    for worker in self._workers:
                        if queue and worker.ready and not worker.pending:
                            worker.give(self._chunk(queue))
                            self._watch(worker)
                    self._turn(outcomes, queue)
            except BaseException:
                # Replies still under way would be taken for answers to the next call.
                self._workers = [self._replace(w) if w.pending else w for w in self._workers]
                raise
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        self._finalizer()
        self._workers = []
        self._selector.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chunk(self, queue: deque[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
        size = min(MAX_CHUNK, math.ceil(len(queue) / (2 * len(self._workers))))
        chunk = [queue.popleft()]
        chars = len(chunk[0][1])
        while queue and len(chunk) < size and (chars := chars + len(queue[0][1])) < MAX_CHUNK_CHARS:
            chunk.append(queue.popleft())
        return chunk

    def _start(self) -> _Worker:
        worker = _Worker(self.function, self.deadline_s)
        self._processes.add(worker.process)
        self._selector.register(worker.replies, selectors.EVENT_READ, worker)
        self._watch(worker)
        return worker

    def _watch(self, worker: _Worker) -> None:
        """Wake up when there is room to write, as long as there is something to write."""
        watched = worker.requests in self._selector.get_map()
        if worker.outbox and not watched:
            self._selector.register(worker.requests, selectors.EVENT_WRITE, worker)
        elif watched and not worker.outbox:
            self._selector.unregister(worker.requests)

    def _replace(self, worker: _Worker) -> _Worker:
        for stream in (worker.replies, worker.requests):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
        _kill(worker.process)
        self._processes.discard(worker.process)
        self.replaced += 1
        return self._start()

    def _turn(self, outcomes: list[Judged | None], queue: deque[tuple[int, str, str]]) -> None:
        """Wait for the next event of any worker and act on it."""
        now = time.monotonic()
        waits = [worker.expires - now for worker in self._workers if worker.pending or not worker.ready]
        events = self._selector.select(max(0.0, min(waits, default=0.0)))
        replied = set()
        for key, _ in events:
            worker: _Worker = key.data
            if key.fileobj is worker.requests:
                worker.write()
                self._watch(worker)
            else:
                replied.add(worker)
                worker.read(outcomes)
        now = time.monotonic()
        for position, worker in enumerate(self._workers):
            if worker.ended:
                lost: Judged = worker.why_ended()
            elif worker.expires <= now and worker not in replied and (worker.pending or not worker.ready):
                lost = TimedOut(self.deadline_s)
            else:
                continue
            if not worker.ready:
                reason = lost.reason if isinstance(lost, Crashed) else f"took longer than {STARTUP_S:g} s"
                raise RewardError(f"a worker for reward.function={self.function} {reason} while importing the module")
            if worker.pending:
                outcomes[worker.pending.popleft()[0]] = lost
                queue.extendleft(reversed(worker.pending))
                worker.pending.clear()
            self._workers[position] = self._replace(worker)


class _Worker:
    """A process, its unanswered items, and its current deadline."""

    def __init__(self, function: str, deadline_s: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT, _ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a kill then takes its children along
        )
        assert self.process.stdin is not None, "a pipe was asked for"
        assert self.process.stdout is not None, "a pipe was asked for"
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.deadline_s = deadline_s
        self.ready = self.ended = False
        self.expires = time.monotonic() + STARTUP_S
        self.pending: deque[tuple[int, str, str]] = deque()
        self.inbox = b""
        self.outbox = _line({"path": sys.path, "function": function, "deadline_s": deadline_s})

    def give(self, chunk: list[tuple[int, str, str]]) -> None:
        self.pending.extend(chunk)
        self.outbox += _line([(response, answer) for _, response, answer in chunk])
        self.expires = time.monotonic() + self.deadline_s

    def write(self) -> None:
        try:
            self.outbox = self.outbox[os.write(self.requests, self.outbox) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.outbox = b""  # the end of its replies shows why

    def read(self, outcomes: list[Judged | None]) -> None:
        data = os.read(self.replies, 1 << 16)
        self.ended = not data
        *lines, self.inbox = (self.inbox + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "refused" in message:
                raise ConfigError(message["refused"])
            if "ready" in message:
                self.ready = True
            else:
                outcomes[self.pending.popleft()[0]] = _outcome(message)
        if lines:
            self.expires = time.monotonic() + self.deadline_s

    def why_ended(self) -> Crashed | TimedOut:
        """The outcome of the answers that the ended process leaves unchecked."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=EXIT_S)
        _kill(self.process)
        code = self.process.returncode
        if code == -signal.SIGALRM:
            return TimedOut(self.deadline_s)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Crashed(f"the worker process {how}")


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _outcome(message: dict[str, Any]) -> Judged:
    return Crashed(message["crashed"]) if "crashed" in message else Scored(**message)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a worker and what it started."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _kill_all(processes: set[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        _kill(process)
    processes.clear()
