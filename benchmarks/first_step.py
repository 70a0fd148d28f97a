"""From `prefect deployment run dapo/geo3k-tiny` to the first training step: where the seconds go.

python -m benchmarks.first_step            three runs: cold, warm, and warm with Ray running
python -m benchmarks.first_step --json     one object per run

Run it in the repository's folder after `dapo up`. Wall seconds are those of a clock and grow with whatever else the
machine does; CPU seconds are those of the flow, Ray and everything below them, from the worker down.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.observe.journal import read
from dapo.observe.run_folder import RunFolder
from dapo.runtime import cluster, processes
from flows.up import Stack

CONFIG = "configs/geo3k_tiny.yaml"
LIMIT_S = 900.0


class CpuClock:
    """CPU seconds of everything that carries a mark, sampled; of ended processes the last look counts."""

    def __init__(self, mark: str) -> None:
        self.mark, self.samples = mark, [(time.time(), 0.0)]
        self._used: dict[tuple[int, int], float] = {}
        self._before: dict[tuple[int, int], float] = {}
        self._end = threading.Event()
        self._look(self._before)
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def at(self, moment: float) -> float:
        return max((used for when, used in self.samples if when <= moment), default=0.0)

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._end.wait(0.5):
            self._look(self._used)
            used = sum(v - self._before.get(k, 0.0) for k, v in self._used.items())
            self.samples.append((time.time(), used))

    def _look(self, into: dict[tuple[int, int], float]) -> None:
        for process in processes.family(self.mark):
            try:
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            into[process.pid, process.born] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(case: str, root: Path, mark: str) -> dict[str, Any]:
    """One deployment run; its phases in seconds, from the command on."""
    overrides = {
        "name": f"first-step-{case}",
        "run_root": str(root / "runs"),
        "data.cache_dir": str(root / "cache"),
        "train.steps": 1,
    }
    run = RunFolder.of(io.load(CONFIG, overrides))
    clock = CpuClock(mark)
    began = time.time()
    command = [sys.executable, "-m", "prefect", "deployment", "run", "dapo/geo3k-tiny"]
    output = subprocess.run(
        [*command, "-p", f"overrides={json.dumps(overrides)}"], capture_output=True, text=True, check=True
    ).stdout
    flow_run_id = re.search(r"UUID: (\S+)", output)[1]  # type: ignore[index]
    first = _wait(lambda: next((e for e in read(run.journal) if e.kind == "step"), None), flow_run_id)
    marks = _marks(flow_run_id, run, began, first.time)
    used = [clock.at(moment) for _, moment in marks]
    clock.stop()
    _wait(lambda: _state(flow_run_id).is_final() or None, flow_run_id)
    phases = [
        {"phase": name, "wall_s": round(end - start, 1), "cpu_s": round(after - before, 1)}
        for (_, start), (name, end), before, after in zip(marks, marks[1:], used, used[1:], strict=False)
    ]
    return {
        "case": case,
        "phases": phases,
        "wall_s": round(first.time - began, 1),
        "cpu_s": round(used[-1], 1),
        "load": os.getloadavg()[0],
        "cpus": os.cpu_count(),
    }


def _marks(flow_run_id: str, run: RunFolder, began: float, first_step: float) -> list[tuple[str, float]]:
    """What had ended when, in order of time."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        states = {s.name: s.timestamp.timestamp() for s in reversed(client.read_flow_run_states(flow_run_id))}
        tasks = {t.name: t for t in client.read_task_runs(flow_run_filter=chosen)}
    ended = {name: task.end_time.timestamp() for name, task in tasks.items() if task.end_time}
    begun = {name: task.start_time.timestamp() for name, task in tasks.items() if task.start_time}

    def last(*stages: str) -> float:
        return max(moment for name, moment in ended.items() if name.startswith(stages))

    events = list(read(run.journal))
    phases = {e.data["phase"]: e.time for e in reversed(events) if e.kind == "progress"}
    marks = [
        ("", began),
        ("command, worker pick-up", states.get("Submitting", states["Pending"])),
        ("flow process", states["Running"]),
        ("check of the machine", last("validate_environment-machine")),
        ("Ray head", last("find_cluster")),
        ("data and weights", last("prepare_dataset", "fetch_weights")),
        ("check of the inputs", last("validate_environment-inputs")),
        ("training task", min(moment for name, moment in begun.items() if name.startswith("train-"))),
        ("job, imports", next(e.time for e in events if e.kind == "started")),
        ("workers, weights, prompts", min(phases["sync"], phases["validate"])),
        ("validation before training", next(e.time for e in events if e.kind == "validation")),
        ("first step", first_step),
    ]
    return sorted(marks, key=lambda mark: mark[1])


def _wait(found: Callable[[], Any], flow_run_id: str) -> Any:
    end_at = time.monotonic() + LIMIT_S
    while (result := found()) is None:
        state = _state(flow_run_id)
        if state.is_failed() or state.is_crashed() or time.monotonic() > end_at:
            raise SystemExit(f"flow run {flow_run_id}: {state}")
        time.sleep(0.5)
    return result


def _state(flow_run_id: str) -> Any:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id).state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object per run instead of a table")
    parser.add_argument("--root", type=Path, help="folder of an earlier measurement: warm at once")
    arguments = parser.parse_args()
    stack = Stack(Path.cwd(), print)
    record = stack.worker(stack.pools[0]).running()
    if record is None:
        raise SystemExit("no worker of `dapo up` runs here: say `dapo up` first")
    stack.talk_to_server()
    root = arguments.root or Path(tempfile.mkdtemp(prefix="first-step-"))
    cases = ["cold", "warm", "warm-with-ray"]
    if arguments.root and (root / "cache").is_dir():
        del cases[0]
    for case in cases:
        if case != "warm-with-ray":
            cluster.stop_local(RunConfig(run_root=str(root / "runs")))
        for old in (root / "runs").glob(f"first-step-{case}-*"):
            old.rename(old.with_name(f"old-{time.time_ns()}"))
        result = measure(case, root, record.mark)
        if arguments.json:
            print(json.dumps(result), flush=True)
            continue
        print(f"\n{case}: {result['wall_s']} s, {result['cpu_s']} CPU s (load {result['load']:.1f})")
        for phase in result["phases"]:
            print(f"  {phase['wall_s']:7.1f} s {phase['cpu_s']:7.1f} CPU s  {phase['phase']}", flush=True)
    cluster.stop_local(RunConfig(run_root=str(root / "runs")))
    print(f"kept: {root}", file=sys.stderr)


if __name__ == "__main__":
    main()
