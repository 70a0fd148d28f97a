"""What one-step-off-policy generation (`rollout.ahead`) saves, simulated and measured.

    python -m benchmarks.overlap [--steps 12] [--json FILE]

Simulated: a step in turn takes generation + training + sync; overlapped it takes the longer of training this step and
generating the next, + sync. Generation times are log-normal, because the longest response decides; the table goes over
the ratio of their mean to the training time.

Measured: the demo's run in two processes, one that trains and one that generates, each on one thread (`rollout.devices
=1`), for `--steps` steps with `rollout.ahead` off and on, one after the other. Shown are medians over the steps behind
the first two, from the runs' own journals: seconds of a step, of generation and of training, and how long the trainer
waited for the engine. With two free cores `ahead` approaches max(generate, train); a busy machine shows less.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dapo.config import io
from dapo.observe.journal import read
from dapo.observe.run_folder import RunFolder

SPREAD, SYNC = 0.25, 0.05
ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/geo3k_tiny.yaml"


def simulate(ratio: float, steps: int = 5000) -> tuple[float, float]:
    """Seconds per step in turn and overlapped; training takes 1, generation `ratio` on average, a sync 0.05."""
    rng = random.Random(0)
    times = [ratio * math.exp(SPREAD * rng.gauss(0, 1) - SPREAD**2 / 2) for _ in range(steps + 1)]
    in_turn = statistics.fmean(generate + 1 + SYNC for generate in times[:-1])
    overlapped = statistics.fmean(max(generate, 1) + SYNC for generate in times[1:])
    return in_turn, overlapped


def measure(ahead: bool, steps: int, place: Path) -> dict[str, float]:
    """Medians of a real run's times, seconds."""
    overrides = [
        f"name=overlap-{'on' if ahead else 'off'}",
        f"run_root={place}/runs",
        f"data.cache_dir={place}/cache",
        "model.parallel.world_size=1",
        "rollout.devices=1",
        f"rollout.ahead={str(ahead).lower()}",
        f"train.steps={steps}",
        "train.test_freq=0",
        "train.save_freq=0",
        "validation.before_training=false",
    ]
    subprocess.run([sys.executable, "-m", "dapo.cli", "run", str(CONFIG), *overrides], cwd=ROOT, check=True)
    folder = RunFolder.of(io.load(CONFIG, overrides))
    metrics = [event.data["metrics"] for event in read(folder.journal) if event.kind == "step"][2:]

    def median(*names: str) -> float:
        return statistics.median(sum(m.get(f"time/{name}", 0.0) for name in names) for m in metrics)

    return {
        "step": median("step"),
        "generate": median("generate", "reward"),
        "train": median("logprobs", "update"),
        "wait": median("wait_for_engine"),
        "sync": median("sync"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps of each measured run; 0: only the simulation")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, float]] = []
    print(f"Simulated\n{'generate / train':>17} {'in turn':>9} {'ahead':>7} {'saved':>7}")
    for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
        in_turn, overlapped = simulate(ratio)
        rows.append({"ratio": ratio, "in_turn": in_turn, "ahead": overlapped})
        print(f"{ratio:17.2f} {in_turn:9.2f} {overlapped:7.2f} {1 - overlapped / in_turn:7.0%}")
    if arguments.steps:
        with tempfile.TemporaryDirectory(prefix="overlap-") as place:
            found = {ahead: measure(ahead, arguments.steps, Path(place)) for ahead in (False, True)}
        print(f"\nMeasured, seconds\n{'rollout.ahead':>17} " + " ".join(f"{name:>9}" for name in found[True]))
        for ahead, times in found.items():
            rows.append({"rollout.ahead": float(ahead), **times})
            print(f"{ahead!s:>17} " + " ".join(f"{value:9.2f}" for value in times.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
