"""Programs that take turns, one step at a time, each in a process of its own: how trainers are compared here.

The parent writes a line for each step and reads one back; what a step took is measured from outside, over the process
and its children, in the same way for all. A busy machine so disturbs all of them alike, and CPU seconds little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
TRL = ("trl==1.16.0", "accelerate==1.15.0")
ANSWER = "STEP "


class Turns:
    """A benchmark module running beside this process.

    Args:
        module: has `wait_for_turn` and `answer` called once per step.
        python: the interpreter, and with it the packages.
        env: variables beside this process's own.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[object],
        *,
        python: str = sys.executable,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.module = module
        common = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [python, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | common | dict(env),
            cwd=ROOT,
        )

    def step(self) -> dict[str, Any]:
        """What the process says about its step, and `cpu_s` and `wall_s` of it and its children."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        cpu, wall = self._cpu_seconds(), time.perf_counter()
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                times = {"cpu_s": self._cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall}
                return times | json.loads(line.removeprefix(ANSWER))
        raise SystemExit(f"{self.module} ended with code {self.process.wait()}; see above")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _cpu_seconds(self) -> float:
        total = 0.0
        process = psutil.Process(self.process.pid)
        for one in [process, *process.children(recursive=True)]:
            try:
                times = one.cpu_times()
            except psutil.NoSuchProcess:
                continue
            # Of children that have ended only their parent knows.
            total += times.user + times.system + times.children_user + times.children_system
        return total


def wait_for_turn() -> None:
    """In the other process: returns when its next step may begin."""
    sys.stdin.readline()


def answer(result: dict[str, Any]) -> None:
    """In the other process: its step is done."""
    print(ANSWER + json.dumps(result), flush=True)


def trl_python() -> str:
    """TRL's environment, made at the first call: TRL alone; torch, transformers and vLLM are those of this one."""
    folder = ROOT / "cache" / "bench-trl"
    python = folder / "bin" / "python"
    if not (folder / ".done").exists():
        print(f"making TRL's environment in {folder} ...", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *TRL], check=True)
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        (folder / ".done").touch()
    return str(python)
