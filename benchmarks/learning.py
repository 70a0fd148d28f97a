"""Does it learn? The whole demo from nothing, for several seeds: accuracy before and after, time, memory.

    python -m benchmarks.learning                    # seeds 0, 1 and 2, each with a cache and run folder of its own
    python -m benchmarks.learning --seeds 0 1 -- rollout.engine=vllm

Everything the demo does is measured: Prefect, Ray, data, warm-up, training, report. Memory is the peak of the
proportional set size (shared pages counted once) summed over all processes the demo started.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import psutil

from dapo.observe.journal import read

MARK = "DAPO_BENCHMARK"


class PeakMemory(threading.Thread):
    """Follows every process that inherited the mark, daemons included."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark, self.peak, self.done = mark, 0, threading.Event()
        self._ours: set[int] = set()
        self._strange: set[int] = set()

    def run(self) -> None:
        while not self.done.wait(1.0):
            self.peak = max(self.peak, sum(map(self._size, psutil.pids())))

    def _size(self, pid: int) -> int:
        if pid in self._strange:
            return 0
        try:
            process = psutil.Process(pid)
            if pid not in self._ours:
                if process.environ().get(MARK) != self.mark:
                    # A child has its parent's environment until it runs its own program: the young are asked again.
                    if time.time() - process.create_time() > 5:
                        self._strange.add(pid)
                    return 0
                self._ours.add(pid)
            return int(process.memory_full_info().pss)
        except psutil.Error:
            return 0


def measure(config: str, seed: int, overrides: list[str]) -> dict[str, float]:
    """One demo from nothing; raises CalledProcessError where it fails."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="dapo-learning-") as folder:
        own = [f"seed={seed}", f"model.source.seed={seed}", f"run_root={folder}/runs", f"data.cache_dir={folder}/cache"]
        memory = PeakMemory(mark)
        memory.start()
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "dapo.cli", "run", config, *own, *overrides],
            env=os.environ | {MARK: mark},
            stdout=sys.stderr,
            check=True,
        )
        seconds = time.perf_counter() - started
        memory.done.set()
        [journal] = Path(folder, "runs").glob("*/journal.jsonl")
        events = list(read(journal))
    accuracy = [e.data["metrics"]["val/accuracy"] for e in events if e.kind == "validation"]
    steps = [e.data["metrics"]["time/step"] for e in events if e.kind == "step"]
    first = next(e.time for e in events if e.kind == "started")
    return {
        "seed": seed,
        "before": accuracy[0],
        "after": accuracy[-1],
        "steps": len(steps),
        "step_s": sum(steps) / len(steps),
        "training_s": events[-1].time - first,
        "total_s": seconds,
        "memory_gib": memory.peak / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/geo3k_tiny.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="key=value, as for `dapo run`")
    args = parser.parse_args()
    rows = [measure(args.config, seed, args.overrides) for seed in args.seeds]
    print(f"{args.config} {' '.join(args.overrides)} on {os.cpu_count()} cores")
    print("| seed | accuracy before | after | steps | s per step | training s | everything s | peak memory GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['seed']:.0f} | {r['before']:.3f} | {r['after']:.3f} | {r['steps']:.0f} | {r['step_s']:.2f} "
            f"| {r['training_s']:.0f} | {r['total_s']:.0f} | {r['memory_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
