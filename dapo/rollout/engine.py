"""The one interface to generation. The controller and the workers use `Engine`, never an implementation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from dapo.types import Completion, Finished, Prompt, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


Begun = Sequence[Sequence[Completion | None]]
"""Per prompt and sample, what an earlier round wrote: a finished response is not written again, an unfinished one goes
on, None begins. Empty: everything begins."""


class Engine(Protocol):
    """Generates responses with weights that are a copy of the trainer's."""

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun = ()) -> Iterator[Finished]:
        """`params.n` completions per prompt, each as soon as it ended; each carries the engine's policy version.

        Each request's random stream depends on (params.seed, prompt id, sample) alone, and where it goes on, on how
        much of it was written: not on the batch it is in.
        Where `params.finish_share` ends the round early, what was begun comes last, `UNFINISHED`.

        Raises:
            EngineError: the engine died, hung, or returned an id outside the vocabulary, a log-probability that is
                not finite, or an empty response.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        """All of `stream`, in order of prompt and sample."""
        ...

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, unchanged: Collection[str] = ()
    ) -> None:
        """Take weights, named and laid out as in transformers' `state_dict()`; drop every cache that depends on the old
        ones; from now on completions carry `version`.

        Args:
            weights: all tensors, or all but `unchanged`.
            unchanged: names the engine was given before and keeps; never part of a module it stores as one
                (`dapo.model.tensors.fused_group`) of which another part comes.

        Raises:
            EngineError: a tensor is unknown, does not fit, or is missing; another whole update repairs the engine.
        """
        ...

    def fingerprint(self) -> dict[str, float]:
        """Per tensor (transformers' names): float64 sum of absolute values of what was given last, to be compared with
        the trainer's. The log-prob probe judges what the engine made of it."""
        ...

    def sleep(self) -> int | None:
        """Free device memory between generation phases: how many bytes; None where there was nothing to do."""
        ...

    def wake(self) -> bool:
        """True where it slept."""
        ...

    def close(self) -> None: ...


def collected(stream: Iterable[Finished], prompts: int, samples: int) -> list[list[Completion]]:
    """What a whole round streamed, in order of prompt and sample."""
    out: list[list[Completion | None]] = [[None] * samples for _ in range(prompts)]
    for done in stream:
        out[done.prompt][done.sample] = done.completion
    return [[completion for completion in group if completion is not None] for group in out]


def prompts_needed(prompts: int, params: SamplingParams) -> int:
    """Prompts that must have all their samples before a round may end."""
    return min(prompts, max(1, math.ceil(params.finish_share * prompts)))
