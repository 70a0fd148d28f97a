"""Rewards of all sorts for the tests of the pool; the response says what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

from dapo.types import Scored


def obedient(response: str, answer: str) -> object:
    """Does what the response asks for."""
    match response.split(" ", 1):
        case ["right" | "wrong" as verdict]:
            return verdict == "right"
        case ["hang"]:
            while True:
                pass
        case ["hang-in-c"]:
            return (3**10**8).bit_length() == 0  # one operation that holds the interpreter for a minute
        case ["raise", text]:
            raise ValueError(text)
        case ["exit", code]:
            sys.exit(int(code))
        case ["vanish", code]:
            os._exit(int(code))
        case ["signal", name]:
            os.kill(os.getpid(), getattr(signal, name))
        case ["sleep", seconds]:
            time.sleep(float(seconds))
            return True
        case ["print", text]:
            sys.stdout.write(text)
            sys.stdout.flush()
            os.write(1, text.encode())
            return True
        case ["child", path]:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(path).write_text(str(child.pid))
            time.sleep(600)
        case ["pid"]:
            return Scored(True, extracted=str(os.getpid()))
        case ["echo", text]:
            return Scored(text == answer, 0.5, 0.0, text)
        case ["return", name]:
            return RESULTS[name]
    raise AssertionError(response)


RESULTS: dict[str, object] = {
    "one": 1,
    "zero": 0.0,
    "half": 0.5,
    "two": 2,
    "nan": float("nan"),
    "none": None,
    "text": "1.0",
    "dict": {"score": 1.0},
    "number as accuracy": Scored(1.0),  # type: ignore[arg-type]
    "format above one": Scored(True, format=1.5),
    "format not a number": Scored(True, format=float("nan")),
    "positive penalty": Scored(True, overlong=0.5),
}


class Counting:
    """Remembers how often it was called: its verdict depends on the order."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, response: str, answer: str) -> bool:
        self.calls += 1
        return self.calls % 2 == 1


class Fussy:
    def __init__(self, needed: int) -> None:
        self.needed = needed


def lenient(response: str, answer: str) -> bool:
    """Right whatever is said."""
    return True


def sluggish(response: str, answer: str) -> bool:
    """Wrong, and for one of the long responses too slow for half of a deadline of 0.2 s."""
    time.sleep(0.12 if response.startswith("aaaa") else 0.0)
    return False


def greedy(response: str, answer: str) -> bool:
    """Now and then takes 120 MB and gives them back at once."""
    _calls.append(0)
    return len(_calls) % 500 == 499 and bytearray(120 << 20)[0] == 1


_calls: list[int] = []


@lru_cache
def slow_once(response: str, answer: str) -> bool:
    """Too slow for half of a deadline of 0.2 s the first time, and quick ever after."""
    time.sleep(0.12 if response.startswith("aaaa") else 0.0)
    return False


NOT_CALLABLE = 48
