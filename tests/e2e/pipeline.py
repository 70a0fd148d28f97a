"""Runs the real command in a process of its own: real Prefect server, Ray, FSDP2 workers, model and MLflow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.observe.journal import Event, read
from dapo.observe.run_folder import RunFolder

REPOSITORY = Path(__file__).parents[2]

# The demo in small: fewer figures, steps and supervised steps, so that minutes become seconds.
SMALL = (
    "data.source.train=96",
    "data.source.validation=8",
    "data.source.test=24",
    "model.source.warmup_steps=40",
    "batch.prompts_per_step=8",
    "batch.prompts_per_update=4",
    "batch.group_size=4",
    "algorithm.sampling.enabled=false",
    "train.steps=2",
    "train.test_freq=1",
    "train.save_freq=1",
)


@dataclass
class Pipeline:
    """`dapo run` with a home, cache and run folder of its own."""

    home: Path
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    output: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        places = (f"run_root={self.home}/runs", f"data.cache_dir={self.home}/cache")
        return [*SMALL, *places, *self.overrides]

    @property
    def config(self) -> RunConfig:
        return io.load(REPOSITORY / "configs/geo3k_tiny.yaml", self.arguments)

    @property
    def folder(self) -> RunFolder:
        return RunFolder.of(self.config)

    @property
    def log(self) -> Path:
        return self.home / "output.log"

    def start(self) -> Pipeline:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "RAY_"))}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dapo.cli", "run", "configs/geo3k_tiny.yaml", *self.arguments],
                cwd=REPOSITORY,
                env=env | {"HOME": str(self.home)} | self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        return self

    def finish(self, timeout_s: float = 280) -> str:
        """Wait for the end; everything it printed. Fails with that text where it failed."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            raise AssertionError(f"not done after {timeout_s} s:\n{self.log.read_text()}") from None
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    def run(self, timeout_s: float = 280) -> str:
        return self.start().finish(timeout_s)

    def events(self, kind: str) -> list[Event]:
        return [e for e in read(self.folder.journal) if e.kind == kind]

    def wait_for(self, what: Callable[[], object], timeout_s: float = 200) -> None:
        assert self.process is not None
        end_at = time.monotonic() + timeout_s
        while not what():
            assert self.process.poll() is None, f"ended too early:\n{self.log.read_text()}"
            assert time.monotonic() < end_at, f"waited {timeout_s} s in vain:\n{self.log.read_text()}"
            time.sleep(0.2)


def processes_with(text: str) -> dict[int, str]:
    """Living processes whose command line contains `text`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in command:
                found[int(entry.name)] = command.strip()
    return found
