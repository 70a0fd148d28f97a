"""Dynamic sampling (DAPO section 3.2) as a state machine: which groups to train on, how many prompts to sample next.

    buffer.begin_step(policy_version)
    while (size := buffer.next_round_size()) > 0:
        buffer.add(score(generate([p for p in loader.take(size) if buffer.should_sample(p.id)])))
    groups = buffer.take()

A group is kept iff 0 < #correct < G. Kept groups leave in the order in which they came; what a step does not need waits
for the next one while it is fresh. A step that does not fill goes through the stages of `Stage`.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dapo.algo.revisit import SelectiveSampling
from dapo.algo.verdict import Verdict, classify
from dapo.config.algorithm import SamplingFilterConfig
from dapo.errors import StarvationError
from dapo.serialize import group_from_plain, group_to_plain
from dapo.types import Crashed, RolloutGroup, Scored, TimedOut, Truncated

# The keep rate forgets half of what it saw after so many steps' worth of prompts: about two steps of generation.
HALF_LIFE = 6.0

_KINDS = {Scored: "scored", Truncated: "truncated", TimedOut: "timed_out", Crashed: "crashed"}


class Stage(enum.StrEnum):
    """How hard a step is to fill; the later, the worse."""

    CARRY_OVER = "carry_over"
    """The usual: groups left from earlier steps, then one round for what is missing."""
    LARGER_ROUND = "larger_round"
    """One round was not enough; the next ones are sized by the keep rate that it showed."""
    SMALLER_STEP = "smaller_step"
    """`max_rounds` were not enough: the step trains on what there is, with exact denominators."""
    STOP = "stop"
    """Not even `min_prompts_share` of a step was found within `patience_rounds` more."""


@dataclass(frozen=True, slots=True)
class SamplingReport:
    """What one step's sampling did, counted in groups."""

    stage: Stage
    rounds: int
    generated: int
    verdicts: dict[Verdict, int]
    """Of the groups generated in this step; every verdict has its entry."""
    outcomes: dict[str, int]
    """Responses generated in this step: scored, truncated, timed_out, crashed; every kind has its entry."""
    accuracy: float
    """Share of correct responses among those with a verdict: the policy on the training prompts, before any filter;
    NaN where nothing was generated."""
    reward: float
    """Mean reward of the same responses."""
    skipped: int
    """Prompts passed over because their groups agreed the last times (`revisit` below 1 only)."""
    carried_in: int
    """Kept groups of earlier steps that were still fresh."""
    expired: int
    """Kept groups of earlier steps that had become too old."""
    taken: int
    """Groups the step trains on."""
    dropped: int
    """Kept groups thrown away because the step was full (`compat: verl` only)."""
    waiting: int
    """Kept groups in the buffer now."""
    keep_rate: float
    """Kept groups per prompt (asked or passed over); recent steps weigh most."""

    @property
    def responses(self) -> int:
        """Generated in this step."""
        return sum(self.outcomes.values())

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {verdict.value.replace('_', ' ')}" for verdict, count in self.verdicts.items())
        return f"{self.rounds} rounds, {self.generated} groups generated: {reasons}; {self.waiting} waiting"


class GroupBuffer:
    """Kept groups in order of generation. Never loses, repeats or reorders one without counting it."""

    def __init__(
        self, config: SamplingFilterConfig, prompts_per_step: int, prompts_per_round: int | None = None
    ) -> None:
        """
        Args:
            prompts_per_round: size of the first round of a run (of every round with `compat: verl`); None: derived
                from the keep rate (with `compat: verl`: prompts_per_step).
        """
        self.config = config
        self.prompts_per_step = prompts_per_step
        self.prompts_per_round = prompts_per_round
        self._waiting: deque[RolloutGroup] = deque()
        self._kept_weight = self._seen_weight = 0.0
        self._verdicts: Counter[Verdict] = Counter()
        self._count: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._correct, self._reward = 0, 0.0
        self._skipped = 0  # since the last round
        self._selective = SelectiveSampling(1.0 if self._verl else config.revisit)

    def __len__(self) -> int:
        """Kept groups waiting to be trained on."""
        return len(self._waiting)

    @property
    def _verl(self) -> bool:
        return self.config.compat == "verl"

    @property
    def keep_rate(self) -> float:
        """Kept groups per prompt, recent ones weigh most; 1/2 before anything was measured, never 0 or 1."""
        return (self._kept_weight + 1) / (self._seen_weight + 2)

    @property
    def stage(self) -> Stage:
        """Stage of this step."""
        config = self.config
        found, rounds = len(self) + self._count["taken"], self._count["rounds"]
        if found >= self.prompts_per_step or rounds < config.max_rounds:
            return Stage.CARRY_OVER if rounds < 2 else Stage.LARGER_ROUND
        if self._verl:
            return Stage.STOP
        if found >= math.ceil(config.min_prompts_share * self.prompts_per_step):
            return Stage.SMALLER_STEP
        return Stage.LARGER_ROUND if rounds < config.max_rounds + config.patience_rounds else Stage.STOP

    def begin_step(self, policy_version: int) -> None:
        """Forget the last step's counts and the groups that are more than `max_staleness` versions old."""
        before = len(self)
        self._waiting = deque(g for g in self._waiting if self._is_fresh(g, policy_version))
        self._count = Counter(expired=before - len(self), carried_in=len(self))
        self._verdicts.clear()
        self._outcomes.clear()
        self._correct, self._reward = 0, 0.0

    def fresh(self, policy_version: int) -> int:
        """Kept groups that a step of this policy version may train on."""
        return sum(self._is_fresh(group, policy_version) for group in self._waiting)

    def _is_fresh(self, group: RolloutGroup, policy_version: int) -> bool:
        return not self._verl and group.policy_version >= policy_version - self.config.max_staleness

    def should_sample(self, prompt_id: str) -> bool:
        """Whether to sample a prompt now; always, unless `revisit` is below 1 and its last groups agreed."""
        sample = self._selective.should_sample(prompt_id)
        self._skipped += not sample
        return sample

    def next_round_size(self) -> int:
        """Prompts to take for the next round; 0: take no more, `take` the groups that there are."""
        missing = self.prompts_per_step - len(self) - self._count["taken"]
        if not self.config.enabled:
            return 0 if self._verl and self._count["rounds"] else max(missing, 0)
        if missing <= 0 or self.stage in (Stage.SMALLER_STEP, Stage.STOP):
            return 0
        if self._verl:
            return self.prompts_per_round or self.prompts_per_step
        if self.prompts_per_round and not self._seen_weight:
            return self.prompts_per_round
        # Smallest n with n r - safety sqrt(n r (1 - r)) >= missing: a quadratic in sqrt(n r).
        rate = self.keep_rate
        spread = self.config.safety * math.sqrt(1 - rate)
        root = (spread + math.sqrt(spread**2 + 4 * missing)) / 2
        return min(math.ceil(root**2 / rate), int(self.config.largest_round * self.prompts_per_step))

    def add(self, groups: Iterable[RolloutGroup]) -> list[Verdict]:
        """One round's graded groups in order of generation; keeps those with a signal and returns all verdicts."""
        groups = list(groups)
        verdicts = [self._verdict(group) for group in groups]
        self._waiting.extend(g for g, verdict in zip(groups, verdicts, strict=True) if verdict is Verdict.KEPT)
        self._verdicts.update(verdicts)
        self._count.update(rounds=1, generated=len(groups))
        for group in groups:
            self._outcomes.update(_KINDS[type(r.outcome)] for r in group.rollouts)
            self._correct += group.num_correct
            self._reward += math.fsum(reward for reward in group.rewards if reward is not None)
        self._remember(groups, verdicts)
        return verdicts

    def _remember(self, groups: list[RolloutGroup], verdicts: list[Verdict]) -> None:
        """Update the keep rate and which prompts' groups agreed."""
        kept, seen = verdicts.count(Verdict.KEPT), len(groups) + self._skipped
        decay = 0.5 ** (seen / (HALF_LIFE * self.prompts_per_step))
        self._kept_weight = self._kept_weight * decay + kept
        self._seen_weight = self._seen_weight * decay + seen
        self._count["skipped"] += self._skipped
        self._skipped = 0
        for group, verdict in zip(groups, verdicts, strict=True):
            if verdict is not Verdict.FAILED:
                self._selective.record(group.prompt.id, agreed=verdict is not Verdict.KEPT)

    def _verdict(self, group: RolloutGroup) -> Verdict:
        # verl keeps a group of one, whose advantage is its reward.
        if not self.config.enabled or (self._verl and len(group.rollouts) == 1):
            return Verdict.KEPT
        return classify(group, self.config.metric)

    def take(self) -> list[RolloutGroup]:
        """The step's groups, oldest first: `prompts_per_step`, or fewer in stage `SMALLER_STEP` or at the end of data.

        Raises:
            StarvationError: there is nothing to train on, or less than the configuration accepts; the groups that are
                there stay in the buffer.
        """
        if self.stage is Stage.STOP or not self._waiting:
            least = 1.0 if self._verl else self.config.min_prompts_share
            raise StarvationError(
                f"dynamic sampling found {len(self)} of {self.prompts_per_step} groups with a signal: {self.report()}. "
                f"At least {math.ceil(least * self.prompts_per_step)} are needed. "
                "Many all right: the data is too easy; all wrong: too hard, or the grader cannot read the answers; "
                "truncated: raise batch.max_response_tokens; failed: try `dapo reward test`. More rounds: "
                f"algorithm.sampling.{'max_rounds' if self._verl else 'patience_rounds'}"
            )
        whole_round = self._verl and not self.config.enabled
        count = len(self) if whole_round else min(self.prompts_per_step, len(self))
        taken = [self._waiting.popleft() for _ in range(count)]
        self._count["taken"] += count
        if self._verl:
            self._count["dropped"] += len(self._waiting)
            self._waiting.clear()
        return taken

    def report(self) -> SamplingReport:
        """This step so far."""
        count = self._count
        outcomes = {kind: self._outcomes[kind] for kind in _KINDS.values()}
        verdicts = outcomes["scored"] + outcomes["truncated"]
        return SamplingReport(
            stage=self.stage,
            rounds=count["rounds"],
            generated=count["generated"],
            verdicts={verdict: self._verdicts[verdict] for verdict in Verdict},
            outcomes=outcomes,
            accuracy=self._correct / verdicts if verdicts else math.nan,
            reward=self._reward / verdicts if verdicts else math.nan,
            skipped=count["skipped"],
            carried_in=count["carried_in"],
            expired=count["expired"],
            taken=count["taken"],
            dropped=count["dropped"],
            waiting=len(self),
            keep_rate=self.keep_rate,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "waiting": [group_to_plain(group) for group in self._waiting],
            "keep_rate": [self._kept_weight, self._seen_weight],
            "verdicts": {verdict.value: count for verdict, count in self._verdicts.items()},
            "counts": dict(self._count),
            "outcomes": dict(self._outcomes),
            "correct": self._correct,
            "reward": self._reward,
            "skipped": self._skipped,
            "agreed": self._selective.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting = deque(group_from_plain(plain) for plain in state["waiting"])
        self._kept_weight, self._seen_weight = state["keep_rate"]
        self._verdicts = Counter({Verdict(name): count for name, count in state["verdicts"].items()})
        self._count, self._outcomes = Counter(state["counts"]), Counter(state["outcomes"])
        self._correct, self._reward = state["correct"], state["reward"]
        self._skipped = state["skipped"]
        self._selective.load_state_dict(state["agreed"])
