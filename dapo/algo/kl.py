"""KL to the reference policy: estimators per token, as part of the loss or of the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dapo.algo.loss import MAX_LOG_RATIO
from dapo.config.algorithm import KlConfig, KlKind

# One token whose k3 estimate is e^20 would own the mean; the reference limits the estimate to +-10 and so do we.
MAX_K3 = 10.0
# The adaptive controller moves by at most this share of its error per horizon (arXiv 1909.08593, section 2.2).
MAX_KL_ERROR = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KlKind) -> Tensor:
    """Estimate of KL(pi || pi_ref) per sampled token, nats, with gradient; elementwise, any shape.

    With d = log pi - log pi_ref: ``k1`` d; ``k2`` d^2 / 2; ``k3`` exp(-d) - 1 + d with d limited to +-20 and the
    estimate to +-10; ``abs`` |d|. An infinite d counts as +-20; two tokens of probability 0 agree.
    A trailing ``+`` keeps the value and takes the gradient of k2: in expectation that of the KL on on-policy tokens,
    where k1 as a loss has none and k3 a biased one.

    Source: Schulman, "Approximating KL divergence" (2020); gradients: arXiv 2510.01555.
    """
    d = (logprobs - ref_logprobs).nan_to_num(nan=0.0, posinf=MAX_LOG_RATIO, neginf=-MAX_LOG_RATIO)
    if kind.endswith("+"):
        gradient = 0.5 * d.square()
        return kl_estimate(logprobs, ref_logprobs, _PLAIN[kind]).detach() + gradient - gradient.detach()
    match kind:
        case "k1":
            return d
        case "k2":
            return 0.5 * d.square()
        case "abs":
            return d.abs()
        case "k3":
            limited = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return ((-limited).expm1() + limited).clamp(-MAX_K3, MAX_K3)
    raise ValueError(f"KL estimator {kind!r} is unknown; known: k1, k2, k3, abs, and k1+, k3+, abs+")


_PLAIN: dict[str, KlKind] = {"k1+": "k1", "k2+": "k2", "k3+": "k3", "abs+": "abs"}


def kl_per_token(logprobs: Sequence[float], ref_logprobs: Sequence[float], kind: KlKind) -> list[float]:
    """`kl_estimate` of one response's tokens as plain numbers, in float64: what KL in reward subtracts."""
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (logprobs, ref_logprobs))
    values: list[float] = kl_estimate(a, b, kind).tolist()
    return values


class KlController:
    """The coefficient of KL in reward: fixed, or driven to a target (arXiv 1909.08593, section 2.2)."""

    def __init__(self, config: KlConfig) -> None:
        self.config = config
        self.coef = config.reward_coef

    def update(self, measured: float, rollouts: int) -> None:
        """Move the coefficient after a step: up where KL was above its target, down where it was below.

        Args:
            measured: mean over responses of their mean KL per token, nats.
            rollouts: responses it was measured on.
        """
        if self.config.target is None:
            return
        error = min(max(measured / self.config.target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
        self.coef *= 1 + error * rollouts / self.config.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.coef = state["coef"]
