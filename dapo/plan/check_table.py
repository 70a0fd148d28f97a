"""The result of one environment check, and a table of many."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dapo.errors import EnvironmentCheckError

Status = Literal["ok", "warn", "fail", "skip"]
_ORDER = {"fail": 0, "warn": 1, "ok": 2, "skip": 3}


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    status: Status
    """`skip`: not checked here; the reason says why."""
    reason: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty where nothing has to be done."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f". {self.remedy}" if self.remedy else "")


def ok(name: str, reason: str) -> Check:
    return Check(name, "ok", reason)


def warn(name: str, reason: str, remedy: str) -> Check:
    return Check(name, "warn", reason, remedy)


def fail(name: str, reason: str, remedy: str) -> Check:
    return Check(name, "fail", reason, remedy)


def skip(name: str, why: str) -> Check:
    return Check(name, "skip", f"not checked here: {why}")


def failed(checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.status == "fail"]


def verdict(checks: Sequence[Check]) -> str:
    """For example: `2 failed, 1 warning, 14 ok`."""
    count = {status: sum(c.status == status for c in checks) for status in _ORDER}
    parts = [
        f"{count['fail']} failed" if count["fail"] else "",
        f"{count['warn']} warning{'s' if count['warn'] > 1 else ''}" if count["warn"] else "",
        f"{count['ok']} ok",
        f"{count['skip']} not checked" if count["skip"] else "",
    ]
    return ", ".join(part for part in parts if part)


def refuse(name: str, checks: Sequence[Check]) -> None:
    """Raise EnvironmentCheckError with the whole table where a check failed."""
    if failed(checks):
        raise EnvironmentCheckError(f"{name} cannot run here ({verdict(checks)}):\n{table(checks)}")


def table(checks: Iterable[Check], width: int = 110) -> str:
    """Failures first, each with its remedy on a line of its own."""
    rows = sorted(checks, key=lambda c: _ORDER[c.status])
    column = max((len(c.name) for c in rows), default=0)
    indent = " " * (6 + column + 2)
    lines = []
    for check in rows:
        head = f"{check.status:<6}{check.name:<{column}}  "
        lines += textwrap.wrap(check.reason, width, initial_indent=head, subsequent_indent=indent)
        if check.remedy:
            lines += textwrap.wrap(f"-> {check.remedy}", width, initial_indent=indent, subsequent_indent=indent + "   ")
    return "\n".join(lines)
