"""Random streams and distributions, by hand and in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dapo.rollout.sampling import Sampler, request_seed, uniforms
from dapo.types import SamplingParams

CPU = torch.device("cpu")


def params(**changes: object) -> SamplingParams:
    values = {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": 1,
        "stop_token_ids": (),
        "banned_token_ids": (),
    }
    return SamplingParams(**(values | changes))  # type: ignore[arg-type]


def sweep(logits: torch.Tensor, count: int = 4000, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawn ids and log-probs for evenly spaced uniform numbers: frequencies are probabilities, nearly exactly."""
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return Sampler(params(**changes), logits.shape[-1], CPU)(logits.expand(count, -1), even)


def test_splitmix_gives_its_published_numbers() -> None:
    # First outputs of SplitMix64 from state 0, by its authors' reference implementation.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [(value >> 11) * 2.0**-53 for value in first]
    # A seed of 0 is mixed to the key 0, which is that state.
    assert uniforms([0], 0, 3)[0].tolist() == expected


def test_a_stream_can_be_read_from_any_position() -> None:
    whole = uniforms([1, 2**62 - 1], 0, 100)
    assert np.array_equal(whole[:, 60:], uniforms([1, 2**62 - 1], 60, 40))
    assert np.array_equal(whole[1:], uniforms([2**62 - 1], 0, 100))


def test_streams_are_uniform_and_unrelated() -> None:
    drawn = uniforms([request_seed(5, f"train/{i}") for i in range(400)], 0, 250)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * (2 * 99) ** 0.5
    neighbours = np.corrcoef(drawn)[np.triu_indices(400, 1)]
    assert np.abs(neighbours).max() < 6 / 250**0.5
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 5 / 1e5**0.5


def test_neighbouring_seeds_are_unrelated() -> None:
    # Samples of one prompt have seeds s, s + 1, ...
    drawn = uniforms(list(range(1000, 1200)), 0, 500)
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(200, 1)]).max() < 6 / 500**0.5


def test_request_seeds_name_seed_and_prompt() -> None:
    seeds = {request_seed(s, p) for s in (0, 1, 11) for p in ("1/train", "train/1", "train/11")}
    seeds |= {request_seed(0, "train/1", written) for written in (0, 1, 2)}
    assert len(seeds) == 11
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_frequencies_and_logprobs_at_a_temperature() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0])
    ids, logprobs = sweep(logits, temperature=0.5)
    expected = torch.log_softmax(logits.double() / 0.5, -1)
    assert torch.allclose(logprobs.double(), expected[ids], atol=1e-6)
    assert torch.allclose(torch.bincount(ids, minlength=4) / 4000, expected.exp().float(), atol=3e-4)


def test_banned_ids_are_never_drawn_and_leave_the_softmax() -> None:
    logits = torch.tensor([9.0, 0.0, 0.5, 9.0])
    ids, logprobs = sweep(logits, banned_token_ids=(0, 3, 77))
    assert set(ids.tolist()) == {1, 2}
    expected = torch.log_softmax(torch.tensor([0.0, 0.5], dtype=torch.float64), -1)
    assert torch.allclose(logprobs.double(), expected[ids - 1], atol=1e-6)


def test_the_edges_of_the_unit_interval_hit_possible_ids_only() -> None:
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    sampler = Sampler(params(banned_token_ids=(0, 4)), 5, CPU)
    logits = torch.tensor([[5.0, 0.0, 1.0, -200.0, 5.0]]).expand(2, -1)
    assert sampler(logits, edges)[0].tolist() == [1, 2]  # 3 has a probability that float32 rounds to zero


def test_temperature_zero_takes_the_best_allowed_id() -> None:
    ids, logprobs = sweep(torch.tensor([9.0, 0.0, 3.0]), count=5, temperature=0.0, banned_token_ids=(0,))
    assert ids.tolist() == [2] * 5
    assert logprobs[0].item() == pytest.approx(-np.log1p(np.exp(-3.0)), abs=1e-6)


def test_top_k_renormalises_what_it_keeps() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0])
    ids, logprobs = sweep(logits, top_k=2)
    expected = {1: -np.log1p(np.exp(-1.0)), 2: -np.log1p(np.exp(1.0))}
    assert set(ids.tolist()) == {1, 2}
    for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
        assert logprob == pytest.approx(expected[token], abs=1e-6)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    # 0.4 + 0.3 = 0.7 falls short of 0.75, so the third (0.2) belongs to the set.
    assert set(sweep(probabilities.log(), top_p=0.75)[0].tolist()) == {1, 2, 3}
    ids, logprobs = sweep(probabilities.log(), top_p=0.65)
    assert set(ids.tolist()) == {1, 3}
    assert logprobs[ids == 1][0].item() == pytest.approx(np.log(0.4 / 0.7), abs=1e-6)
    assert set(sweep(probabilities.log(), top_p=1e-6)[0].tolist()) == {1}


def test_top_p_counts_mass_within_top_k() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    # Of the two kept by top-k the first has 4/7 = 0.571 of the mass.
    assert set(sweep(probabilities.log(), top_k=2, top_p=0.55)[0].tolist()) == {0}
    assert set(sweep(probabilities.log(), top_k=2, top_p=0.6)[0].tolist()) == {0, 1}


def test_top_p_of_a_flat_distribution_looks_at_the_whole_vocabulary() -> None:
    ids, logprobs = sweep(torch.zeros(1000) + torch.arange(1000) * 1e-6, top_p=0.5)
    assert ids.min() >= 499
    assert len(set(ids.tolist())) in (500, 501)
    assert logprobs.mean().item() == pytest.approx(-np.log(500), abs=1e-2)


def test_rows_do_not_influence_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 200, generator=generator) * 3
    uniform = torch.rand(50, generator=generator, dtype=torch.float64)
    sampler = Sampler(params(top_p=0.9), 200, CPU)
    together = sampler(logits, uniform)
    for row in range(50):
        alone = sampler(logits[row : row + 1], uniform[row : row + 1])
        assert (alone[0].item(), alone[1].item()) == (together[0][row].item(), together[1][row].item())
