"""One plan of packs for all ranks and all passes of a step: token-limited, balanced by cost, prompts stored once.

A pack is what one forward pass of one rank holds: segments of a prompt with some of its responses behind it. Ranks work
in lockstep (sharded weights are gathered for each pass), so the k-th packs of all ranks should cost the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from dapo.errors import DataError
from dapo.plan.flops import ModelFlops
from dapo.plan.partition import fill_bins
from dapo.types import Pack, PackPlan, Segment, TrainBatch, TrainGroup

# To even out the ranks, groups are also tried in parts that cost at most these shares of a rank's load.
_FINER = (1.0, 0.5, 0.25)

# Reading (and gathering) all weights for one pass takes about as long as computing so many tokens.
_TOKENS_PER_PASS = 100.0


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a segment costs, in any unit (FLOPs where made by `of`). The default counts tokens."""

    token: float = 1.0
    """Per prompt or response token (the linear layers)."""
    head: float = 0.0
    """Per response token, on top (the language-model head runs on nothing else)."""
    pair: float = 0.0
    """Per (query, key) pair of causal attention."""
    patch: float = 0.0
    """Per image patch."""
    patch_pair: float = 0.0
    """Per pair of patches of one frame (the vision tower attends within frames, without a causal mask)."""
    per_pack: float = _TOKENS_PER_PASS
    """Per pass, however small: gathering and reading weights, launching kernels."""

    @classmethod
    def of(cls, flops: ModelFlops) -> CostModel:
        """Forward and backward FLOPs of a model."""
        return cls(
            token=6 * flops.token,
            head=6 * flops.head,
            pair=12 * flops.pair,
            patch=6 * flops.patch,
            patch_pair=12 * flops.patch_pair,
            per_pack=6 * flops.token * _TOKENS_PER_PASS,
        )

    def segment(self, prompt_tokens: int, responses: Sequence[int], frames: Sequence[int]) -> float:
        """A prompt stored once with responses of these lengths (tokens); `frames` are its images' patches per frame."""
        written = sum(responses)
        pairs = prompt_tokens * prompt_tokens / 2 + sum(n * (prompt_tokens + n / 2) for n in responses)
        return (
            self.token * (prompt_tokens + written)
            + self.head * written
            + self.pair * pairs
            + self.patch * sum(frames)
            + self.patch_pair * sum(n * n for n in frames)
        )


@dataclass(frozen=True, slots=True)
class _Group:
    """A group as the planner sees it."""

    index: int
    prompt_tokens: int
    responses: tuple[int, ...]
    frames: tuple[int, ...]
    shared: bool

    def tokens(self, sequences: Sequence[int]) -> int:
        copies = 1 if self.shared else len(sequences)
        return copies * self.prompt_tokens + sum(self.responses[i] for i in sequences)

    def cost(self, sequences: Sequence[int], model: CostModel) -> float:
        lengths = [self.responses[i] for i in sequences]
        if self.shared:
            return model.segment(self.prompt_tokens, lengths, self.frames)
        return sum(model.segment(self.prompt_tokens, [n], self.frames) for n in lengths)

    def segments(self, sequences: Sequence[int]) -> list[Segment]:
        if self.shared:
            return [Segment(self.index, tuple(sequences))]
        return [Segment(self.index, (i,)) for i in sequences]


_Chunk = tuple[_Group, tuple[int, ...]]
"""Responses of a group that stay together."""


def plan_packs(
    batch: TrainBatch,
    *,
    ranks: int,
    tokens_per_pack: int,
    cost: CostModel | None = None,
    share_prefix: bool = True,
) -> PackPlan:
    """Distribute every sequence of a batch, each exactly once.

    Args:
        ranks: data-parallel ranks; each gets the same number of packs in every update (zero-weight fillers make up).
        tokens_per_pack: of prompts and responses; a shared prompt counts once. No pack exceeds it, but the collator may
            round its rows up (`dapo.model.linear.rounded_rows`): by up to 63 where the limit is not a multiple of 64.
        share_prefix: store a prompt once for all its responses in a pack. Even of one token: a response with a
            copy of the prompt to itself goes through the same attention kernels, and takes as long.

    Raises:
        DataError: a prompt with one of its responses is longer than `tokens_per_pack`.
    """
    model = cost or CostModel()
    groups = [_measure(index, group, share_prefix) for index, group in enumerate(batch.groups)]
    for group, measured in zip(batch.groups, groups, strict=True):
        longest = max(measured.responses, default=0)
        if measured.prompt_tokens + longest > tokens_per_pack:
            raise DataError(
                f"prompt {group.prompt.id} ({measured.prompt_tokens} tokens) with its longest response ({longest}) has "
                f"{measured.prompt_tokens + longest} tokens; a pack holds batch.tokens_per_pack={tokens_per_pack}. "
                "Raise it, or lower data.max_prompt_tokens or batch.max_response_tokens"
            )
    return PackPlan(tuple(_plan_update([groups[i] for i in u], ranks, tokens_per_pack, model) for u in batch.updates))


def _measure(index: int, group: TrainGroup, share_prefix: bool) -> _Group:
    prompt = len(group.prompt.token_ids)
    responses = tuple(len(s.response_ids) for s in group.sequences)
    frames = tuple(h * w for t, h, w in group.prompt.image_grids for _ in range(t))
    return _Group(index, prompt, responses, frames, share_prefix and len(responses) > 1)


def _plan_update(groups: list[_Group], ranks: int, limit: int, model: CostModel) -> tuple[tuple[Pack, ...], ...]:
    """The cheapest of a few plans, in lockstep time: whole groups, or groups split ever finer to even out the ranks."""
    load = sum(g.cost(range(len(g.responses)), model) for g in groups) / ranks
    caps = [math.inf] + [load * share for share in _FINER if ranks > 1]
    best: tuple[float, list[list[_Chunk]]] | None = None
    tried: list[_Chunk] = []
    for cap in caps:
        chunks = [(g, part) for g in groups for part in _split(g, limit, cap, model)]
        if chunks == tried:
            continue
        tried = chunks
        packs = _fill(chunks, ranks, limit, model)
        costs = [_cost(pack, model) for pack in packs]
        time = sum(costs[::ranks]) + model.per_pack * len(packs) / ranks
        if best is None or time < best[0]:
            best = time, packs
    return _deal(best[1] if best else [], ranks)


def _split(group: _Group, limit: int, cap: float, model: CostModel) -> list[tuple[int, ...]]:
    """Responses that stay together: as few parts as the limit and the cost cap allow."""
    every = tuple(range(len(group.responses)))
    if not group.shared:
        return [(i,) for i in every]
    wanted = min(len(every), math.ceil(group.cost(every, model) / cap)) if math.isfinite(cap) else 1
    costs = [model.segment(group.prompt_tokens, [n], ()) for n in group.responses]
    parts = fill_bins(group.responses, costs, limit - group.prompt_tokens, at_least=max(1, wanted))
    return [tuple(sorted(part)) for part in parts if part]


def _fill(chunks: list[_Chunk], ranks: int, limit: int, model: CostModel) -> list[list[_Chunk]]:
    """Chunks into a multiple of `ranks` packs, most expensive first; parts of a group that meet are joined."""
    tokens = [group.tokens(part) for group, part in chunks]
    costs = [group.cost(part, model) for group, part in chunks]
    packs = []
    for members in fill_bins(tokens, costs, limit, multiple_of=ranks):
        joined: dict[int, list[int]] = defaultdict(list)
        for i in members:
            joined[chunks[i][0].index].extend(chunks[i][1])
        by_index = {chunks[i][0].index: chunks[i][0] for i in members}
        packs.append([(by_index[index], tuple(sorted(joined[index]))) for index in sorted(joined)])
    return sorted(packs, key=lambda pack: -_cost(pack, model))


def _cost(pack: list[_Chunk], model: CostModel) -> float:
    return sum(group.cost(part, model) for group, part in pack)


def _deal(packs: list[list[_Chunk]], ranks: int) -> tuple[tuple[Pack, ...], ...]:
    """Sorted packs to ranks, a row at a time, there and back, so that rows and ranks are even."""
    hands: list[list[Pack]] = [[] for _ in range(ranks)]
    for row, start in enumerate(range(0, len(packs), ranks)):
        order = range(ranks) if row % 2 == 0 else range(ranks - 1, -1, -1)
        for rank, pack in zip(order, packs[start : start + ranks], strict=True):
            segments = tuple(segment for group, part in pack for segment in group.segments(part))
            hands[rank].append(Pack(segments, sum(group.tokens(part) for group, part in pack)))
    return tuple(tuple(hand) for hand in hands)
