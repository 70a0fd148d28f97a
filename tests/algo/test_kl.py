"""The adaptive KL coefficient, and estimates by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dapo.algo.kl import KlController, kl_estimate, kl_per_token
from dapo.config.algorithm import KlConfig, KlKind


def test_estimates_of_a_token_twice_as_likely() -> None:
    d = math.log(2)
    assert [kl_per_token([d], [0.0], kind)[0] for kind in ("k1", "k2", "k3", "abs")] == pytest.approx(
        [d, d * d / 2, 0.5 - 1 + d, d]
    )


def test_k3_is_the_kl_on_average() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    assert (p * kl_estimate(p.log(), q.log(), "k3")).sum() == pytest.approx(exact.item(), rel=1e-5)


def test_a_fixed_coefficient_stays() -> None:
    controller = KlController(KlConfig(reward_coef=0.1))
    controller.update(99.0, 512)
    assert controller.coef == 0.1


def test_an_adaptive_coefficient_follows_its_target_by_at_most_a_fifth() -> None:
    controller = KlController(KlConfig(reward_coef=0.1, target=0.02, horizon=1000))
    controller.update(0.022, 500)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    controller.update(99.0, 500)
    assert controller.coef == pytest.approx(0.105 * 1.1)
    other = KlController(KlConfig(reward_coef=0.1, target=0.02, horizon=1000))
    other.load_state_dict(controller.state_dict())
    other.update(0.0, 500)
    assert other.coef == pytest.approx(0.105 * 1.1 * 0.9)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="'k4' is unknown"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"])
def test_a_token_that_one_side_calls_impossible_has_a_finite_estimate_and_gradient(kind: KlKind) -> None:
    never = -math.inf
    logprobs = torch.tensor([-1.0, never, never], requires_grad=True)
    estimate = kl_estimate(logprobs, torch.tensor([never, -1.0, never]), kind)
    estimate.sum().backward()
    assert estimate.isfinite().all()
    assert estimate[2] == 0
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
