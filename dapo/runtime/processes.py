"""Finding and ending every process that belongs to something we started, and nothing else. Reads /proc (Linux)."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Process:
    """A process and the moment it was born, so that a reused process number is not mistaken for it."""

    pid: int
    parent: int
    session: int
    born: int
    """Clock ticks since boot."""

    def alive(self) -> bool:
        now = look(self.pid)
        return now is not None and now.born == self.born


def look(pid: int) -> Process | None:
    """The process with this number; None where there is none, or only its zombie is left."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The name in brackets may hold spaces and brackets itself; the fields after it are plain.
    state, parent, _, session, *rest = text.rpartition(")")[2].split()
    return None if state == "Z" else Process(pid, int(parent), int(session), int(rest[15]))


def family(mark: str) -> list[Process]:
    """Processes whose environment or command line holds `mark`, all others in their sessions, and all descendants.

    A process that renames itself (Ray's workers do) hides its environment; it is found by its session or parent.
    """
    everybody = [p for entry in _PROC.iterdir() if entry.name.isdigit() and (p := look(int(entry.name)))]
    ours = {p.pid for p in everybody if p.pid != os.getpid() and carries(p.pid, mark)}
    own_session = os.getsid(0)
    sessions = {p.session for p in everybody if p.pid in ours} - {own_session}
    ours |= {p.pid for p in everybody if p.session in sessions}
    size = -1
    while len(ours) != size:
        size = len(ours)
        ours |= {p.pid for p in everybody if p.parent in ours}
    return [p for p in everybody if p.pid in ours and p.pid != os.getpid()]


def carrying(mark: str) -> list[Process]:
    """Processes with `mark` in their environment or command line; their children only where they have it too."""
    everybody = [p for entry in _PROC.iterdir() if entry.name.isdigit() and (p := look(int(entry.name)))]
    return [p for p in everybody if carries(p.pid, mark)]


def session(leader: int, mark: str) -> list[Process]:
    """Processes of the session that `leader` began, each with `mark` in its environment or command line."""
    return [p for p in carrying(mark) if p.session == leader]


def carries(pid: int, mark: str) -> bool:
    """Whether a process has `mark` in its environment or command line; False where we may not look."""
    for name in ("environ", "cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if mark.encode() in (_PROC / str(pid) / name).read_bytes():
                return True
    return False


def command(pid: int) -> list[str]:
    """The arguments a process was started with, the program first; empty where it is gone or we may not look."""
    try:
        return os.fsdecode((_PROC / str(pid) / "cmdline").read_bytes()).rstrip("\0").split("\0")
    except OSError:
        return []


def end(processes: list[Process], grace_s: float = 5.0) -> list[Process]:
    """SIGTERM, wait, SIGKILL; returns those that are still alive."""
    _signal(processes, signal.SIGTERM)
    if not _gone(processes, grace_s):
        _signal(processes, signal.SIGKILL)
        _gone(processes, 5.0)
    return [p for p in processes if p.alive()]


def end_family(mark: str, grace_s: float = 5.0) -> list[Process]:
    """End a whole family; looks again for children born meanwhile. Returns what could not be ended."""
    for _ in range(3):
        members = family(mark)
        if not members:
            return []
        end(members, grace_s)
    return family(mark)


def _signal(processes: list[Process], number: signal.Signals) -> None:
    for process in processes:
        if process.alive():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, number)


def _gone(processes: list[Process], within_s: float) -> bool:
    end_at = time.monotonic() + within_s
    while any(p.alive() for p in processes):
        if time.monotonic() > end_at:
            return False
        time.sleep(0.05)
    return True
