"""Idle time of generation on long-tailed response lengths, with and without partial rollouts.

    python -m benchmarks.long_tail [--steps 60] [--real] [--json FILE]

Simulated: `DynamicSampling` and `Generation` as in training drive an engine of 256 places on a clock of its own. A
decoding step costs the same for all places (as on an accelerator whose weights are read once per step) plus a little
for each that writes; prefill costs per token. Lengths are log-normal (median 300 tokens, the longest cut at 2,048),
31 % of groups carry signal, 64 prompts a step, 8 responses each. `idle` is the share of places without work while the
engine ran; `older` the share of trained tokens that an older policy version wrote (surplus groups of the step before
included); `seconds` are per step.

Real (`--real`): the transformers engine on this machine, 48 prompts x 8, lengths geometric (mean 40, cut at 256): CPU
seconds per finished response, rounds of the same prompts to their end or in parts, paired in one process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from dapo.config import io
from dapo.config.run import RunConfig
from dapo.rollout.engine import Begun, prompts_needed
from dapo.runtime.dynamic_sampling import DynamicSampling
from dapo.runtime.generation import Generation
from dapo.types import Completion, Finished, FinishReason, Prompt, SamplingParams, Scored

PLACES = 256
STEP_S, WRITER_S, PREFILL_S = 0.02, 2e-5, 2e-5
MEDIAN, SPREAD, LONGEST = 300, 0.9, 2048
PROMPT_TOKENS = 300
KEEP_RATE = 0.31
SHARES = (1.0, 0.95, 0.9, 0.8, 0.6)


@dataclass
class Cost:
    """What a run paid."""

    finish_share: float
    seconds: float
    """Of generation, per step."""
    idle: float
    older: float
    rounds: float


class SimulatedEngine:
    """Continuous batching on a clock of its own: a request takes a place when one is free, oldest first."""

    def __init__(self, seed: int) -> None:
        self.seed, self.version = seed, 0
        self.seconds = self.place_seconds = self.busy = 0.0

    def length(self, prompt: Prompt, sample: int) -> int:
        rng = random.Random(f"{self.seed}/{prompt.id}/{sample}")
        return max(1, min(LONGEST, round(MEDIAN * math.exp(SPREAD * rng.gauss(0, 1)))))

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun = ()) -> Iterator[Finished]:
        queue: deque[tuple[int, int, int, Completion | None]] = deque()
        missing = [0] * len(prompts)
        for index, prompt in enumerate(prompts):
            for sample in range(params.n):
                before = begun[index][sample] if begun else None
                if before is None or not before.finished:
                    written = len(before.token_ids) if before else 0
                    queue.append((index, sample, self.length(prompt, sample) - written, before))
                    missing[index] += 1
        writing: list[tuple[int, int, int, int, Completion | None]] = []  # ends at, began at, prompt, sample, before
        now, open_prompts = 0, sum(map(bool, missing))
        allowed = len(prompts) - prompts_needed(len(prompts), params)
        while open_prompts > allowed:
            while queue and len(writing) < PLACES:
                index, sample, left, before = queue.popleft()
                self._pass(PREFILL_S * (PROMPT_TOKENS + (len(before.token_ids) if before else 0)), 1)
                writing.append((now + left, now, index, sample, before))
            ends = min(writing)[0]
            self._pass((ends - now) * (STEP_S + WRITER_S * len(writing)), len(writing))
            now = ends
            for done in [w for w in writing if w[0] == now]:
                writing.remove(done)
                missing[done[2]] -= 1
                open_prompts -= not missing[done[2]]
                yield self._finished(done, now, FinishReason.STOP)
        for one in writing:
            if now > one[1]:
                yield self._finished(one, now, FinishReason.UNFINISHED)

    def _pass(self, seconds: float, busy: int) -> None:
        self.seconds += seconds
        self.place_seconds += seconds * PLACES
        self.busy += seconds * busy

    def _finished(self, one: tuple[int, int, int, int, Completion | None], now: int, reason: FinishReason) -> Finished:
        _, began, index, sample, before = one
        count = now - began
        more = Completion((sample,) * count, (0.0,) * count, reason, self.version)
        return Finished(index, sample, before.continued(more) if before else more)


class Coin:
    """Judges groups so that `KEEP_RATE` of them have a right and a wrong answer."""

    def score(self, items: Sequence[tuple[str, str]]) -> list[Scored]:
        return [Scored(answer == "mixed" and int(sample) % 2 == 0) for sample, answer in items]


class FirstId:
    """A response's text is its first id."""

    stop_token_ids: tuple[int, ...] = ()
    banned_token_ids: tuple[int, ...] = ()

    def decode_many(self, responses: Sequence[Sequence[int]]) -> list[str]:
        return [str(ids[0]) for ids in responses]


def simulate(finish_share: float, steps: int, seed: int = 0) -> Cost:
    """Generation of `steps` steps of training."""
    config = _config(finish_share)
    rng = random.Random(seed)
    answers = ["mixed" if rng.random() < KEEP_RATE else "agree" for _ in range(steps * 64 * 6)]
    prompts = [Prompt(str(i), (0,), (), (), answer, "") for i, answer in enumerate(answers)]
    engine = SimulatedEngine(seed)
    generation = Generation(config, engine, Coin(), FirstId(), restart=lambda _: None, phase=lambda *_: nullcontext())
    sampling = DynamicSampling(config, prompts, generation)
    tokens = older = rounds = 0
    for step in range(steps):
        engine.version = step
        groups, report = sampling.collect(step)
        rounds += report.rounds
        segments = [s for g in groups for r in g.rollouts for s in r.completion.segments]
        tokens += sum(count for _, count in segments)
        older += sum(count for version, count in segments if version < step)
    return Cost(
        finish_share,
        seconds=engine.seconds / steps,
        idle=1 - engine.busy / engine.place_seconds,
        older=older / tokens,
        rounds=rounds / steps,
    )


def _config(finish_share: float) -> RunConfig:
    return io.validate(
        {
            "rollout": {"finish_share": finish_share},
            "algorithm": {"correction": {"kind": "truncate"}, "sampling": {"revisit": 1.0}},
            "batch": {"max_response_tokens": LONGEST, "tokens_per_pack": 4096},
        }
    )


def measure(finish_share: float, count: int = 48) -> tuple[float, int]:
    """CPU seconds per response of the transformers engine, and rounds."""
    from benchmarks.generation import make_prompts
    from dapo import torchvision_cpu
    from dapo.config.model import TinyModel
    from dapo.data.processor import PromptProcessor
    from dapo.data.tiny import make_tiny
    from dapo.rollout.transformers_engine import TransformersEngine

    torchvision_cpu.install()
    with tempfile.TemporaryDirectory() as place:
        folder = make_tiny(TinyModel(warmup_steps=0), Path(place) / "model", lambda *_: None)
        processor = PromptProcessor(folder)
        engine = TransformersEngine(folder, processor)
        # The model is random: its tokens are nearly uniform, and one id in 40 ends a response.
        stops = tuple(range(0, engine.vocab_size, 40))
        params = SamplingParams(8, 1.0, 1.0, -1, 256, stops, processor.banned_token_ids, finish_share=finish_share)
        prompts = make_prompts(processor, count)
        engine.generate(prompts[:8], replace(params, finish_share=1.0))
        started = time.process_time()
        begun: list[list[Completion | None]] = [[None] * 8 for _ in prompts]
        rounds = responses = 0
        fresh = iter(range(count))
        asked: list[int] = []
        while True:
            wanted = count // 4
            asked = [i for i in asked if not all(c and c.finished for c in begun[i])]
            new = [i for _, i in zip(range(wanted - len(asked)), fresh, strict=False)]
            asked += new
            if not asked:
                break
            last = not new
            round_params = replace(params, seed=rounds, finish_share=1.0 if last else finish_share)
            for done in engine.stream([prompts[i] for i in asked], round_params, [begun[i] for i in asked]):
                begun[asked[done.prompt]][done.sample] = done.completion
                responses += done.completion.finished
            rounds += 1
        return (time.process_time() - started) / responses, rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="simulated steps of training")
    parser.add_argument("--real", action="store_true", help="measure the transformers engine besides")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    print(f"Simulated, {PLACES} places")
    print(f"{'finish_share':>14} {'seconds':>9} {'of 1.0':>8} {'idle':>7} {'older':>7} {'rounds':>7}")
    rows = []
    for share in SHARES:
        cost = simulate(share, arguments.steps)
        rows.append(asdict(cost))
        print(
            f"{share:14.2f} {cost.seconds:9.1f} {cost.seconds / rows[0]['seconds']:8.0%} {cost.idle:7.0%} "
            f"{cost.older:7.1%} {cost.rounds:7.2f}"
        )
    if arguments.real:
        print(f"\nLight engine, CPU\n{'finish_share':>14} {'CPU ms per response':>20} {'rounds':>7}")
        for share in SHARES:
            seconds, rounds = measure(share)
            rows.append({"finish_share": share, "cpu_seconds_per_response": seconds, "rounds": rounds})
            print(f"{share:14.2f} {1000 * seconds:20.2f} {rounds:7d}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
