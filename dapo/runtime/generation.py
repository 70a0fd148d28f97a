"""From prompts to graded groups: sampling, restarts of the engine, grading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dapo.algo.batch import with_rewards
from dapo.config.run import RunConfig
from dapo.errors import EngineError, RewardError
from dapo.rollout.engine import Begun
from dapo.serialize import completion_from_plain, completion_to_plain, prompt_from_plain, prompt_to_plain
from dapo.types import Completion, Finished, Outcome, Prompt, Rollout, RolloutGroup, SamplingParams


class StreamingEngine(Protocol):
    """What rounds need of the engines."""

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun = ()) -> Iterator[Finished]: ...


class EngineClient(StreamingEngine, Protocol):
    """What the controller needs of the engines: `RayEngine`, or any one `Engine` with `restart`."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]: ...
    def restart(self) -> None: ...
    def sleep(self) -> int | None: ...
    def wake(self) -> bool: ...


class Grader(Protocol):
    """`dapo.rewards.pool.RewardPool`, or anything that grades (response, answer) pairs in order."""

    replaced: int
    """Its processes that hung or died and were replaced."""

    def score(self, items: Sequence[tuple[str, str]]) -> Sequence[Outcome]: ...


class TextCodec(Protocol):
    """What rounds need of `dapo.data.processor.PromptProcessor`."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...
    @property
    def banned_token_ids(self) -> tuple[int, ...]: ...
    def decode_many(self, responses: Sequence[Sequence[int]]) -> list[str]: ...


@dataclass
class OpenGroup:
    """A prompt whose responses are being written, over one round or several."""

    prompt: Prompt
    serial: int
    completions: list[Completion | None]
    outcomes: dict[int, tuple[Outcome, str]] = field(default_factory=dict)
    """Of the finished ones: the verdict and the text."""

    @property
    def complete(self) -> bool:
        return all(completion is not None and completion.finished for completion in self.completions)

    def token_ids(self, sample: int) -> tuple[int, ...]:
        completion = self.completions[sample]
        assert completion is not None, "only generated responses are graded"
        return completion.token_ids

    def forget(self, older_than: int) -> None:
        """Discard responses that were begun too many policy versions ago."""
        if any(c is not None and c.policy_version < older_than for c in self.completions):
            self.completions = [None] * len(self.completions)
            self.outcomes.clear()

    def to_group(self) -> RolloutGroup:
        rollouts = tuple(
            Rollout(self.prompt.id, i, completion, *self.outcomes[i])
            for i, completion in enumerate(self.completions)
            if completion is not None
        )
        return RolloutGroup(self.prompt, rollouts, serial=self.serial)

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint; responses are graded again after it is loaded."""
        written = [None if c is None else completion_to_plain(c) for c in self.completions]
        return {"prompt": prompt_to_plain(self.prompt), "serial": self.serial, "completions": written}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> OpenGroup:
        written = [None if c is None else completion_from_plain(c) for c in plain["completions"]]
        return cls(prompt_from_plain(plain["prompt"]), plain["serial"], written)


class Generation:
    """One run's engine, grader and sampling parameters.

    Args:
        restart: called with the error of a dead engine; starts it again and gives it the current weights,
            or raises that very error.
        phase: times what runs inside it under the given name.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: StreamingEngine,
        rewards: Grader,
        text: TextCodec,
        *,
        restart: Callable[[EngineError], object],
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.config, self.engine, self.rewards, self.text = config, engine, rewards, text
        self._restart, self._phase = restart, phase
        self.open: list[OpenGroup] = []
        """Asked, and not fully answered yet."""

    def training_groups(
        self, prompts: Sequence[Prompt], version: int, serial: int, *, last: bool = False, restart: bool = True
    ) -> list[RolloutGroup]:
        """One round: what earlier rounds left unfinished, and new prompts, numbered from `serial` on.

        Args:
            version: policy version that will be trained on them; a response that was begun more than `max_staleness`
                versions before it begins anew.
            last: no more prompts will come: everything is written to its end.
            restart: where the engine dies. False: raises, and it is the caller's to restart.
        """
        params = self.training(serial)
        if last:
            params = replace(params, finish_share=1.0)
        for group in self.open:
            group.forget(older_than=version - self.config.algorithm.sampling.max_staleness)
        self.open += [OpenGroup(p, serial + i, [None] * params.n) for i, p in enumerate(prompts)]
        # `open` holds them until they are judged: where the engine fails for good, nothing is lost.
        groups = self._round(self.open, params, "generate", restart)
        self.open = [group for group in self.open if not group.complete]
        refuse_broken_reward(groups, self.config)
        return groups

    def validation_groups(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """Held-out prompts, answered and graded, however many checks failed."""
        params = self.validation()
        return self._round([OpenGroup(p, 0, [None] * params.n) for p in prompts], params, "validate", restart=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [group.to_plain() for group in self.open]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        self.open = [OpenGroup.from_plain(plain) for plain in state]

    def _round(
        self, asked: Sequence[OpenGroup], params: SamplingParams, phase: str, restart: bool
    ) -> list[RolloutGroup]:
        """The groups that are complete, in the order asked. Responses are graded while others are still generated."""
        with ThreadPoolExecutor(1, "reward") as grader:  # it waits for the judging processes
            verdicts: list[Future[None]] = []
            waiting = [(group, i) for group in asked for i, c in enumerate(group.completions) if c and c.finished]

            def judge() -> None:
                verdicts.append(grader.submit(self._judge, list(waiting)))
                waiting.clear()

            with self._phase(phase):
                for done in self._stream(asked, params, restart):
                    group = asked[done.prompt]
                    group.completions[done.sample] = done.completion
                    if done.completion.finished:
                        waiting.append((group, done.sample))
                        if not verdicts or verdicts[-1].done():
                            judge()
            with self._phase("reward"):
                judge()
                for verdict in verdicts:
                    verdict.result()
        return [with_rewards(group.to_group(), self.config) for group in asked if group.complete]

    def _judge(self, finished: Sequence[tuple[OpenGroup, int]]) -> None:
        new = [(group, i) for group, i in finished if i not in group.outcomes]
        texts = self.text.decode_many([group.token_ids(i) for group, i in new])
        answers = [group.prompt.answer for group, _ in new]
        outcomes = self.rewards.score(list(zip(texts, answers, strict=True)))
        for (group, i), outcome, text in zip(new, outcomes, texts, strict=True):
            group.outcomes[i] = outcome, text

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
            finish_share=rollout.finish_share,
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
            finish_share=1.0,
        )

    def _stream(self, asked: Sequence[OpenGroup], params: SamplingParams, restart: bool) -> Iterator[Finished]:
        """What the engine writes; where it dies, a restarted one goes on with what is missing, if `restart`. The same
        seeds give the same responses."""
        failure: EngineError | None = None
        while True:
            try:
                if failure is not None:
                    self._restart(failure)
                begun = [tuple(group.completions) for group in asked]
                yield from self.engine.stream([group.prompt for group in asked], params, begun)
                return
            except EngineError as error:
                if error is failure or not restart:
                    raise
                failure = error


def refuse_broken_reward(groups: Sequence[RolloutGroup], config: RunConfig) -> None:
    """Failed checks are no wrong answers: many of them are an error.

    Raises:
        RewardError: of the rollouts, more than `reward.max_failed_share` have no verdict.
    """
    rollouts = [r for g in groups for r in g.rollouts]
    failed = [r for r in rollouts if r.failed]
    if len(failed) > config.reward.max_failed_share * len(rollouts):
        raise RewardError(
            f"{len(failed)} of {len(rollouts)} checks of reward.function={config.reward.function} failed, more than "
            f"reward.max_failed_share={config.reward.max_failed_share} allows; the first: {failed[0].outcome}. Try it "
            f"with `dapo reward test {config.reward.function}`"
        )
