"""Engine against trainer: weights and gap by hand."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dapo.algo.correction import effective_sample_share, gap_histogram, histogram_quantile, importance_weights
from dapo.config.algorithm import CorrectionConfig

# Per token the trainer finds these tokens 4, 1/4, 1.5 and 0.9 times as likely as the engine did.
FACTORS = [4.0, 0.25, 1.5, 0.9]
IDS = torch.tensor([0, 0, 1, 2])


def weights(**config: Any) -> list[float]:
    old = torch.tensor([math.log(f) for f in FACTORS], dtype=torch.float64, requires_grad=True)
    result = importance_weights(old, torch.zeros(4, dtype=torch.float64), IDS, 3, CorrectionConfig(**config))
    assert not result.requires_grad
    values: list[float] = result.tolist()
    return values


def test_truncation_caps_each_token() -> None:
    assert weights(kind="truncate", high=2.0) == pytest.approx([2.0, 0.25, 1.5, 0.9])


def test_a_mask_drops_what_lies_outside() -> None:
    assert weights(kind="mask", low=0.5, high=2.0) == pytest.approx([0.0, 0.0, 1.5, 0.9])


def test_a_sequence_weighs_by_the_product_of_its_tokens() -> None:
    assert weights(kind="truncate", level="sequence", high=1.2) == pytest.approx([1.0, 1.0, 1.2, 0.9])
    assert weights(kind="mask", level="sequence", low=0.95, high=1.2) == pytest.approx([1.0, 1.0, 0.0, 0.0])


def test_off_leaves_every_token_as_it_is() -> None:
    assert weights(kind="off") == [1.0] * 4


def test_one_heavy_weight_of_four_leaves_a_quarter_of_the_sample() -> None:
    assert effective_sample_share(4.0, 16.0, 4) == 0.25


def gap_quantile(gaps: Tensor, share: float) -> float:
    valid = torch.ones(len(gaps), dtype=torch.bool)
    return histogram_quantile(gap_histogram(gaps, torch.zeros_like(gaps), valid), share)


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_the_histogram_finds_the_99th_percentile_to_a_quarter(scale: float) -> None:
    gaps = scale * torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = float(gaps.abs().quantile(0.99))
    assert exact <= gap_quantile(gaps, 0.99) <= 1.26 * exact


def test_histograms_of_two_ranks_add_up() -> None:
    gaps = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    zeros, valid = torch.zeros_like(gaps), torch.ones(1000, dtype=torch.bool)
    halves = [gap_histogram(gaps[a:b], zeros[a:b], valid[a:b]) for a, b in ((0, 300), (300, 1000))]
    assert torch.equal(halves[0] + halves[1], gap_histogram(gaps, zeros, valid))


def test_a_gap_of_nothing_or_of_no_tokens_is_zero() -> None:
    assert gap_quantile(torch.zeros(10), 0.99) == 0.0
    assert gap_quantile(torch.zeros(0), 0.99) == 0.0


def test_a_gap_that_is_not_a_number_counts_as_the_largest() -> None:
    assert gap_quantile(torch.tensor([math.nan, math.inf, 0.1]), 0.99) == pytest.approx(10.0)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_a_token_that_one_side_calls_impossible_has_no_weight(kind: Literal["truncate", "mask"]) -> None:
    old, rollout = torch.tensor([-1.0, math.nan, -math.inf, -1.0]), torch.tensor([-math.inf, -1.0, -1.0, -1.0])
    result = importance_weights(old, rollout, torch.arange(4), 4, CorrectionConfig(kind=kind))
    assert result.tolist() == [0.0, 0.0, 0.0, 1.0]
