"""Records that travel between the packages: frozen, printable, free of torch. `dapo.train` makes tensors of them.

Names follow the field: a `Prompt` gets `group_size` `Rollout`s, together a `RolloutGroup`; `policy_version` counts
weight updates sent to the engine (0 = the weights the run started from).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class FinishReason(enum.StrEnum):
    """Why the engine stopped writing."""

    STOP = "stop"
    """An end-of-sequence or stop token was sampled (it is the last of the response's ids)."""
    LENGTH = "length"
    """The token limit was reached: the response is truncated."""
    UNFINISHED = "unfinished"
    """The round ended first; the response goes on in the next one (partial rollouts)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question as the trainer sees it.

    `token_ids` are already expanded: one placeholder id per image feature (an engine that expands by itself must be
    given `collapsed` ids). `image_grids` holds one (time, height, width) in patches per image, so that
    t * h * w / merge**2 placeholders belong to it.
    """

    id: str
    """Unique in the run and stable over runs, e.g. ``train/17``."""
    token_ids: tuple[int, ...]
    images: tuple[bytes, ...]
    """Encoded image files (PNG or JPEG), in order of their placeholders."""
    image_grids: tuple[tuple[int, int, int], ...]
    answer: str
    """Ground truth, given to the reward and to nobody else."""
    question: str
    """The user's text without template; for reports."""
    data_source: str = "geometry3k"
    tags: tuple[str, ...] = ()
    """Slices this prompt belongs to (for example ``shape:circle``)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine returned for one sample."""

    token_ids: tuple[int, ...]
    """Sampled ids, the stop token included where one was sampled."""
    logprobs: tuple[float, ...]
    """Of each sampled id under the sampling distribution (after temperature and banned ids), nats."""
    finish_reason: FinishReason
    policy_version: int
    """That wrote it; of several, the oldest."""
    versions: tuple[tuple[int, int], ...] = ()
    """Of a response that was continued: (policy version, tokens it wrote), in order. Empty: one version wrote all."""
    experts: bytes = b""
    """Which experts the engine's routers chose for the last input tokens of this response (its own without the last
    one; in sample 0 those of the prompt before them, as many as the engine reports). Per token, layer with experts and
    choice one integer: 1 byte up to 256 experts, else 2, little-endian. Empty: `rollout.router_replay` is off."""

    @property
    def finished(self) -> bool:
        return self.finish_reason is not FinishReason.UNFINISHED

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(policy version, tokens), also where one version wrote all."""
        return self.versions or ((self.policy_version, len(self.token_ids)),)

    def continued(self, more: Completion) -> Completion:
        """This unfinished response with what was written after it."""
        segments = [*self.segments, *more.segments]
        if segments[-2][0] == segments[-1][0]:
            (version, count), (_, added) = segments[-2:]
            segments[-2:] = [(version, count + added)]
        return Completion(
            self.token_ids + more.token_ids,
            self.logprobs + more.logprobs,
            more.finish_reason,
            min(version for version, _ in segments),
            tuple(segments) if len(segments) > 1 else (),
        )


class Finished(NamedTuple):
    """One response as it leaves the engine: at its end, or unfinished at the end of the round."""

    prompt: int
    """Index into the prompts given."""
    sample: int
    completion: Completion
    """Whole, with what an earlier round wrote of it."""


@dataclass(frozen=True, slots=True)
class Scored:
    """The reward function graded a whole answer.

    `format` is 1.0 where the answer has the asked form. `overlong` is the soft overlong penalty, in
    ``[-factor, 0]``; it is a number about length, so it is set by the controller and not by the grader.
    """

    accuracy: bool
    format: float = 0.0
    overlong: float = 0.0
    extracted: str = ""
    """The answer the grader understood, for people."""


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The check did not end before its deadline and was killed."""

    deadline_s: float


@dataclass(frozen=True, slots=True)
class Crashed:
    """The check raised, or its process died."""

    reason: str


@dataclass(frozen=True, slots=True)
class Truncated:
    """The response hit the token limit. It was still graded: `scored` holds that verdict."""

    scored: Scored


Outcome = Scored | TimedOut | Crashed | Truncated


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response with everything needed to train on it or to replay it."""

    prompt_id: str
    sample: int
    """Index within the group, 0 .. group_size - 1."""
    completion: Completion
    outcome: Outcome
    text: str
    """The decoded response, for graders and people."""

    @property
    def scored(self) -> Scored | None:
        """The verdict, truncated or not; None where the check failed."""
        match self.outcome:
            case Truncated(scored=scored):
                return scored
            case Scored() as scored:
                return scored
        return None

    @property
    def correct(self) -> bool:
        """True only where a check succeeded and said so."""
        return self.scored is not None and self.scored.accuracy

    @property
    def failed(self) -> bool:
        """The check itself failed (no verdict about the answer)."""
        return isinstance(self.outcome, TimedOut | Crashed)

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason is FinishReason.LENGTH

    @property
    def length(self) -> int:
        """Response tokens."""
        return len(self.completion.token_ids)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All rollouts of one prompt."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards: tuple[float | None, ...] = ()
    """One per rollout: the weighted sum of its reward parts (float64), None where the check failed. Empty until
    rewards are combined."""
    serial: int = 0
    """Order of generation in the run; the training order follows it."""

    @property
    def policy_version(self) -> int:
        return min(r.completion.policy_version for r in self.rollouts)

    @property
    def num_correct(self) -> int:
        return sum(r.correct for r in self.rollouts)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the engine samples. `seed` plus (prompt, sample) gives each request its own stream."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    """-1 = off."""
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    """Never sampled, and left out of the softmax: image and video placeholders, ids outside the tokenizer."""
    seed: int = 0
    finish_share: float = 1.0
    """Generation ends when this share of the prompts has all its samples; the others come back unfinished."""


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One response as the loss sees it; tensors are made of it on the device that trains on it."""

    response_ids: tuple[int, ...]
    advantage: float
    """Group-relative, float64."""
    rollout_logprobs: tuple[float, ...]
    """By the engine while sampling."""
    experts: bytes = b""
    """See `Completion.experts`."""
    trained: bool = True
    """False: masked out of the loss and of its denominator (overlong filtering, failed check)."""


@dataclass(frozen=True, slots=True)
class TrainGroup:
    """A prompt and its responses: the unit of shared-prefix packing."""

    prompt: Prompt
    sequences: tuple[TrainSequence, ...]


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """All groups of a step, in training order; update u trains on `updates[u]` (indices into `groups`)."""

    groups: tuple[TrainGroup, ...]
    updates: tuple[tuple[int, ...], ...]
    policy_version: int
    """Weights the batch is trained with first; a group may be older (`RolloutGroup.policy_version`)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A prompt and some of its responses inside one pack: the prompt is stored once."""

    group: int
    sequences: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pack:
    """What one forward pass of one rank holds. A pack without segments is a zero-weight filler."""

    segments: tuple[Segment, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class PackPlan:
    """`updates[u][rank]` are that rank's packs in update u: the same count on every rank. All passes use this plan."""

    updates: tuple[tuple[tuple[Pack, ...], ...], ...]
