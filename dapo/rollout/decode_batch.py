"""What the transformers engine decodes together, and what its rows have written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dapo.rollout.engine import Begun
from dapo.types import Completion, FinishReason, Prompt, SamplingParams

_ROW_QUANTUM = 16
"""Batch sizes are multiples of this: oneDNN compiles a kernel per size (0.3 to 2 ms each), and keeps it."""
_COMPACT_BELOW = 7 / 8
"""Finished rows are dropped when at most this share of the batch still writes."""


@dataclass(frozen=True, slots=True)
class Job:
    """Samples of one prompt that are decoded from one prefill."""

    index: int
    """Of the prompt."""
    prompt: Prompt
    """With what was written of the response before, where it goes on."""
    samples: tuple[int, ...]
    limit: int
    """Tokens each of them may still write."""
    begun: Completion | None = None

    @property
    def written(self) -> int:
        """Tokens of the response before this round."""
        return len(self.begun.token_ids) if self.begun else 0


def make_jobs(prompts: Sequence[Prompt], params: SamplingParams, begun: Begun) -> list[Job]:
    """One job for all samples of a new prompt; one for each sample that is still wanted of a prompt asked before."""
    jobs = []
    for index, prompt in enumerate(prompts):
        before = begun[index] if begun else [None] * params.n
        if not any(before):
            jobs.append(Job(index, prompt, tuple(range(params.n)), params.max_tokens))
            continue
        for sample, completion in enumerate(before):
            if completion is None:
                jobs.append(Job(index, prompt, (sample,), params.max_tokens))
            elif not completion.finished:
                longer = replace(prompt, token_ids=prompt.token_ids + completion.token_ids)
                left = params.max_tokens - len(completion.token_ids)
                jobs.append(Job(index, longer, (sample,), left, completion))
    return jobs


Response = tuple[int, list[int], list[float], FinishReason]


class DecodeBatch:
    """What the rows of a wave have written, and which of them still write."""

    def __init__(self, limits: Tensor, stop: Tensor) -> None:
        rows, longest, device = len(limits), int(limits.max()), limits.device
        self.rows = torch.arange(rows, device=device)
        """Number in the wave of each row of the batch."""
        self.stop = stop
        self.limits = limits
        """[rows of the wave] tokens each may write."""
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.taken = torch.zeros(rows, dtype=torch.bool)
        self.ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, longest, device=device)
        self.length = 0
        # Asking an accelerator whether rows have finished stops its queue.
        self.look_every = 1 if device.type == "cpu" else 8

    def add(self, index: int, ids: Tensor, logprobs: Tensor) -> int:
        """Note one token per row; returns how many rows still write (where it is not looked: as many as there are)."""
        self.ids[self.rows, index], self.logprobs[self.rows, index] = ids, logprobs
        self.length = index + 1
        self.done |= self.stop[ids] | (self.limits[self.rows] <= self.length)
        if index % self.look_every:
            return len(self.rows)
        return len(self.rows) - int(self.done.sum())

    def compact(self, writing: int) -> Tensor | None:
        """Rows to keep, if it is worth it: those that write, and as many finished ones as fill the quantum."""
        size = -(-writing // _ROW_QUANTUM) * _ROW_QUANTUM
        if size > _COMPACT_BELOW * len(self.rows):
            return None
        order = torch.argsort(self.done.to(torch.uint8), stable=True)
        return order[:size].sort().values

    def keep(self, rows: Tensor) -> None:
        self.rows, self.done = self.rows[rows], self.done[rows]

    def take_done(self) -> list[Response]:
        """Finished rows not taken yet."""
        return self._take(self.rows[self.done])

    def take_all(self) -> list[Response]:
        """Everything left."""
        return self._take(self.rows)

    def _take(self, rows: Tensor) -> list[Response]:
        rows = rows.cpu()
        rows = rows[~self.taken[rows]]
        self.taken[rows] = True
        there = rows.to(self.ids.device)
        stopped = self.stop[self.ids[there, : self.length]]
        # argmax gives the first of equal values: the first stop token. A finished row writes on until it is dropped.
        ends = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, self.ids.shape[1] + 1).tolist()
        ids, logprobs = self.ids[there, : self.length].tolist(), self.logprobs[there, : self.length].tolist()
        out = []
        for i, (row, end, limit) in enumerate(zip(rows.tolist(), ends, self.limits[there].tolist(), strict=True)):
            length = min(end, limit, self.length)
            if end <= limit:
                reason = FinishReason.STOP
            else:
                reason = FinishReason.LENGTH if length == limit else FinishReason.UNFINISHED
            out.append((row, ids[i][:length], logprobs[i][:length], reason))
        return out
