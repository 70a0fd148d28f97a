"""Topic 04: log-probabilities and entropy against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dapo.algo.entropy import logprobs_and_entropy
from tests.parity.cases import FLOAT32_ENTROPY_TOLERANCE, Case, assert_matches, to_tensor


@pytest.mark.golden("04_entropy_logprob")
def test_logprobs_entropy_and_gradients_agree(case: Case) -> None:
    actual = {str(t): results(case, t) for t in case.inputs["temperatures"]}
    if case.expected is None:
        return
    for temperature, values in case.expected["by_temperature"].items():
        ours, expected = actual[temperature], dict(values)
        chunked = expected.pop("entropy_chunked_f32", None)
        if chunked is not None:
            # The reference's float32 variant cancels where logits share a large offset: where the case holds the
            # float64 entropy, that is what our float32 entropy is held to.
            truth = expected["entropy"] if case.dtype == "float64" else chunked
            tolerance = max(FLOAT32_ENTROPY_TOLERANCE, case.tolerance())
            assert_matches(ours["entropy_chunked_f32"], truth, tolerance, "entropy_chunked_f32")
        entropies = {name: value for name, value in expected.items() if "entropy" in name}
        assert_matches(ours, entropies, FLOAT32_ENTROPY_TOLERANCE if case.dtype == "float32" else case.tolerance())
        assert_matches(ours, {k: v for k, v in expected.items() if k not in entropies}, case.tolerance())


def results(case: Case, temperature: float) -> dict[str, Any]:
    labels = to_tensor(case.inputs["labels"], torch.int64)
    mask = to_tensor(case.inputs.get("response_mask", [[1] * labels.shape[-1]] * len(labels)), torch.bool)
    logprobs, entropy = logprobs_and_entropy(case.tensor("logits"), labels, temperature)
    assert torch.isfinite(entropy).all()
    return {
        "log_prob": logprobs,
        "entropy": entropy,
        "entropy_chunked_f32": logprobs_and_entropy(case.tensor("logits").float(), labels, temperature)[1],
        "entropy_loss_token_mean": entropy[mask].mean(),
        "dlogprob_sum_dscaled_logits": gradient(case, labels, temperature, 0),
        "dentropy_sum_dscaled_logits": gradient(case, labels, temperature, 1),
    }


def gradient(case: Case, labels: Tensor, temperature: float, which: int) -> Tensor:
    """Of the sum of log-probabilities (0) or entropies (1) with respect to logits / temperature."""
    scaled = (case.tensor("logits") / temperature).requires_grad_()
    logprobs_and_entropy(scaled, labels)[which].sum().backward()
    assert scaled.grad is not None
    assert torch.isfinite(scaled.grad).all()
    return scaled.grad
