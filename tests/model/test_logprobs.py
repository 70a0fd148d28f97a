"""Log-probabilities without logits against the plain formula, which the reference vectors check."""

import subprocess
import sys

import pytest
import torch

from dapo.algo.entropy import logprobs_and_entropy
from dapo.model.logprobs import token_logprobs


def plain(hidden, weight, targets, temperature, banned):
    banned_ids = [] if banned is None else banned.nonzero().flatten().tolist()
    return logprobs_and_entropy(hidden @ weight.T, targets, temperature, banned_ids)


def case(tokens, vocabulary, dtype, banned):
    generator = torch.Generator().manual_seed(tokens * vocabulary)
    hidden = torch.randn(tokens, 16, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocabulary, 16, generator=generator, dtype=torch.float64) * 0.25).to(dtype)
    mask = torch.zeros(vocabulary, dtype=torch.bool)
    mask[::3] = banned
    allowed = (~mask).nonzero().flatten()
    targets = allowed[torch.randint(len(allowed), (tokens,), generator=generator)]
    return hidden, weight, targets, mask if banned else None


def run(function, inputs, *args, pull):
    hidden, weight, targets, banned = inputs
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logprobs, entropy = function(hidden, weight, targets, *args, banned)
    loss = (logprobs * pull[0]).sum() + (0.0 if pull[1] is None else (entropy * pull[1]).sum())
    loss.backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("banned", [False, True])
@pytest.mark.parametrize("tile", [(2**22, 64), (640, 64), (64, 64), (2**22, 8)])  # one; several; narrow ones
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_values_and_gradients_equal_the_plain_formula(dtype, tolerance, banned, tile, entropy_gradient):
    inputs = case(37, 50, dtype, banned)
    pull = torch.linspace(-1, 1, 37, dtype=dtype), torch.linspace(1, -2, 37, dtype=dtype) if entropy_gradient else None

    def ours(hidden, weight, targets, temperature, mask):
        return token_logprobs(hidden, weight, targets, temperature=temperature, banned=mask, tile=tile)

    wide = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
    expected = run(plain, wide, 0.7, pull=tuple(None if p is None else p.double() for p in pull))
    for found, right in zip(run(ours, inputs, 0.7, pull=pull), expected, strict=True):
        scale = max(1.0, float(right.abs().max()))
        torch.testing.assert_close(found.double(), right, rtol=0, atol=tolerance * scale)


def test_a_banned_token_has_no_probability_and_gets_no_gradient():
    hidden, weight, targets, banned = case(5, 9, torch.float64, True)
    found = run(
        lambda h, w, t, m: token_logprobs(h, w, t, banned=m), (hidden, weight, targets, banned), pull=(1.0, 1.0)
    )
    assert torch.equal(found[3][banned], torch.zeros_like(found[3][banned]))
    assert bool(torch.isfinite(found[3]).all())
    everything = torch.arange(9)[~banned]
    rows = hidden[:1].expand(len(everything), -1)
    total = token_logprobs(rows, weight, everything, banned=banned)[0].exp().sum()
    assert total == pytest.approx(1.0, abs=1e-12)


def test_no_tokens_give_no_numbers():
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(6, 4, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.shape == (0,)
    assert not weight.grad.any()


_PEAK = """
import resource, torch
from dapo.model.logprobs import token_logprobs
torch.set_num_threads(1)
hidden, weight = torch.randn(8192, 8), torch.randn(151936, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    token_logprobs(hidden, weight, torch.randint(151936, (8192,)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_peak_memory_is_under_a_tenth_of_full_logits():
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1 * 8192 * 151936 * 4
