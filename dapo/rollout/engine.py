"""The one door to generation. The controller and the workers know `Engine`, never what stands behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from dapo.types import Completion, Prompt, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


class Engine(Protocol):
    """Generates responses with weights that are a copy of the trainer's."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        """`params.n` completions per prompt, in order; each carries the engine's policy version.

        Each request's random stream depends on (params.seed, prompt id, sample) alone: not on the batch it is in.

        Raises:
            EngineError: the engine died, hung, or returned an id outside the vocabulary, a log-probability that is
                not finite, or an empty response.
        """
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
        """Per tensor (transformers' names): float64 sum of absolute values, to be compared with the trainer's."""
        ...

    def sleep(self) -> None:
        """Free device memory between generation phases; no-op where the platform cannot."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...
