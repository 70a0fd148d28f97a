"""Mixture-of-experts layers in transformers' experts registry: one path for training and log-probabilities.

Tokens are sorted by expert, each expert works on its own tokens only, and each token's results are added up with the
router's weights. Never all experts on all tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dapo.errors import EngineError
from dapo.model.linear import _Linear, rounded_rows, uses_onednn

EXPERTS = {"cpu": "dapo_loop", "cuda": "grouped_mm", "npu": "dapo_npu"}
"""Name in the registry per kind of device."""


def loop_experts(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """One pair of matrix products per expert that has tokens; for CPU.

    Args:
        module: with `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I] and `_apply_gate`.
        hidden: [N, H]. top_k_index: [N, k] expert of each choice. top_k_weights: [N, k].

    Returns:
        [N, H].
    """
    experts: Any = module
    tokens, choices = top_k_index.shape
    chosen_experts, order = top_k_index.flatten().sort(stable=True)
    counts = torch.bincount(chosen_experts, minlength=experts.num_experts)
    room = torch.tensor([rounded_rows(n, hidden) for n in counts.tolist()])
    # Where each choice lies when every expert has a round number of rows; what is left over computes token 0 unused.
    place = torch.arange(len(order)) + ((room.cumsum(0) - room) - (counts.cumsum(0) - counts))[chosen_experts]
    source = torch.zeros(int(room.sum()), dtype=torch.long).index_copy_(0, place, order // choices)
    outputs = []
    for expert, part in enumerate(hidden.index_select(0, source).split(room.tolist())):
        if len(part):
            inner = experts._apply_gate(_linear(part, experts.gate_up_proj[expert]))
            outputs.append(_linear(inner, experts.down_proj[expert]))
    back = torch.empty_like(order).index_copy_(0, order, place)
    chosen = torch.cat(outputs).index_select(0, back).view(tokens, choices, -1)
    return (chosen * top_k_weights[..., None].to(chosen.dtype)).sum(1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    if not uses_onednn(x):
        return nn.functional.linear(x, weight)
    out: Tensor = _Linear.apply(x, weight, None)
    return out


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model, by name, in the order of its layers; none of a dense model."""
    return {name: m for name, m in model.named_modules() if type(m).__name__.endswith("TopKRouter")}


class RouterReplay:
    """Makes a model's routers take recorded experts; the experts' weights remain the router's own.

    Args:
        model: with routers as transformers has them: (logits [N, E], weights [N, k], experts [N, k]) of hidden states.
    """

    def __init__(self, model: nn.Module) -> None:
        self.chosen: Tensor | None = None
        """[N, layers, k] for the tokens of the next pass and its recomputation; -1 and None: as the router likes."""
        found = list(routers(model).values())
        self.layers = len(found)
        for layer, module in enumerate(found):
            router: Any = module
            self.choices, self.experts = int(router.top_k), int(router.num_experts)
            router.register_forward_hook(partial(self._replace, layer))

    def _replace(
        self, layer: int, router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.chosen is None:
            return None
        logits, _, own = output
        recorded = self.chosen[:, layer]
        chosen = torch.where(recorded < 0, own, recorded)
        picked = nn.functional.softmax(logits, dtype=torch.float32, dim=-1).gather(1, chosen)
        if getattr(router, "norm_topk_prob", True):  # Qwen3-VL-MoE always does
            picked = picked / picked.sum(-1, keepdim=True)
        return logits, picked.to(logits.dtype), chosen

    def read(self, record: bytes, tokens: int) -> Tensor:
        """A record of `Completion.experts` as [rows, layers, k] int64, rows >= tokens; without one, -1 for `tokens`.

        Raises:
            EngineError: it is not a whole number of tokens, too short, or names experts that there are not.
        """
        if not record:
            return torch.full((tokens, self.layers, self.choices), -1)
        kind = torch.uint8 if self.experts <= 256 else torch.int16
        row = self.layers * self.choices * kind.itemsize
        if len(record) % row or len(record) < tokens * row:
            raise EngineError(
                f"router replay: the engine reported experts in {len(record)} bytes for {tokens} input tokens or more; "
                f"{self.layers} layers of {self.choices} of {self.experts} experts take {row} bytes per token"
            )
        chosen = torch.frombuffer(bytearray(record), dtype=kind).to(torch.long)
        if int(chosen.max()) >= self.experts:
            raise EngineError(f"router replay: the engine reported expert {int(chosen.max())} of {self.experts}")
        return chosen.view(-1, self.layers, self.choices)


class RouterLoad:
    """Counts which experts the routers choose while gradients are on; adds no synchronisation and no loss."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        """Per router [E]; recomputation counts twice, which changes no share."""
        for name, router in routers(model).items():
            router.register_forward_hook(partial(self._count, name))

    def _count(self, name: str, router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():
            chosen = output[2].flatten()
            counts = self.counts.setdefault(name, torch.zeros(router.num_experts, device=chosen.device))
            counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))

    def take(self) -> Tensor | None:
        """[layers, E] since the last call; None where nothing was routed."""
        taken = torch.stack(list(self.counts.values())) if self.counts else None
        self.counts = {}
        return taken


def router_metrics(counts: Tensor) -> dict[str, float]:
    """From [layers, E]: load of the busiest expert over the mean load, averaged over layers; share of idle experts."""
    busiest = counts.amax(1) / counts.mean(1).clamp(min=1e-9)
    return {"router_max_load": float(busiest.mean()), "router_idle": float((counts == 0).double().mean())}


class _NpuGrouped(torch.autograd.Function):
    """x [N, K] in consecutive groups of `counts` rows, times w[e].T of w [E, M, K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, counts)
        return _npu_grouped_matmul(x, w.transpose(1, 2), counts, split_item=2, group_type=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, counts = ctx.saved_tensors
        dx = _npu_grouped_matmul(grads[0], w, counts, split_item=2, group_type=0)
        dw = _npu_grouped_matmul(grads[0].T, x, counts, split_item=3, group_type=2)
        return dx, dw, None


def _npu_grouped_matmul(a: Tensor, b: Tensor, counts: Tensor, *, split_item: int, group_type: int) -> Tensor:
    out: Tensor = torch.ops.npu.npu_grouped_matmul(
        [a], [b], bias=None, group_list=counts, split_item=split_item, group_type=group_type, group_list_type=1
    )[0]
    return out


def npu_experts(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `loop_experts`, by Ascend's grouped products, without host synchronisation. Not run on a device yet."""
    experts: Any = module
    rows, places = torch.ops.npu.npu_moe_token_permute(hidden, top_k_index.to(torch.int32))
    counts = torch.histc(top_k_index, bins=experts.num_experts, min=0, max=experts.num_experts).long()
    inner = torch.ops.npu.npu_swiglu(_NpuGrouped.apply(rows, experts.gate_up_proj, counts), dim=-1)
    out = _NpuGrouped.apply(inner, experts.down_proj, counts)
    merged: Tensor = torch.ops.npu.npu_moe_token_unpermute(out, places, probs=top_k_weights.to(out.dtype))
    return merged


ALL_EXPERTS_FUNCTIONS.register("dapo_loop", loop_experts)
ALL_EXPERTS_FUNCTIONS.register("dapo_npu", npu_experts)
