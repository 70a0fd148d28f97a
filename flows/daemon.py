"""Processes that outlive the command that started them, each with a record and a log in a state folder."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dapo.errors import EnvironmentCheckError
from dapo.files import write_whole
from dapo.runtime import processes

START_DEADLINE_S = 180.0
_MARK = "DAPO_SERVICE"


@dataclass(frozen=True, slots=True)
class Record:
    """What the state folder keeps about a started process."""

    pid: int
    born: int
    """Clock ticks since boot: it distinguishes another process with the same number."""
    mark: str
    """Value of an environment variable that the process was started with."""
    address: str
    command: tuple[str, ...]


class Service:
    """One detached process.

    Args:
        folder: holds `NAME.json` (the record) and `NAME.log` (everything it prints).
        name: of the service.
        title: in messages, for example "Prefect server".
    """

    def __init__(self, folder: Path, name: str, title: str) -> None:
        self.name, self.title = name, title
        self.log, self._record = folder / f"{name}.log", folder / f"{name}.json"
        self._began_at = 0

    def record(self) -> Record | None:
        """Of the process that was started last, whether it lives or not."""
        try:
            saved = json.loads(self._record.read_text())
            return Record(**(saved | {"command": tuple(saved["command"])}))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def running(self) -> Record | None:
        """The record where that very process lives."""
        record = self.record()
        if record is None:
            return None
        process = processes.look(record.pid)
        ours = process is not None and process.born == record.born and processes.carries(record.pid, record.mark)
        return record if ours else None

    def start(self, command: Sequence[str], address: str, env: Mapping[str, str], cwd: Path) -> None:
        """Start it in a session of its own; returns at once, `wait` waits until it answers."""
        mark = secrets.token_hex(8)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Where a script started us in the background, SIGINT is ignored, and so it would be in our children.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with self.log.open("ab") as output:
                self._began_at = output.tell()
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**env, _MARK: mark, "PYTHONUNBUFFERED": "1"},
                    cwd=cwd,
                    start_new_session=True,
                )
        finally:
            signal.signal(signal.SIGINT, before)
        # The environment of a program that is just being loaded cannot be read for a moment.
        while (process := processes.look(child.pid)) and not processes.carries(child.pid, mark):
            time.sleep(0.01)
        if process is None:
            raise self._failed(f"ended at once with code {child.wait()}")
        record = Record(child.pid, process.born, mark, address, tuple(command))
        write_whole(self._record, json.dumps(asdict(record), indent=1))

    def wait(self, answers: Callable[[], bool]) -> None:
        """Return once it answers.

        Raises:
            EnvironmentCheckError: it ended, or did not answer in time (then it is stopped); with its last log lines.
        """
        end_at = time.monotonic() + START_DEADLINE_S
        while not answers():
            if self.running() is None:
                self.stop(0.0)
                raise self._failed("ended before it answered")
            if time.monotonic() > end_at:
                self.stop()
                raise self._failed(f"did not answer within {START_DEADLINE_S:.0f} s and was ended")
            time.sleep(0.2)

    def stop(self, grace_s: float = 10.0) -> bool:
        """End it with its children, SIGTERM first; False where it was not running. Forgets the record.

        Processes that left its session live on: Ray, and with it the training.
        """
        record = self.record()
        if record is None:
            return False
        found = processes.session(record.pid, record.mark)
        left = processes.end(found, grace_s)
        if left:
            raise EnvironmentCheckError(
                f"{self.title}: process {left[0].pid} could not be ended (another user's?); end it and try again"
            )
        self._record.unlink(missing_ok=True)
        return bool(found)

    def _failed(self, what: str) -> EnvironmentCheckError:
        with self.log.open("rb") as file:
            file.seek(self._began_at)
            lines = file.read().decode(errors="replace").splitlines()
        last_lines = "\n".join(f"  {line}" for line in lines[-12:]) or "  (nothing)"
        return EnvironmentCheckError(f"the {self.title} {what}; see {self.log}. Its last log lines:\n{last_lines}")
