"""The objective of one pack by hand, and what it reports."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dapo.algo.aggregate import token_weights
from dapo.algo.objective import TokenBatch, Totals, merge_sums, policy_objective, reduce_metrics
from dapo.config.algorithm import AlgorithmConfig, CorrectionConfig, KlConfig

LOG = [math.log(r) for r in (1.5, 1.0, 0.5, 1.0)]


def two_responses() -> TokenBatch:
    """A right response of three tokens (ratios 1.5, 1, 0.5) and a wrong one of one token (ratio 1)."""
    old = torch.full((4,), math.log(0.25), dtype=torch.float64)
    return TokenBatch(
        logprobs=(old + torch.tensor(LOG, dtype=torch.float64)).requires_grad_(),
        old_logprobs=old,
        rollout_logprobs=old - 0.1,
        advantages=torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64),
        sequence_ids=torch.tensor([0, 0, 0, 1]),
        trained=torch.tensor([True, True]),
        entropy=torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
    )


# Token losses: -1.28 (clipped), -1, -0.5, +1.
@pytest.mark.parametrize(
    ("aggregation", "loss"),
    [
        ("token-mean", -1.78 / 4),
        ("seq-mean-token-sum", (-2.78 + 1) / 2),
        ("seq-mean-token-mean", (-2.78 / 3 + 1) / 2),
        ("seq-mean-token-sum-norm", (-2.78 + 1) / 2 / 8),
        ("token-sum", -1.78),
    ],
)
def test_every_aggregation_of_the_same_token_losses(aggregation: str, loss: float) -> None:
    config = AlgorithmConfig(aggregation=aggregation)  # type: ignore[arg-type]
    result = policy_objective(two_responses(), config, Totals(tokens=4, sequences=2, max_response_tokens=8))
    assert result.loss.item() == pytest.approx(loss)


def test_tokens_of_an_untrained_sequence_weigh_nothing() -> None:
    trained = torch.tensor([True, False])
    weights = token_weights("token-sum", torch.tensor([0, 1, 0]), trained, Totals(2, 1, 8))
    assert weights.tolist() == [1.0, 0.0, 1.0]


def test_what_was_not_clipped_has_no_clipped_probability() -> None:
    batch = two_responses()
    sums = policy_objective(
        replace(batch, old_logprobs=batch.logprobs.detach()), AlgorithmConfig(), Totals(4, 2, 8)
    ).sums
    assert "clipped_probability" not in reduce_metrics(sums)


def test_a_pack_counts_against_the_whole_update() -> None:
    result = policy_objective(two_responses(), AlgorithmConfig(), Totals(tokens=40, sequences=9, max_response_tokens=8))
    assert result.loss.item() == pytest.approx(-1.78 / 40)


def test_the_metrics_of_an_update() -> None:
    metrics = reduce_metrics(policy_objective(two_responses(), AlgorithmConfig(), Totals(4, 2, 8)).sums)
    assert metrics["clip_high"] == 0.25
    assert metrics["clip_low"] == metrics["clip_dual"] == metrics["empty_update"] == 0.0
    assert metrics["clipped_probability"] == pytest.approx(0.375)
    assert metrics["entropy"] == pytest.approx(2.5)
    assert metrics["approx_kl"] == pytest.approx(-sum(LOG) / 4)
    assert metrics["gap_mean"] == pytest.approx(0.1)
    assert 0.1 <= metrics["gap_p99"] <= 0.126
    assert metrics["gap_ess"] == pytest.approx(1.0)
    assert metrics["max_ratio_error"] == pytest.approx(0.5)
    assert metrics["tokens"] == 4
    assert metrics["loss"] == metrics["policy_loss"] == pytest.approx(-1.78 / 4)


def test_the_engine_gap_reweighs_the_policy_loss_alone() -> None:
    config = AlgorithmConfig(correction=CorrectionConfig(kind="truncate", high=2.0), entropy_coef=0.5)
    batch = two_responses()
    result = policy_objective(batch, config, Totals(4, 2, 8))
    assert result.loss.item() == pytest.approx(math.exp(0.1) * -1.78 / 4 - 0.5 * 2.5)
    assert reduce_metrics(result.sums)["correction"] == pytest.approx(math.exp(0.1))


def test_kl_in_the_loss_is_added_with_its_coefficient() -> None:
    config = AlgorithmConfig(kl=KlConfig(loss_coef=0.1, kind="k2"))
    batch = two_responses()
    result = policy_objective(replace(batch, ref_logprobs=batch.logprobs.detach() - 2.0), config, Totals(4, 2, 8))
    assert result.loss.item() == pytest.approx(-1.78 / 4 + 0.1 * 2.0)
    assert reduce_metrics(result.sums)["kl_loss"] == pytest.approx(2.0)


def test_overlong_filtering_leaves_a_response_out_of_loss_and_denominator() -> None:
    batch = replace(two_responses(), trained=torch.tensor([False, True]))
    totals = Totals.of([3, 1], [False, True], max_response_tokens=8)
    assert totals == Totals(tokens=1, sequences=1, max_response_tokens=8)
    assert policy_objective(batch, AlgorithmConfig(), totals).loss.item() == 1.0


def test_an_update_without_a_token_is_counted_and_costs_nothing() -> None:
    batch = replace(two_responses(), trained=torch.tensor([False, False]))
    sums = policy_objective(batch, AlgorithmConfig(), Totals.of([3, 1], [False, False], 8)).sums
    metrics = reduce_metrics(merge_sums([sums, sums]))
    assert metrics["empty_update"] == 1.0
    assert metrics["loss"] == 0.0
    assert not {"entropy", "gap_mean", "clip_high", "clipped_probability"} & metrics.keys()


def test_missing_inputs_are_named() -> None:
    batch, totals = two_responses(), Totals(4, 2, 8)
    with pytest.raises(AssertionError, match=r"algorithm\.kl\.loss_coef > 0 needs the reference"):
        policy_objective(batch, AlgorithmConfig(kl=KlConfig(loss_coef=0.1)), totals)
    with pytest.raises(AssertionError, match=r"algorithm\.entropy_coef > 0 needs the entropy"):
        policy_objective(replace(batch, entropy=None), AlgorithmConfig(entropy_coef=0.1), totals)
    with pytest.raises(AssertionError, match=r"must all be \[4\]"):
        policy_objective(replace(batch, advantages=torch.zeros(2)), AlgorithmConfig(), totals)
