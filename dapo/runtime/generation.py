"""Prompts in, judged groups out: how a run samples, what happens when the engine dies, who grades."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from dapo.algo.batch import judged
from dapo.config.run import RunConfig
from dapo.errors import EngineError, RewardError
from dapo.types import Completion, Outcome, Prompt, Rollout, RolloutGroup, SamplingParams


class EngineDoor(Protocol):
    """What the controller needs of the engines: `RayEngine`, or any one `Engine` with `restart`."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]: ...
    def restart(self) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


class RewardDoor(Protocol):
    """`dapo.rewards.pool.RewardPool`, or anything that judges (response, answer) pairs in order."""

    def score(self, items: Sequence[tuple[str, str]]) -> Sequence[Outcome]: ...


@dataclass(frozen=True)
class Text:
    """What the controller needs of the processor."""

    stop_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    decode_many: Callable[[Sequence[Sequence[int]]], list[str]]


class Generation:
    """One run's engine, grader and sampling parameters.

    Args:
        restarted: called with the error after a dead engine was started again; gives it the current weights.
        phase: times what runs inside it under the given name.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: EngineDoor,
        rewards: RewardDoor,
        text: Text,
        *,
        restarted: Callable[[EngineError], object],
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.config, self.engine, self.rewards, self.text = config, engine, rewards, text
        self._restarted, self._phase = restarted, phase

    def groups(self, prompts: Sequence[Prompt], params: SamplingParams, serial: int, phase: str) -> list[RolloutGroup]:
        """Sample `params.n` responses per prompt and have them judged; groups are numbered from `serial` on."""
        with self._phase(phase):
            completions = self._generate(prompts, params)
        with self._phase("reward"):
            texts = self.text.decode_many([c.token_ids for group in completions for c in group])
            answers = [p.answer for p, group in zip(prompts, completions, strict=True) for _ in group]
            outcomes = self.rewards.score(list(zip(texts, answers, strict=True)))
        judgements = zip(outcomes, texts, strict=True)
        groups: list[RolloutGroup] = []
        for prompt, samples in zip(prompts, completions, strict=True):
            rollouts = tuple(Rollout(prompt.id, i, c, *next(judgements)) for i, c in enumerate(samples))
            groups.append(judged(RolloutGroup(prompt, rollouts, serial=serial + len(groups)), self.config))
        self._stop_on_broken_reward(groups)
        return groups

    def training(self, serial: int) -> SamplingParams:
        """How responses to train on are sampled; `serial` (of the round's first group) gives each round its streams."""
        rollout, batch = self.config.rollout, self.config.batch
        return SamplingParams(
            n=batch.group_size,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_tokens=batch.max_response_tokens,
            stop_token_ids=self.text.stop_token_ids,
            banned_token_ids=self.text.banned_token_ids,
            seed=self.config.seed * 1_000_003 + serial + 1,
        )

    def validation(self) -> SamplingParams:
        """How held-out prompts are answered; the same random streams each time, so that steps compare."""
        validation = self.config.validation
        return replace(
            self.training(0),
            n=validation.samples,
            temperature=validation.temperature,
            top_p=validation.top_p,
            top_k=validation.top_k,
            seed=self.config.seed,
        )

    def _generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        """Redo a round on a restarted engine; the same seeds give the same responses."""
        failure: EngineError | None = None
        for _ in range(self.config.rollout.restarts + 1):
            try:
                if failure is not None:
                    self.engine.restart()
                    self._restarted(failure)
                return self.engine.generate(prompts, params)
            except EngineError as error:
                failure = error
        assert failure is not None
        raise failure

    def _stop_on_broken_reward(self, groups: Sequence[RolloutGroup]) -> None:
        rollouts = [r for g in groups for r in g.rollouts]
        failed = [r for r in rollouts if r.failed]
        if len(failed) > self.config.reward.max_failed_share * len(rollouts):
            raise RewardError(
                f"{len(failed)} of {len(rollouts)} checks of reward.function={self.config.reward.function} failed in "
                f"one round (reward.max_failed_share={self.config.reward.max_failed_share}); the first: "
                f"{failed[0].outcome}. Try it with `dapo reward test {self.config.reward.function}`"
            )
