"""Does it learn, and equally well with either engine? The whole demo, for several seeds: accuracy, time, memory.

    python -m benchmarks.learning                          # the transformers engine; each seed from nothing
    python -m benchmarks.learning --engine both [--json FILE]
    python -m benchmarks.learning --seeds 0 1 -- train.steps=20

Everything the demo does is measured: Prefect, Ray, data, warm-up, training, report. Memory is the peak of the
proportional set size (shared pages counted once) summed over all processes the demo started; CPU seconds are theirs,
too. With `--engine both` the second engine of a seed finds data and warmed-up weights of the first in the cache, so
its "everything" is without that, and both start from the same weights.

The engines draw different random numbers, so their runs differ by chance as two seeds do; what of the difference at
the end is more than chance of the held-out answers says the interval beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from dapo.eval import results
from dapo.eval.estimate import paired_difference
from dapo.observe.journal import read
from dapo.observe.run_folder import RunFolder

MARK = "DAPO_BENCHMARK"
ENGINES = ("transformers", "vllm")


class Usage(threading.Thread):
    """Memory and CPU seconds of every process that inherited the mark, daemons included."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark, self.peak, self.done = mark, 0, threading.Event()
        self._cpu: dict[int, float] = {}
        self._strange: set[int] = set()

    @property
    def cpu_s(self) -> float:
        """As last seen: what a process used in its last second is missing."""
        return sum(self._cpu.values())

    def run(self) -> None:
        while not self.done.wait(1.0):
            self.peak = max(self.peak, sum(map(self._size, psutil.pids())))

    def _size(self, pid: int) -> int:
        if pid in self._strange:
            return 0
        try:
            process = psutil.Process(pid)
            if pid not in self._cpu and process.environ().get(MARK) != self.mark:
                # A child has its parent's environment until it runs its own program: the young are asked again.
                if time.time() - process.create_time() > 5:
                    self._strange.add(pid)
                return 0
            times = process.cpu_times()
            self._cpu[pid] = times.user + times.system
            return int(process.memory_full_info().pss)
        except psutil.Error:
            return 0


def measure(config: str, seed: int, engine: str, cache: Path, overrides: list[str]) -> dict[str, Any]:
    """One demo; raises CalledProcessError where it fails."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="dapo-learning-") as folder:
        own = [f"seed={seed}", f"model.source.seed={seed}", f"rollout.engine={engine}"]
        own += [f"run_root={folder}/runs", f"data.cache_dir={cache}"]
        usage = Usage(mark)
        usage.start()
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "dapo.cli", "run", config, *own, *overrides],
            env=os.environ | {MARK: mark},
            stdout=sys.stderr,
            check=True,
        )
        seconds = time.perf_counter() - started
        usage.done.set()
        [journal] = Path(folder, "runs").glob("*/journal.jsonl")
        run = RunFolder(journal.parent)
        events = list(read(run.journal))
        last = run.validation_results(events[-1].step)
        verdicts = results.accuracies(results.from_lines(last.read_text(), str(last)))
    curve = [(e.step, e.data["metrics"]["val/accuracy"]) for e in events if e.kind == "validation"]
    steps = [e.data["metrics"] for e in events if e.kind == "step"]
    first = next(e.time for e in events if e.kind == "started")
    return {
        "seed": seed,
        "engine": engine,
        "before": curve[0][1],
        "after": curve[-1][1],
        "curve": curve,
        "steps": len(steps),
        "step_s": sum(m["time/step"] for m in steps) / len(steps),
        "training_s": events[-1].time - first,
        "total_s": seconds,
        "cpu_s": usage.cpu_s,
        "memory_gib": usage.peak / 2**30,
        "gap": max(m["engine/gap_mean"] for m in steps),
        "right": verdicts,
    }


def report(rows: list[dict[str, Any]]) -> None:
    print(
        "| seed | engine | accuracy before | after | steps | s per step | training s | everything s | CPU s "
        "| peak memory GiB | mean gap, worst step |"
    )
    print("|" + "---|" * 11)
    for r in rows:
        print(
            f"| {r['seed']} | {r['engine']} | {r['before']:.3f} | {r['after']:.3f} | {r['steps']} | {r['step_s']:.2f} "
            f"| {r['training_s']:.0f} | {r['total_s']:.0f} | {r['cpu_s']:.0f} | {r['memory_gib']:.2f} "
            f"| {r['gap']:.1e} |"
        )
    pairs = [(a, b) for a in rows for b in rows if a["seed"] == b["seed"] and (a["engine"], b["engine"]) == ENGINES]
    if not pairs:
        return
    print("\n| seed | vllm - transformers at the end | 95 % interval, paired by prompt |")
    print("|---|---|---|")
    for light, vllm in pairs:
        difference = paired_difference(vllm["right"], light["right"])
        print(f"| {light['seed']} | {difference.value:+.3f} | {difference.low:+.3f} to {difference.high:+.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/geo3k_tiny.yaml")
    parser.add_argument("--engine", choices=[*ENGINES, "both"], default="transformers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    parser.add_argument("overrides", nargs="*", help="key=value, as for `dapo run`")
    args = parser.parse_args()
    command = " ".join(["python -m benchmarks.learning", *sys.argv[1:]])
    engines = ENGINES if args.engine == "both" else (args.engine,)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory(prefix="dapo-learning-") as cache:
            for engine in engines:
                rows.append(measure(args.config, seed, engine, Path(cache), args.overrides))
                print(f"{args.config} {' '.join(args.overrides)} on {os.cpu_count()} cores")
                report(rows)
                if args.json:  # after every run, since each takes minutes
                    args.json.write_text(json.dumps({"command": command, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
