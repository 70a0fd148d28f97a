"""Children that end when their parent does, even when it was killed: `python -m dapo.runtime.leash MODULE ARGUMENTS...`

The parent keeps the child's standard input open; when it closes, the child sends itself SIGTERM.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


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
