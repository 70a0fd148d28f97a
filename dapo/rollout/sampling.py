"""From logits to tokens: exact log-probabilities, and random numbers that belong to a request and not to its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dapo.types import SamplingParams

# SplitMix64 (Steele, Lea, Flood 2014): a counter goes in, 64 well-mixed bits come out, in any order.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

_FIRST_LOOK = 64
"""Candidates looked at before a whole vocabulary is sorted for top-p; peaked distributions need no more."""


def request_seed(seed: int, prompt_id: str, written: int = 0) -> int:
    """62 bits that name one prompt's requests in one round; sample i takes the seed after it plus i.

    Args:
        written: tokens of the response that goes on; it may have been begun with the same `seed`, when an engine dies
            after another one had given back what it left unfinished.
    """
    name = f"{seed}\0{prompt_id}" + (f"\0{written}" if written else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def uniforms(seeds: Sequence[int], start: int, count: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) of each request at positions start .. start + count - 1.

    Args:
        seeds: one 62-bit seed per request.

    Returns:
        float64 [requests, count]; entry (r, i) depends on seeds[r] and start + i alone.
    """
    keys = _mixed(np.asarray(seeds, dtype=np.uint64)[:, None] * _GAMMA)
    positions = np.arange(start + 1, start + count + 1, dtype=np.uint64)[None, :] * _GAMMA
    bits = _mixed(keys + positions) >> np.uint64(11)
    return np.ldexp(bits.astype(np.float64), -53)


def _mixed(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))


class Sampler:
    """Samples one token per row by inverse transform: one uniform number per token.

    The distribution is softmax(logits / temperature) without the banned ids, cut to top-k, then to top-p, and
    renormalised; log-probabilities are of that distribution. Temperature 0 takes the most likely allowed id; its
    log-probability is of the distribution at temperature 1.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device) -> None:
        self.temperature = params.temperature
        self.top_p = params.top_p
        self.top_k = params.top_k if 0 < params.top_k < vocab_size else 0
        self.penalty: Tensor | None = None
        banned = [i for i in params.banned_token_ids if 0 <= i < vocab_size]
        if banned:
            self.penalty = torch.zeros(vocab_size, device=device)
            self.penalty[banned] = -torch.inf

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Args: logits [R, V] in any float type, uniform [R] float64. Returns: ids [R] int64, log-probs [R] float32."""
        logits = logits.float()
        if self.temperature not in (0.0, 1.0):
            logits = logits / self.temperature
        if self.penalty is not None:
            logits = logits + self.penalty
        logprobs = torch.log_softmax(logits, dim=-1)
        if self.temperature == 0.0:
            best = logprobs.max(dim=-1)
            return best.indices, best.values
        if not self.top_k and self.top_p >= 1.0:
            return _draw(logprobs, uniform)
        kept, ids = self._truncated(logprobs)
        columns, values = _draw(kept, uniform)
        return ids.gather(1, columns[:, None])[:, 0], values

    def _truncated(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely ids of each row that top-k and top-p keep: renormalised log-probs and ids, [R, K]."""
        limit = self.top_k or logprobs.shape[1]
        size = limit if self.top_k else min(limit, _FIRST_LOOK)
        while True:
            values, ids = logprobs.topk(size, dim=-1)
            if self.top_k:
                values = torch.log_softmax(values, dim=-1)  # top-p's mass is counted within what top-k left
            mass = values.exp().cumsum(dim=-1, dtype=torch.float64)
            if size == limit or bool((mass[:, -1] >= self.top_p).all()):
                break
            size = limit
        # An id stays while the mass before it is short of top-p: the first one always does.
        before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
        return torch.log_softmax(values.masked_fill(before >= self.top_p, -torch.inf), dim=-1), ids


def _draw(logprobs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    # In float64 an id of probability zero has no width at all, so no uniform number can hit it.
    mass = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * mass[:, -1:]
    ids = torch.searchsorted(mass, target, right=True).clamp_(max=logprobs.shape[1] - 1)
    return ids[:, 0], logprobs.gather(1, ids)[:, 0]
