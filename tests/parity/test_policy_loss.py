"""Topic 01: the objective against the reference, through the same function as the training engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dapo.algo.aggregate import token_weights
from dapo.algo.objective import ObjectiveResult, TokenBatch, Totals, merge_sums, policy_objective, reduce_metrics
from dapo.config.algorithm import AlgorithmConfig, ClipConfig, CorrectionConfig, DapoLossConfig, KlConfig
from tests.parity.cases import METRIC_TOLERANCE, TOLERANCES, Case, assert_matches
from tests.parity.test_kl import OUR_NAME

# Any weight passes: the reference is given its weights, ours are made from log-probabilities.
GIVEN_WEIGHTS = CorrectionConfig(kind="mask", low=1e-8, high=1e8)


def clip_of(case: Case) -> DapoLossConfig:
    given = case.inputs
    return DapoLossConfig(
        clip=ClipConfig(low=given["clip_ratio_low"], high=given["clip_ratio_high"], dual=given["clip_ratio_c"])
    )


def rows(case: Case, logprobs: Tensor, wanted: list[int] | None = None) -> TokenBatch:
    """The valid tokens of some rows of a padded case, flat; gradients flow back to the padded `logprobs`."""
    mask = case.tensor("response_mask").bool()
    wanted = list(range(len(mask))) if wanted is None else wanted
    mask = mask[wanted]
    old = case.tensor("old_log_prob")[wanted][mask]
    rollout = old
    if "rollout_is_weights" in case.inputs:
        rollout = old - case.tensor("rollout_is_weights")[wanted][mask].log()
    return TokenBatch(
        logprobs=logprobs[wanted][mask],
        old_logprobs=old,
        rollout_logprobs=rollout,
        advantages=case.tensor("advantages")[wanted][mask],
        sequence_ids=mask.nonzero()[:, 0],
        trained=torch.ones(len(mask), dtype=torch.bool),
    )


def totals_of(case: Case) -> Totals:
    mask = case.tensor("response_mask").bool()
    scale = case.inputs.get("loss_scale_factor") or mask.shape[1]
    lengths = mask.sum(1).tolist()
    return Totals.of(lengths, [True] * len(lengths), scale)


def objective(case: Case, mode: str, tokens: TokenBatch, totals: Totals) -> ObjectiveResult:
    correction = GIVEN_WEIGHTS if "rollout_is_weights" in case.inputs else CorrectionConfig()
    if mode == "seq-mean-token-sum-norm" and case.release == "snapshot":
        # The snapshot divides the plain sum by F; 0.9.1 and we take the mean over sequences first (Dr. GRPO).
        config = AlgorithmConfig(loss=clip_of(case), aggregation="token-sum", correction=correction)
        result = policy_objective(tokens, config, totals)
        return ObjectiveResult(result.loss / totals.max_response_tokens, result.sums)
    config = AlgorithmConfig(loss=clip_of(case), aggregation=mode, correction=correction)
    return policy_objective(tokens, config, totals)


def metrics_of(result: ObjectiveResult) -> dict[str, float]:
    metrics = reduce_metrics(result.sums)
    return {
        "pg_clipfrac": metrics.get("clip_high", 0.0) + metrics.get("clip_low", 0.0),
        "pg_clipfrac_lower": metrics.get("clip_dual", 0.0),
        "ppo_kl": metrics.get("approx_kl", 0.0),
    }


def metric_tolerance(case: Case) -> tuple[float, float]:
    return max(METRIC_TOLERANCE, TOLERANCES[case.dtype])


@pytest.mark.golden("01_policy_loss")
def test_loss_and_gradient_agree_in_every_mode(case: Case) -> None:
    by_mode, metrics = {}, {}
    for mode in case.out["by_mode"]:
        logprobs = case.tensor("log_prob").requires_grad_()
        result = objective(case, mode, rows(case, logprobs), totals_of(case))
        result.loss.backward()
        assert logprobs.grad is not None
        assert torch.isfinite(result.loss)
        assert torch.isfinite(logprobs.grad).all()
        by_mode[mode] = {"loss": result.loss.item(), "grad_log_prob": logprobs.grad}
        metrics = metrics_of(result)
    if case.expected is None:
        return
    assert_matches({"by_mode": by_mode}, {"by_mode": case.expected.get("by_mode", {})}, case.tolerance())
    expected_metrics = {name: case.expected[name] for name in metrics if name in case.expected}
    assert_matches(metrics, expected_metrics, metric_tolerance(case))


@pytest.mark.golden("01_policy_loss_dp")
def test_a_mini_batch_split_over_ranks_and_micro_batches_agrees(case: Case) -> None:
    given = case.inputs
    layout: list[list[list[int]]] = given["layout"]
    width = len(given["response_mask"][0])
    for mode, expected in case.out["by_mode"].items():
        whole = case.tensor("log_prob").requires_grad_()
        single = objective(case, mode, rows(case, whole), totals_of(case))
        single.loss.backward()
        handed = Totals(given["batch_num_tokens"], given["global_batch_size"], width)
        split, losses = split_over(case, mode, layout, handed)
        # Our sum over everything is the update's loss. The reference multiplies by the ranks and averages over them;
        # its snapshot forgets the first half for one mode, so that there the number of ranks changes the loss.
        ranks = given["dp_size"]
        factor = 1 if mode == "seq-mean-token-sum-norm" and case.release == "snapshot" else ranks
        actual: dict[str, Any] = {
            "single_batch_loss": single.loss.item(),
            "single_batch_grad": whole.grad,
            "micro_loss": [[loss * factor for loss in rank] for rank in losses],
            "combined_loss": sum(map(sum, losses)) * factor / ranks,
            "combined_grad": split * factor / ranks,
        }
        if case.quirk is None or case.ideal is not None:
            wanted = expected if case.ideal is None else case.ideal["by_mode"].get(mode, {})
            # `legacy_*` is the older path with local denominators, which is why there are global ones.
            wanted = {name: value for name, value in wanted.items() if name in actual}
            assert_matches(actual, wanted, case.tolerance(), mode)
        own, own_losses = split_over(case, mode, layout, totals_of(case))
        assert whole.grad is not None
        torch.testing.assert_close(own, whole.grad, rtol=0, atol=1e-12)
        assert math.isclose(sum(map(sum, own_losses)), single.loss.item(), rel_tol=1e-12, abs_tol=1e-12)


def split_over(
    case: Case, mode: str, layout: list[list[list[int]]], totals: Totals
) -> tuple[Tensor, list[list[float]]]:
    """Gradient and losses of a mini-batch trained in pieces, with the same totals for every piece."""
    logprobs = case.tensor("log_prob").requires_grad_()
    losses, sums = [], []
    for rank in layout:
        losses.append([0.0] * len(rank))
        for index, micro in enumerate(rank):
            result = objective(case, mode, rows(case, logprobs, micro), totals)
            result.loss.backward()
            losses[-1][index] = result.loss.item()
            sums.append(result.sums)
    assert merge_sums(sums)["tokens"] == case.tensor("response_mask").sum()
    assert logprobs.grad is not None
    return logprobs.grad, losses


@pytest.mark.golden("01_ppo_total_loss")
def test_total_loss_with_entropy_and_kl_agrees(case: Case) -> None:
    given = case.inputs
    mask = case.tensor("response_mask").bool()
    logprobs = case.tensor("log_prob").requires_grad_()
    entropy = case.tensor("entropy").requires_grad_()
    flat = rows(case, logprobs)
    tokens = TokenBatch(
        logprobs=flat.logprobs,
        old_logprobs=flat.old_logprobs,
        rollout_logprobs=flat.rollout_logprobs,
        advantages=flat.advantages,
        sequence_ids=flat.sequence_ids,
        trained=flat.trained,
        ref_logprobs=case.tensor("ref_log_prob")[mask],
        entropy=entropy[mask],
    )
    coef = given["kl_loss_coef"]
    config = AlgorithmConfig(
        loss=clip_of(case),
        aggregation=given["loss_agg_mode"],
        entropy_coef=given["entropy_coeff"],
        kl=KlConfig(loss_coef=coef, kind=OUR_NAME[given["kl_loss_type"]]),
    )
    totals = Totals(given["batch_num_tokens"], given["global_batch_size"], mask.shape[1])
    result = policy_objective(tokens, config, totals)
    # The reference scales by the ranks before it averages over them.
    (result.loss * given["dp_size"]).backward()
    if case.expected is None:
        return
    sums = {name: result.sums[name].item() * given["dp_size"] for name in ("loss", "policy_loss", "kl_loss")}
    weights = token_weights(config.aggregation, tokens.sequence_ids, tokens.trained, totals, entropy.dtype)
    metrics = {f"actor/{name}": value for name, value in metrics_of(result).items()}
    metrics["actor/pg_loss"] = sums["policy_loss"]
    metrics["actor/entropy_loss"] = (weights * entropy[mask]).sum().item() * given["dp_size"]
    metrics |= {"kl_loss": sums["kl_loss"], "kl_coef": coef}
    actual = {"loss": sums["loss"], "grad_log_prob": logprobs.grad, "grad_entropy": entropy.grad}
    if entropy.grad is None:
        actual["grad_entropy"] = torch.zeros_like(entropy)
    expected = dict(case.expected)
    assert_matches(metrics, expected.pop("metrics", {}), metric_tolerance(case))
    assert_matches(actual, expected, case.tolerance())
