"""What judging costs in memory, measured in a process that has done nothing else.

    python -m tests.rewards.growth SECONDS MODULE:NAME

Prints the growth of the largest resident size (KiB) while a grader judges generated responses, caches and all.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from random import Random

from dapo.rewards.load import load
from tests.rewards import inputs

WARM_UP = 200


def peak_kib() -> int:
    """Of this process alone: `ru_maxrss` would begin with the size of the parent."""
    found = re.search(r"VmHWM:\s*([0-9]+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def growth_kib(grader: str, seconds: float) -> int:
    reward, random = load(grader), Random(0)
    for _ in range(WARM_UP):
        reward(inputs.response(random), inputs.answer(random))
    before, end = peak_kib(), time.monotonic() + seconds
    while time.monotonic() < end:
        reward(inputs.response(random), inputs.answer(random))
    return peak_kib() - before


if __name__ == "__main__":
    sys.stdout.write(str(growth_kib(sys.argv[2], float(sys.argv[1]))))
