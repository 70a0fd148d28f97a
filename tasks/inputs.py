"""Data and weights are made in processes of their own: they load torch, and the flow's process stays light.

Parent and child exchange JSON lines over standard input and output. The child ends when its standard input closes, so
it does not outlive a parent that was killed. The same request starts only one child: a caller may call `begin` early
and let the task wait for it later.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from dapo import errors
from dapo.config.data import DataConfig
from dapo.config.model import ModelSource
from dapo.data.storage import Progress
from dapo.errors import DapoError
from dapo.runtime.leash import LeashedProcess, end_with_parent
from dapo.runtime.telemetry import TELEMETRY_OFF

Kind = Literal["data", "weights"]

_REPORT_EVERY_S = 0.5


class InputProcess:
    """A child process that prepares data or weights."""

    def __init__(self, kind: Kind, settings: str, cache: Path) -> None:
        self.kind = kind
        self._answer: dict[str, Any] = {}
        self._latest: tuple[int, int, str] | None = None
        self._child = LeashedProcess("tasks.inputs", kind, str(cache), env=os.environ | TELEMETRY_OFF, piped=True)
        assert self._child.stdin is not None
        self._child.stdin.write(settings.encode() + b"\n")
        self._child.stdin.flush()
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"reads-{kind}")
        self._reader.start()

    def wait(self, progress: Progress) -> Path:
        """The folder that was made; raises the child's DapoError again."""
        shown = None
        while self._reader.is_alive():
            if self._latest is not None and self._latest != shown:
                shown = self._latest
                progress(*shown)
            self._reader.join(0.2)
        code = self._child.wait()
        if "path" in self._answer:
            return Path(self._answer["path"])
        if "error" in self._answer:
            raise errors.named(self._answer["error"], self._answer["message"])
        raise RuntimeError(
            f"making {self.kind} ended with code {code} and no result. Its last log lines:\n{self._child.last_lines()}"
        )

    def abort(self) -> None:
        """End the child; the next start removes its unfinished work."""
        self._child.stop()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # a library printed something
            if "done" in message:
                self._latest = (message["done"], message["total"], message["detail"])
            else:
                self._answer = message


_made: dict[tuple[Kind, str], InputProcess] = {}
_lock = threading.Lock()


def begin(kind: Kind, settings: DataConfig | ModelSource, cache: Path) -> InputProcess:
    """Start making it, or return the child that does so already."""
    text = settings.model_dump_json()
    with _lock:
        if (kind, text) not in _made:
            _made[kind, text] = InputProcess(kind, text, cache)
        return _made[kind, text]


def abort_all() -> None:
    """End all children and forget them."""
    with _lock:
        for process in _made.values():
            process.abort()
        _made.clear()


def make(kind: Kind, settings: str, cache: Path, progress: Progress) -> Path:
    """The child's work: call the library."""
    if kind == "data":
        from dapo.data.prepare import prepare

        return prepare(DataConfig.model_validate_json(settings), cache, progress)
    source = TypeAdapter(ModelSource).validate_json(settings)
    if source.kind == "tiny":
        from dapo.data.tiny import make_tiny, tiny_key

        return make_tiny(source, cache / "weights" / f"tiny-{tiny_key(source)}", progress)
    from dapo.data.fetch import fetch_weights

    return fetch_weights(source, cache, progress)


def main(argv: list[str]) -> int:
    """Child: settings on standard input, progress and result on standard output."""
    kind, cache = argv
    settings = sys.stdin.readline()
    end_with_parent()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the errors
    last = 0.0

    def say(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    def progress(done: int, total: int, detail: str) -> None:
        nonlocal last
        if time.monotonic() - last > _REPORT_EVERY_S or done == total:
            last = time.monotonic()
            say(done=done, total=total, detail=detail)

    try:
        say(path=str(make("data" if kind == "data" else "weights", settings, Path(cache), progress).resolve()))
    except DapoError as error:
        say(error=type(error).__name__, message=str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
