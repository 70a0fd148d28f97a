"""How a pack's tokens lie: all prompts first, one behind the other, then all responses, prompt by prompt.

A prompt is stored once; each of its responses sees the prompt and itself. Plain packing is the case without responses
(every "prompt" is a whole sequence), one sequence the case of one prompt; a vision tower's images are prompts that are
not causal. Attention over such a pack is three ragged problems over contiguous slices, and no mask over the pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Independent attention problems over consecutive slices of queries and keys."""

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    causal: bool
    """Query i of a problem sees keys 0 .. i (then both lengths are equal), else all keys of its problem."""

    @cached_property
    def query_ends(self) -> list[int]:
        """Cumulative lengths without the leading 0, as host integers (what NPU kernels take)."""
        return _ends(self.query_lengths)

    @cached_property
    def key_ends(self) -> list[int]:
        return _ends(self.key_lengths)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """(queries, keys)"""
        return max(self.query_lengths, default=0), max(self.key_lengths, default=0)

    def offsets(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cumulative lengths with the leading 0, int32, on the device; made once (what CUDA kernels take)."""
        if device not in self._offsets:
            queries, keys = ([0, *ends] for ends in (self.query_ends, self.key_ends))
            pair = torch.tensor([queries, keys], dtype=torch.int32)
            self._offsets[device] = (pair[0].to(device), pair[1].to(device))
        return self._offsets[device]

    _offsets: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class PackLayout:
    """Lengths of everything in a pack."""

    prompts: tuple[int, ...]
    """Tokens of each prompt, of each whole sequence, or of each image."""
    responses: tuple[tuple[int, ...], ...] = ()
    """For each prompt, the input tokens of its responses (their last token is never an input); empty: none at all."""
    causal: bool = True

    @cached_property
    def prompt_tokens(self) -> int:
        return sum(self.prompts)

    @cached_property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(sum(lengths) for lengths in self.responses)

    @cached_property
    def within_prompts(self) -> Ragged:
        """Prompt tokens look at their own prompt."""
        return Ragged(self.prompts, self.prompts, self.causal)

    @cached_property
    def responses_to_prompts(self) -> Ragged:
        """All response tokens of a prompt look at the whole prompt."""
        return Ragged(tuple(sum(lengths) for lengths in self.responses), self.prompts, causal=False)

    @cached_property
    def within_responses(self) -> Ragged:
        """Response tokens look at their own response."""
        lengths = tuple(n for group in self.responses for n in group)
        return Ragged(lengths, lengths, causal=True)

    @cached_property
    def has_responses(self) -> bool:
        return self.tokens > self.prompt_tokens

    @cached_property
    def longest_context(self) -> int:
        """Most keys any token sees."""
        responses = self.responses or ((),) * len(self.prompts)
        return max((p + max(r, default=0) for p, r in zip(self.prompts, responses, strict=True)), default=0)

    kernels: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What a kernel worked out for this layout, kept for the other layers and passes."""


def _ends(lengths: Sequence[int]) -> list[int]:
    ends, total = [], 0
    for length in lengths:
        total += length
        ends.append(total)
    return ends
