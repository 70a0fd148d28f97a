"""Laws of the objective: what must hold for every update, whatever its numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dapo.algo.objective import TokenBatch, Totals, merge_sums, policy_objective, reduce_metrics
from dapo.config.algorithm import AlgorithmConfig, ClipCovLossConfig, CorrectionConfig, KlConfig, KlCovLossConfig
from tests.laws.updates import LOSSES, MAX_RESPONSE, MODES, configs, gradients, pick, totals_of, update, updates

EVERY_LOSS = (*LOSSES, ClipCovLossConfig(cov_low=0.0, share=0.5), KlCovLossConfig(share=0.5))


@given(updates(), configs(), st.data())
def test_every_split_over_ranks_and_packs_gives_the_same_gradient(
    batch: TokenBatch, config: AlgorithmConfig, data: st.DataObject
) -> None:
    sequences = list(range(batch.trained.numel()))
    packs: list[list[int]] = [[] for _ in range(data.draw(st.integers(1, 5)))]
    for sequence in data.draw(st.permutations(sequences)):
        packs[data.draw(st.integers(0, len(packs) - 1))].append(sequence)
    totals = totals_of(batch)
    whole, whole_entropy, whole_sums = gradients(batch, [sequences], config, totals)
    split, split_entropy, split_sums = gradients(batch, packs, config, totals)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split_entropy, whole_entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(split_sums, whole_sums, rtol=1e-12, atol=1e-12)


@settings(max_examples=50)
@given(updates(), st.sampled_from(EVERY_LOSS), st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
def test_what_stands_in_untrained_sequences_never_matters(batch: TokenBatch, loss: object, rubbish: float) -> None:
    config = AlgorithmConfig(
        loss=loss,  # type: ignore[arg-type]
        entropy_coef=0.01,
        kl=KlConfig(loss_coef=0.1),
        correction=CorrectionConfig(kind="truncate", level="sequence"),
    )
    masked = ~batch.trained[batch.sequence_ids]
    # Equal advantages have no covariance: which of the equals pays is then up to rounding.
    assume(config.loss.kind not in ("clip_cov", "kl_cov") or len(batch.advantages[~masked].unique()) > 1)
    spoilt = {
        name: getattr(batch, name).detach().masked_fill(masked, rubbish)
        for name in ("logprobs", "old_logprobs", "rollout_logprobs", "advantages", "ref_logprobs", "entropy")
    }
    spoilt["logprobs"].requires_grad_()
    spoilt["entropy"].requires_grad_()
    totals, everything = totals_of(batch), [list(range(batch.trained.numel()))]
    trained_only = [[s for s in everything[0] if batch.trained[s]]]
    clean, clean_entropy, clean_sums = gradients(batch, trained_only, config, totals)
    dirty, dirty_entropy, dirty_sums = gradients(replace(batch, **spoilt), everything, config, totals)
    torch.testing.assert_close(dirty, clean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dirty_entropy, clean_entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dirty_sums, clean_sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=lambda loss: loss.kind)
@pytest.mark.parametrize("lengths", [[], [0, 0], [3, 2]], ids=str)
def test_no_valid_token_gives_zero_and_is_counted(loss: object, lengths: list[int]) -> None:
    batch = update(lengths, [False] * len(lengths), seed=0)
    config = AlgorithmConfig(loss=loss, entropy_coef=0.1, kl=KlConfig(loss_coef=0.1))  # type: ignore[arg-type]
    for mode in MODES:
        if not (config.loss.kind == "gspo" and mode == "token-sum"):
            result = policy_objective(batch, config.model_copy(update={"aggregation": mode}), totals_of(batch))
            assert result.loss.item() == 0.0
            grads = torch.autograd.grad(result.loss, [batch.logprobs, batch.entropy])  # type: ignore[list-item]
            assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
            metrics = reduce_metrics(merge_sums([result.sums]))
            assert metrics["empty_update"] == 1.0
            assert all(torch.isfinite(torch.tensor(list(metrics.values()))))


@settings(max_examples=50)
@given(updates(), configs())
def test_a_filler_pack_changes_nothing(batch: TokenBatch, config: AlgorithmConfig) -> None:
    everything, totals = list(range(batch.trained.numel())), totals_of(batch)
    filler = replace(batch, trained=torch.zeros_like(batch.trained))
    result = policy_objective(filler, config, totals)
    real = policy_objective(pick(batch, everything), config, totals).sums
    merged = merge_sums([real, result.sums])
    torch.testing.assert_close(merged, real, rtol=0, atol=0)
    assert result.loss.item() == 0.0


@settings(max_examples=50)
@given(updates(), st.sampled_from(MODES), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_ratio_is_exactly_one_on_the_first_update(batch: TokenBatch, mode: str, dtype: torch.dtype) -> None:
    logprobs = batch.logprobs.detach().to(dtype).requires_grad_()
    first = replace(
        batch,
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        rollout_logprobs=batch.rollout_logprobs.to(dtype),
        advantages=batch.advantages.to(dtype),
        ref_logprobs=None,
        entropy=None,
    )
    totals = totals_of(batch)
    result = policy_objective(first, AlgorithmConfig(aggregation=mode), totals)  # type: ignore[arg-type]
    metrics = reduce_metrics(result.sums)
    assert metrics["max_ratio_error"] == 0.0
    assert {metrics.get(name, 0.0) for name in ("clip_high", "clip_low", "clip_dual", "approx_kl")} == {0.0}
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    # With ratio 1 the gradient is that of REINFORCE: -A per token, weighted.
    plain = policy_objective(first, AlgorithmConfig(aggregation=mode, loss={"kind": "cispo"}), totals)  # type: ignore[arg-type]
    assert torch.equal(gradient, torch.autograd.grad(plain.loss, logprobs)[0])


def test_merged_sums_do_not_depend_on_the_order() -> None:
    batch = update([3, 1, 4], [True, True, False], seed=1)
    totals = Totals(4, 2, MAX_RESPONSE)
    parts = [policy_objective(pick(batch, [s]), AlgorithmConfig(), totals).sums for s in range(3)]
    torch.testing.assert_close(merge_sums(parts), merge_sums(reversed(parts)))
    assert list(merge_sums(parts)) == list(parts[0])
