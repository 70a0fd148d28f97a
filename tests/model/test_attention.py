"""Packed attention against attention with a dense mask, in float64: values and gradients, both kernels."""

import resource
import subprocess
import sys

import pytest
import torch

from dapo.device import torch_device
from dapo.model import attention_npu, attention_short, attention_split
from dapo.model.attention import packed_attention
from dapo.model.layout import PackLayout

LAYOUTS = {
    "shared prefix, ragged": PackLayout((5, 9, 4), ((3, 7), (1, 1, 20), (6,))),
    "a response without inputs": PackLayout((5, 3), ((0, 4), (0,))),
    "plain packing": PackLayout((7, 1, 12)),
    "one sequence": PackLayout((11,)),
    "images": PackLayout((4, 6, 4), causal=False),
    "very different lengths": PackLayout((2, 60), ((50, 1, 2), (3, 40))),
}
HEADS, KV_HEADS, WIDTH = 4, 2, 8


def dense_mask(layout: PackLayout) -> torch.Tensor:
    """[N, N] bool, written down token by token."""
    owner, prompt_of, start = [], [], 0
    for number, length in enumerate(layout.prompts):
        owner += [("prompt", number)] * length
        prompt_of += [number] * length
        start += length
    for number, lengths in enumerate(layout.responses):
        for index, length in enumerate(lengths):
            owner += [("response", number, index)] * length
            prompt_of += [number] * length
    n = len(owner)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            own = owner[i] == owner[j] and (j <= i or not layout.causal)
            prefix = owner[i][0] == "response" and owner[j] == ("prompt", prompt_of[i])
            mask[i, j] = own or prefix
    return mask


def by_dense_mask(q, k, v, layout, scale):
    groups = HEADS // KV_HEADS
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    weights = scores.masked_fill(~dense_mask(layout), float("-inf")).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def short(q, k, v, layout, scale):
    return attention_short.attend(q, k, v, layout, scale)


def split(q, k, v, layout, scale):
    return attention_split.attend(q, k, v, layout, scale, attention_split.CpuKernel())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("attend", [short, split])
def test_packed_attention_equals_a_dense_mask(attend, name):
    layout = LAYOUTS[name]
    torch.manual_seed(0)
    tensors = [torch.randn(layout.tokens, h, WIDTH, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS)]
    grad = torch.randn(layout.tokens, HEADS, WIDTH, dtype=torch.float64)
    results = []
    for function in (attend, by_dense_mask):
        q, k, v = (t.clone().requires_grad_() for t in tensors)
        out = function(q, k, v, layout, 0.3)
        out.backward(grad)
        results.append((out, q.grad, k.grad, v.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def on_device(name, kernel, device):
    """A device's kernel in bfloat16 against a dense mask in float32: values and gradients."""
    layout, width = LAYOUTS[name], 64
    torch.manual_seed(0)
    tensors = [torch.randn(layout.tokens, h, width).bfloat16() for h in (HEADS, KV_HEADS, KV_HEADS)]
    grad = torch.randn(layout.tokens, HEADS, width).bfloat16()
    results = []
    for function, place, dtype in (
        (lambda *args: attention_split.attend(*args, kernel), device, torch.bfloat16),
        (by_dense_mask, torch.device("cpu"), torch.float32),
    ):
        q, k, v = (t.to(place, dtype).requires_grad_() for t in tensors)
        out = function(q, k, v, layout, 0.3)
        out.backward(grad.to(place, dtype))
        results.append([x.float().cpu() for x in (out, q.grad, k.grad, v.grad)])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_ragged_flash_on_a_gpu_equals_a_dense_mask(name):
    on_device(name, attention_split.CudaKernel(), torch_device("cuda"))


@pytest.mark.npu
@pytest.mark.parametrize("name", LAYOUTS)
def test_ragged_fusion_attention_on_an_npu_equals_a_dense_mask(name):
    on_device(name, attention_npu.NpuKernel(), torch_device("npu"))


def test_npu_attention_is_given_lengths_mask_and_the_layout_of_its_statistics():
    """Its arguments, since no such device has run it: two sources agree on each of them."""
    arguments = attention_npu._lengths_and_mask(LAYOUTS["shared prefix, ragged"].within_responses, torch.device("cpu"))
    assert arguments["actual_seq_qlen"] == arguments["actual_seq_kvlen"] == [3, 10, 11, 12, 32, 38]
    assert (arguments["sparse_mode"], arguments["softmax_layout"]) == (3, "TND")
    assert arguments["atten_mask"].shape == (2048, 2048)
    assert not arguments["atten_mask"][5, :6].any()
    assert arguments["atten_mask"][5, 6:].all()
    whole = attention_npu._lengths_and_mask(LAYOUTS["images"].within_prompts, torch.device("cpu"))
    assert (whole["sparse_mode"], "atten_mask" in whole) == (0, False)


def test_long_contexts_leave_the_short_kernel():
    q = torch.zeros(1, 1, 8)
    assert attention_split.kernel_for(q, PackLayout((attention_short.MAX_CONTEXT,))) is None
    assert attention_split.kernel_for(q, PackLayout((200,), ((100,),))) is not None


def test_without_a_layout_each_row_is_a_causal_sequence():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 6, WIDTH) for h in (HEADS, KV_HEADS, KV_HEADS))
    out, _ = packed_attention(torch.nn.Identity(), q, k, v, None, 0.3)
    for row in range(2):
        expected = by_dense_mask(*(x[row].transpose(0, 1) for x in (q, k, v)), PackLayout((6,)), 0.3)
        torch.testing.assert_close(out[row], expected)


def test_a_layout_of_another_length_is_refused():
    q, k = torch.zeros(1, HEADS, 6, WIDTH), torch.zeros(1, KV_HEADS, 6, WIDTH)
    with pytest.raises(AssertionError, match="describes 7 tokens, attention was given 6"):
        packed_attention(torch.nn.Identity(), q, k, k, None, 0.3, pack_layout=PackLayout((7,)))


_PEAK = """
import resource, sys, torch
from dapo.model import attention_split
from dapo.model.layout import PackLayout
torch.set_num_threads(1)
groups = int(sys.argv[1]) // 4096
layout = PackLayout((1024,) * groups, ((1024, 1024, 1024),) * groups)
q, k, v = (torch.randn(layout.tokens, h, 16, requires_grad=True) for h in (2, 1, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = attention_split.attend(q, k, v, layout, 0.25, attention_split.kernel_for(q, layout))
out.backward(torch.ones_like(out))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_grows_linearly_from_8192_to_32768_tokens():
    def peak_mib(tokens: int) -> float:
        done = subprocess.run([sys.executable, "-c", _PEAK, str(tokens)], capture_output=True, text=True, check=True)
        return float(done.stdout)

    assert resource.getpagesize()  # ru_maxrss below is in KiB on Linux
    small, large = peak_mib(8192), peak_mib(32768)
    assert large < 5 * small + 16
    assert large < 32768**2 / 2**20 / 4  # a quarter of what one bool mask over the pack would take
