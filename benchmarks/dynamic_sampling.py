"""Responses generated per response trained on: our sampling against the reference's, on simulated data.

    python -m benchmarks.dynamic_sampling [--steps 400] [--json FILE]

Both run the same state machine (`GroupBuffer`), the reference as `compat: verl` with rounds of a fixed size. Where the
reference ends with its error, it is started again at the same step, and what it had generated counts.

First table: a group has a signal with the keep rate of the moment, independently of all others; the rate stands still,
swings slowly by a quarter of itself, or wanders through the whole range. Whoever asks every prompt for whole groups
needs at least 1 / keep rate ("least"). At 31 % a round of 192 gives 59.5 groups on average: three steps in four of the
reference take a second round, and pay 5.2 where 3.23 is the least, so that without a past nothing gets below 62 %.

Second table: as many prompts as Geometry3K has, seen for 15 epochs, each with a pass rate of its own (Beta-distributed
so that 31 % of first groups have a signal), which stands still, or is drawn anew for one prompt in five each epoch.
`revisit` below 1 asks prompts whose groups agreed more rarely; 0.7 is the default, 1.0 the paper to the letter.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dapo.algo.groups import GroupBuffer, Stage
from dapo.config.algorithm import SamplingFilterConfig
from dapo.errors import StarvationError
from dapo.types import Completion, FinishReason, Prompt, Rollout, RolloutGroup, Scored

PROMPTS_PER_STEP, PROMPTS_PER_ROUND, GROUP_SIZE = 64, 192, 8
PERIOD = 200  # steps of a swing
KEEP_RATES = (0.10, 0.20, 0.31, 0.50, 0.70, 0.90)

# As many as Geometry3K has; with Beta(SHAPE, SHAPE) pass rates 31 % of groups of 8 have a right and a wrong answer.
PROMPTS, EPOCHS, SHAPE = 2101, 15, 0.16246

HEADER = (
    f"{'ours':>7} {'rounds':>7} {'smaller':>8} {'reference':>10} {'rounds':>7} {'errors':>7} {'ours / reference':>17}"
)

Drift = Callable[[int], float]
"""Keep rate at a step."""


@dataclass(frozen=True)
class Cost:
    """What a run paid."""

    per_trained: float
    """Responses generated per response trained on."""
    rounds: float
    """Generation rounds per step."""
    smaller_steps: float
    """Share of steps that trained on fewer groups than wanted."""
    errors: int
    """Times the run ended with an error."""


def constant(rate: float) -> Drift:
    return lambda step: rate


def swinging(rate: float) -> Drift:
    return lambda step: rate * (1 + 0.25 * math.sin(2 * math.pi * step / PERIOD))


def wandering(step: int) -> float:
    return 0.5 + 0.4 * math.cos(2 * math.pi * step / (5 * PERIOD))


def simulate(config: SamplingFilterConfig, keep_rate: Drift, steps: int, seed: int = 0) -> Cost:
    """Train `steps` steps; the two modes meet the same sequence of prompts."""
    rng = random.Random(seed)
    buffer = GroupBuffer(config, PROMPTS_PER_STEP, PROMPTS_PER_ROUND)
    generated = trained = rounds = smaller = errors = step = 0
    while step < steps:
        buffer.begin_step(step)
        mixed, agreed = _group(step, mixed=True), _group(step, mixed=False)
        while (size := buffer.next_round_size()) > 0:
            buffer.add([mixed if rng.random() < keep_rate(step) else agreed for _ in range(size)])
        rounds += buffer.report().rounds
        generated += buffer.report().responses
        try:
            trained += sum(len(group.rollouts) for group in buffer.take())
        except StarvationError:
            errors += 1
            continue
        smaller += buffer.report().stage is Stage.SMALLER_STEP
        step += 1
    return Cost(generated / trained, rounds / steps, smaller / steps, errors)


def simulate_epochs(config: SamplingFilterConfig, epochs: int, redrawn: float = 0.0, seed: int = 0) -> Cost:
    """Train until all epochs over `PROMPTS` prompts are used up.

    Args:
        redrawn: share of prompts that get another pass rate each epoch.
    """
    rng = random.Random(seed)
    buffer = GroupBuffer(config, PROMPTS_PER_STEP, PROMPTS_PER_ROUND)
    order = [i for _ in range(epochs) for i in rng.sample(range(PROMPTS), PROMPTS)]
    pass_rates = [rng.betavariate(SHAPE, SHAPE) for _ in range(PROMPTS)]
    passed = 0
    generated = trained = rounds = smaller = errors = step = 0
    while order:
        buffer.begin_step(step)
        while order and (size := buffer.next_round_size()) > 0:
            taken, order = order[:size], order[size:]
            for _ in range(round((passed + len(taken)) * redrawn) - round(passed * redrawn)):
                pass_rates[rng.randrange(PROMPTS)] = rng.betavariate(SHAPE, SHAPE)
            passed += len(taken)
            asked = [i for i in taken if buffer.should_sample(str(i))]
            right = [sum(rng.random() < pass_rates[i] for _ in range(GROUP_SIZE)) for i in asked]
            buffer.add([_group(step, str(i), mixed=0 < c < GROUP_SIZE) for i, c in zip(asked, right, strict=True)])
        report = buffer.report()
        generated, rounds = generated + report.responses, rounds + report.rounds
        try:
            trained += sum(len(group.rollouts) for group in buffer.take())
        except StarvationError:
            errors += 1
            continue
        smaller += buffer.report().stage is Stage.SMALLER_STEP
        step += 1
    return Cost(generated / trained, rounds / step, smaller / step, errors)


def _group(version: int, prompt: str = "p", *, mixed: bool) -> RolloutGroup:
    completion = Completion((0,), (0.0,), FinishReason.STOP, version)
    rollouts = tuple(Rollout(prompt, i, completion, Scored(mixed and i == 0), "") for i in range(GROUP_SIZE))
    return RolloutGroup(Prompt(prompt, (0,), (), (), "", ""), rollouts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    scenarios: list[tuple[str, Drift]] = []
    for rate in KEEP_RATES:
        scenarios += [(f"{rate:.0%}", constant(rate)), (f"{rate:.0%} +- a quarter", swinging(rate))]
    scenarios.append(("90% to 10% and back", wandering))
    setting = f"{PROMPTS_PER_STEP} prompts a step, {PROMPTS_PER_ROUND} a round, {GROUP_SIZE} responses each"
    print(f"Responses generated per response trained on; {setting}")
    print(f"\n{'keep rate':>20} {'least':>7} {HEADER}")
    rows = []
    for name, drift in scenarios:
        least = sum(1 / min(drift(step), 1.0) for step in range(arguments.steps)) / arguments.steps
        ours = simulate(SamplingFilterConfig(), drift, arguments.steps)
        reference = simulate(SamplingFilterConfig(compat="verl"), drift, arguments.steps)
        print(f"{name:>20} {least:7.2f} {_columns(ours, reference)}")
        rows.append({"keep_rate": name, "least": least, "ours": asdict(ours), "reference": asdict(reference)})

    for redrawn in (0.0, 0.2):
        reference = simulate_epochs(SamplingFilterConfig(compat="verl"), EPOCHS, redrawn)
        print(f"\n{PROMPTS} prompts, {EPOCHS} epochs; {redrawn:.0%} of pass rates drawn anew each epoch")
        print(f"{'':>28} {HEADER}")
        for revisit in (1.0, 0.7, 0.5):
            ours = simulate_epochs(SamplingFilterConfig(revisit=revisit), EPOCHS, redrawn)
            print(f"{f'revisit {revisit}':>28} {_columns(ours, reference)}")
            rows.append({"revisit": revisit, "redrawn": redrawn, "ours": asdict(ours), "reference": asdict(reference)})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _columns(ours: Cost, reference: Cost) -> str:
    share = ours.per_trained / reference.per_trained
    return (
        f"{ours.per_trained:7.2f} {ours.rounds:7.2f} {ours.smaller_steps:8.0%} "
        f"{reference.per_trained:10.2f} {reference.rounds:7.2f} {reference.errors:7d} {share:17.0%}"
    )


if __name__ == "__main__":
    main()
