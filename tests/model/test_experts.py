"""Experts against transformers' own loop, with and without rounded row counts."""

import pytest
import torch
from transformers import Qwen3VLMoeTextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from dapo.device import torch_device
from dapo.model.experts import EXPERTS, RouterLoad, loop_experts, npu_experts, router_metrics
from dapo.model.linear import uses_onednn


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_values_and_gradients_equal_those_of_transformers(tokens, dtype, tolerance):
    torch.manual_seed(0)
    config = Qwen3VLMoeTextConfig(
        hidden_size=16, moe_intermediate_size=12, num_experts=5, num_experts_per_tok=2, num_attention_heads=2
    )
    compare(config, tokens, dtype, tolerance, None, loop_experts)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_the_grouped_products_of_cuda_equal_the_loop(dtype, tolerance):
    """The path that GPUs take, on torch's kernel for CPU (its rows must be 16 bytes or multiples)."""
    config = Qwen3VLMoeTextConfig(
        hidden_size=16, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2, num_attention_heads=2
    )
    assert EXPERTS["cuda"] == "grouped_mm"
    compare(config, 40, dtype, tolerance, loop_experts, ALL_EXPERTS_FUNCTIONS["grouped_mm"])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-2), (torch.bfloat16, 2e-2)])
def test_grouped_products_on_a_gpu_equal_the_loop(dtype, tolerance):
    config = Qwen3VLMoeTextConfig(
        hidden_size=64, moe_intermediate_size=96, num_experts=5, num_experts_per_tok=2, num_attention_heads=2
    )
    compare(config, 200, dtype, tolerance, None, ALL_EXPERTS_FUNCTIONS["grouped_mm"], "cuda")


@pytest.mark.npu
def test_grouped_products_on_an_npu_equal_the_loop():
    torch_device("npu")
    config = Qwen3VLMoeTextConfig(
        hidden_size=64, moe_intermediate_size=96, num_experts=5, num_experts_per_tok=2, num_attention_heads=2
    )
    compare(config, 200, torch.bfloat16, 2e-2, None, npu_experts, "npu")


def compare(config, tokens, dtype, tolerance, first, second, device="cpu"):
    """Values and gradients of two expert functions; None: transformers' own loop."""
    config._experts_implementation = "eager"
    width = config.hidden_size
    experts = Qwen3VLMoeTextExperts(config).to(device, dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(tokens, width).to(device, dtype)
    index = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]).to(device)  # expert 4 gets nothing
    weights = torch.rand(tokens, 2).to(device, dtype)
    results = []
    for function in (first, second):
        x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        experts.zero_grad()
        out = experts(x, index, w) if function is None else function(experts, x, index, w)
        out.backward(torch.linspace(-1, 1, out.numel()).to(out).view_as(out))
        results.append((out, x.grad, w.grad, experts.gate_up_proj.grad, experts.down_proj.grad))
    for expected, found in zip(*results, strict=True):
        scale = max(1.0, float(expected.detach().abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)
    assert not results[1][3][4].any()


def test_float32_on_cpu_takes_the_path_with_rounded_rows():
    assert uses_onednn(torch.zeros(1)) == torch.backends.mkldnn.is_available()
    assert not uses_onednn(torch.zeros(1, dtype=torch.float64))


def test_router_metrics_by_hand():
    counts = torch.tensor([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert router_metrics(counts) == {"router_max_load": 2.5, "router_idle": 3 / 8}


def test_nothing_routed_is_nothing_counted():
    load = RouterLoad(torch.nn.Linear(2, 2))
    assert load.take() is None
