"""Whole DAPO steps against TRL: generation, rewards, updates and weight sync, as trained responses per CPU second.

    python -m benchmarks.step_time [--rounds 3] [--engine light|vllm|vllm-bf16|all] [--json FILE]

Three pairs, each on the same small Qwen3-VL, the same 16 prompts with an image x 8 responses, every response 48 tokens
long, four AdamW updates a step, float32, one thread, and a reward that is right half of the time and costs nothing:

    light: our engine on transformers      against TRL's GRPOTrainer with `generate()`
    vllm:  our engine on vLLM              against TRL's GRPOTrainer with vLLM in its process
    vllm-bf16: the same, but we generate in bfloat16 too, as TRL's vLLM does by its own choice

TRL lives in a virtual environment of its own (made at the first call), with torch, transformers and vLLM of this one.
Each contestant is a process; a pair takes turns, step by step, and CPU seconds are counted from outside over the
process and its children. The first step is not counted. Ours is the product's own controller and worker without Ray:
it also grades in another process, writes its journal, and compares fingerprints after each sync. Both know that they
did the same: prompt tokens, response tokens and updates of every step are compared.

Dynamic sampling is off, since TRL has none: what a step of ours keeps is what TRL's keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from benchmarks.train_step import GROUP, PROMPTS, UPDATES, make_model, make_work
from benchmarks.turns import Turns, trl_python
from dapo.data.processor import PromptProcessor

MAX_TOKENS = 48
PAIRS = {
    "light": ("transformers", "auto", "generate"),
    "vllm": ("vllm", "auto", "vllm"),
    "vllm-bf16": ("vllm", "bfloat16", "vllm"),
}
"""Our engine and its dtype, what TRL generates with."""
# vLLM on CPU takes whole GiB for its cache, and may bind threads to cores that others use.
TRL_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def compare(engine: str, folder: Path, work: Path, rounds: int) -> dict[str, Any]:
    """One pair: medians of both, and the ratio of each round.

    Raises:
        SystemExit: a contestant died, or they did not do the same work.
    """
    ours_engine, dtype, trl_backend = PAIRS[engine]
    ours = Turns("benchmarks.step_time_ours", (folder, work, ours_engine, dtype))
    theirs = None
    try:
        theirs = Turns(
            "benchmarks.step_time_trl", (folder, work, trl_backend, rounds + 1), python=trl_python(), env=TRL_ENV
        )
        pairs = [(ours.step(), theirs.step()) for _ in range(rounds + 1)]
    finally:
        ours.close()
        if theirs is not None:
            theirs.close()
    for mine, other in pairs:
        for what in ("responses", "prompt_tokens", "response_tokens", "updates"):
            if mine[what] != other[what]:
                raise SystemExit(f"not the same work: {what} is {mine[what]} in ours and {other[what]} in TRL's step")
    counted = pairs[1:]
    result: dict[str, Any] = {"engine": engine, "responses": counted[0][0]["responses"]}
    for name, side in (("ours", 0), ("trl", 1)):
        cpu = statistics.median(pair[side]["cpu_s"] for pair in counted)
        wall = statistics.median(pair[side]["wall_s"] for pair in counted)
        result[name] = {"cpu_s": cpu, "wall_s": wall, "responses_per_cpu_s": result["responses"] / cpu}
    result["ratios"] = sorted(other["cpu_s"] / mine["cpu_s"] for mine, other in counted)
    return result


def run(engines: list[str], rounds: int) -> list[dict[str, Any]]:
    """Print and return the result of each pair."""
    print(f"\nwhole steps: {PROMPTS} prompts with image x {GROUP} responses of {MAX_TOKENS} tokens, {UPDATES} updates")
    print(f"{'':10}{'CPU s per step':>24}{'responses / CPU s':>24}{'TRL / ours':>28}")
    print(f"{'':10}{'TRL':>12}{'ours':>12}{'TRL':>12}{'ours':>12}", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as place:
        folder = make_model(Path(place))
        work = Path(place) / "work.json"
        work.write_text(json.dumps(make_work(PromptProcessor(folder))[1]))
        for engine in engines:
            result = compare(engine, folder, work, rounds)
            ours, trl, ratios = result["ours"], result["trl"], result["ratios"]
            print(
                f"{engine:10}{trl['cpu_s']:12.2f}{ours['cpu_s']:12.2f}{trl['responses_per_cpu_s']:12.1f}"
                f"{ours['responses_per_cpu_s']:12.1f}{statistics.median(ratios):12.1f} "
                f"({ratios[0]:.1f} to {ratios[-1]:.1f})",
                flush=True,
            )
            results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each, after one that is not counted")
    parser.add_argument("--engine", choices=[*PAIRS, "all"], default="all")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    args = parser.parse_args()
    results = run(list(PAIRS) if args.engine == "all" else [args.engine], args.rounds)
    if args.json:
        command = " ".join(["python -m benchmarks.step_time", *sys.argv[1:]])
        args.json.write_text(json.dumps({"command": command, "pairs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
