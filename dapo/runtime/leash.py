"""Children that end when their parent does, even when it was killed: `python -m dapo.runtime.leash MODULE ARGUMENTS...`

The parent keeps the child's standard input open; when it closes, the child sends itself SIGTERM.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

_GRACE_S = 5.0
_LAST_BYTES = 2000


class LeashedProcess(subprocess.Popen[bytes]):
    """A Python module in a process and a session of its own: a Ctrl-C of the terminal reaches only the parent.

    Args:
        command: what follows `python -m`: `dapo.runtime.leash` and a module, or a module that calls `end_with_parent`.
        log: gets its errors, and its output unless that is `piped`; None: a file without a name.
    """

    def __init__(self, *command: str, env: Mapping[str, str], log: Path | None = None, piped: bool = False) -> None:
        self._log = log.open("ab+") if log else tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        super().__init__(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if piped else self._log,
            stderr=self._log,
            env=env,
            start_new_session=True,
        )

    def stop(self) -> None:
        """Ask it to end; after 5 s kill it, with whatever it started in its session. Safe to repeat."""
        self.terminate()
        try:
            self.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()

    def last_lines(self) -> str:
        """The end of its log."""
        begin = max(0, os.fstat(self._log.fileno()).st_size - _LAST_BYTES)
        return os.pread(self._log.fileno(), _LAST_BYTES, begin).decode(errors="replace").strip()


def end_with_parent() -> None:
    """From now on this process ends when its standard input does."""
    threading.Thread(target=_wait_for_end, daemon=True, name="leash").start()


def _wait_for_end() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
