"""One text decoder, token by token: the layers of a transformers Qwen3 model over a key-value cache of our own.

The prompt's keys and values are stored once per group. A row attends to [its group's prompt | its own tokens]; the
first part is one matrix product per group instead of one per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dapo.errors import WeightsError
from dapo.model.linear import uses_onednn

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_FIRST_CAPACITY = 32
"""Tokens the own cache of a row holds at first; doubled when full."""


def _linear_for(weight: Tensor) -> Linear:
    """The matrix product for [N, in] x [out, in]^T on this weight's device; see `dapo.model.linear`."""
    if uses_onednn(weight):
        product = torch.ops.mkldnn._linear_pointwise
        return lambda x, weight, bias: product(x, weight, bias, "none", [], "")
    return F.linear


def fuse(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Lay the weights of several linears side by side; the modules keep views, so loading into them still works."""
    weight = torch.cat([m.weight.detach() for m in linears])
    bias = torch.cat([m.bias.detach() for m in linears]) if linears[0].bias is not None else None
    sizes = [m.out_features for m in linears]
    for i, (linear, part) in enumerate(zip(linears, torch.split(weight, sizes), strict=True)):
        linear.weight = nn.Parameter(part, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(torch.split(bias, sizes)[i], requires_grad=False)
    return weight, bias


class _Layer:
    """A decoder layer with its projections fused."""

    def __init__(self, layer: Any, config: Any, linear: Linear) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm_1, self.norm_2, self.mlp, self.linear = (
            layer.input_layernorm,
            layer.post_attention_layernorm,
            mlp,
            linear,
        )
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.qkv, self.qkv_bias = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = attention.o_proj
        self.dense = hasattr(mlp, "gate_proj")
        if self.dense:
            self.gate_up, _ = fuse([mlp.gate_proj, mlp.up_proj])

    def refresh(self) -> None:
        """Recompute what is derived from the weights."""
        q, k = self.q_norm.weight.expand(self.heads, -1), self.k_norm.weight.expand(self.kv_heads, -1)
        self.qk_scale = torch.cat([q, k])

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, H], cos and sin [N, 1, D] -> q [N, Hq, D], k and v [N, Hkv, D], rotated."""
        qkv = self.linear(self.norm_1(x), self.qkv, self.qkv_bias).view(len(x), -1, self.head_dim)
        qk, v = qkv[:, : -self.kv_heads], qkv[:, -self.kv_heads :]
        qk = F.rms_norm(qk, (self.head_dim,), None, self.q_norm.variance_epsilon) * self.qk_scale
        half = self.head_dim // 2
        qk = torch.addcmul(qk * cos, torch.cat((qk[..., half:], qk[..., :half]), -1), sin)
        return qk[:, : self.heads], qk[:, self.heads :], v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: x [N, H] before it, attended [N, Hq * D]."""
        x = x + self.linear(attended, self.out.weight, self.out.bias)
        h = self.norm_2(x)
        if not self.dense:
            mixed: Tensor = self.mlp(h[None])[0]
            return x + mixed
        gate, up = self.linear(h, self.gate_up, None).chunk(2, dim=-1)
        down: Tensor = self.mlp.down_proj.weight
        return x + self.linear(self.mlp.act_fn(gate) * up, down, None)


@dataclass
class Cache:
    """Keys and values of a wave, per layer: prompts [G, Hkv, P, D] once a group, own tokens [R, Hkv, C, D] per row."""

    prompt: list[tuple[Tensor, Tensor]]
    prompt_mask: Tensor | None
    """[G, 1, 1, P]: 0 where a prompt has a token, -inf in its padding; None: all prompts are equally long."""
    positions: Tensor
    """[R] rotary position of each row's next token, counted from its first."""
    samples: int
    """Rows per group at the start (n); row `slot` belongs to group slot // n."""
    slots: Tensor | None = None
    """[R] place of each remaining row among groups * n; None: all rows are there, in order."""
    own: list[tuple[Tensor, Tensor]] | None = None

    @property
    def rows(self) -> int:
        return len(self.positions)

    def keep(self, rows: Tensor, length: int) -> None:
        """Drop all rows but these (ascending), and the prompts of groups that have none left.

        Args:
            rows: [R'] indices of rows that stay.
            length: own tokens written so far.
        """
        slots = (torch.arange(self.rows, device=rows.device) if self.slots is None else self.slots)[rows]
        groups, inverse = torch.unique(slots // self.samples, return_inverse=True)
        if len(groups) < len(self.prompt[0][0]):
            self.prompt = [(k.index_select(0, groups), v.index_select(0, groups)) for k, v in self.prompt]
            self.prompt_mask = None if self.prompt_mask is None else self.prompt_mask.index_select(0, groups)
            slots = inverse * self.samples + slots % self.samples
        self.slots, self.positions = slots, self.positions[rows]
        for pair in self.own or []:
            for tensor in pair:
                # Rows only move down: the right side is gathered whole before it is written.
                tensor[: len(rows), :, :length] = tensor[:, :, :length].index_select(0, rows)
        self.own = [(k[: len(rows)], v[: len(rows)]) for k, v in self.own or []]

    def reserve(self, tokens: int, limit: int, like: Tensor) -> None:
        """Room for `tokens` own tokens per row; `like` is a [R, Hkv, D] key of one layer."""
        have = self.own[0][0].shape[2] if self.own else 0
        if tokens <= have:
            return
        size = min(limit, max(_FIRST_CAPACITY, 2 * have))
        shape = (like.shape[0], like.shape[1], size, like.shape[2])
        grown = []
        for layer in range(len(self.prompt)):
            pair = (like.new_empty(shape), like.new_empty(shape))
            if self.own:
                for new, old in zip(pair, self.own[layer], strict=True):
                    new[:, :, :have] = old
            grown.append(pair)
        self.own = grown


class Decoder:
    """Prefill and decode steps of one loaded model; holds no state of a generation (that is `Cache`).

    Args:
        text: the text model (embed_tokens, layers, norm, rotary_emb) of Qwen3, Qwen3-MoE, Qwen3-VL or Qwen3-VL-MoE.
        head: its output projection.
        multimodal: positions have three axes.
    """

    def __init__(self, text: Any, head: nn.Linear, *, multimodal: bool) -> None:
        if not all(hasattr(layer.self_attn, "q_norm") for layer in text.layers):
            raise WeightsError(
                f"{type(text).__name__} is not a Qwen3 text model (its attention does not normalise queries and keys); "
                "the transformers engine knows Qwen3, Qwen3-MoE, Qwen3-VL and Qwen3-VL-MoE: use rollout.engine=vllm"
            )
        self.embed, self.norm, self.rotary, self.head = text.embed_tokens, text.norm, text.rotary_emb, head
        self.device, self.dtype = head.weight.device, head.weight.dtype
        self.axes = 3 if multimodal else 1
        self.linear = _linear_for(head.weight)
        self.layers = [_Layer(layer, text.config, self.linear) for layer in text.layers]
        self.refresh()

    def refresh(self) -> None:
        """To be called after the weights have changed."""
        for layer in self.layers:
            layer.refresh()

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [axes, N] -> cos and sin [N, 1, D]; sin carries the signs of the rotated halves."""
        where = positions[:, None] if self.axes == 3 else positions
        cos, sin = self.rotary(self.head.weight.new_empty(0), where)
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return cos[0][:, None], sin[0][:, None]

    def prefill(
        self, x: Tensor, positions: Tensor, lengths: Tensor, deepstack: list[Tensor], visual: Tensor, samples: int
    ) -> tuple[Tensor, Cache]:
        """Run the prompts of a wave.

        Args:
            x: [G, P, H] embeddings, image features already in place, padded on the right.
            positions: [axes, G, P] rotary positions.
            lengths: [G] tokens of each prompt.
            deepstack: per early layer, [F, H] features added at the image tokens.
            visual: [F] image tokens' indices into the flattened [G * P].
            samples: rows per group.

        Returns:
            logits [G, V] of each prompt's last token, and the cache of G * samples rows.
        """
        groups, width, hidden = x.shape
        cos, sin = self.angles(positions.flatten(1))
        x = x.reshape(groups * width, hidden)
        last = torch.arange(groups, device=x.device) * width + lengths - 1
        prompt = []
        for index, layer in enumerate(self.layers):
            q, k, v = (t.view(groups, width, -1, layer.head_dim).transpose(1, 2) for t in layer.project(x, cos, sin))
            # Padding follows every real token, so the causal mask alone hides it from them.
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scale, enable_gqa=True)
            attended = attended.transpose(1, 2).reshape(groups * width, -1)
            prompt.append((k.contiguous(), v.contiguous()))
            if index + 1 == len(self.layers) > len(deepstack):
                x, attended = x[last], attended[last]  # behind the last layer nobody asks for the others
            x = layer.finish(x, attended)
            if index < len(deepstack):
                x.index_add_(0, visual, deepstack[index])
        mask = None
        if bool((lengths < width).any()):
            padding = torch.arange(width, device=x.device) >= lengths[:, None]
            mask = torch.zeros(groups, 1, 1, width, dtype=self.dtype, device=x.device)
            mask = mask.masked_fill(padding[:, None, None], -torch.inf)
        following = positions.amax(0).gather(1, lengths[:, None] - 1)[:, 0] + 1
        cache = Cache(prompt, mask, following.repeat_interleave(samples), samples)
        return self.logits(x if len(x) == groups else x[last]), cache

    def logits(self, x: Tensor) -> Tensor:
        """x [N, H] after the last layer -> [N, V]."""
        return self.linear(self.norm(x), self.head.weight, None)

    def step(self, tokens: Tensor, cache: Cache, index: int, limit: int, table: tuple[Tensor, Tensor]) -> Tensor:
        """Feed one sampled token per row.

        Args:
            tokens: [R] ids, the rows' own token number `index` (from 0).
            limit: most own tokens a row can have.
            table: cos and sin [positions, 1, D] of `angles`.

        Returns:
            logits [R, V] for the next token.
        """
        x = self.embed(tokens)
        where = cache.positions + index
        cos, sin = table[0].index_select(0, where), table[1].index_select(0, where)
        for number, layer in enumerate(self.layers):
            q, k, v = layer.project(x, cos, sin)
            cache.reserve(index + 1, limit, k)
            assert cache.own is not None
            keys, values = cache.own[number]
            keys[:, :, index], values[:, :, index] = k, v
            attended = _attend(q * layer.scale, cache, number, index + 1)
            x = layer.finish(x, attended)
        return self.logits(x)


def _attend(q: Tensor, cache: Cache, layer: int, length: int) -> Tensor:
    """q [R, Hq, D], scaled -> [R, Hq * D]: attention over the group's prompt and the row's own `length` tokens."""
    assert cache.own is not None
    prompt_k, prompt_v = cache.prompt[layer]
    own_k, own_v = (t[:, :, :length] for t in cache.own[layer])
    rows, heads, dim = q.shape
    groups, kv_heads, width, _ = prompt_k.shape
    q = q.reshape(rows, kv_heads, heads // kv_heads, dim)
    prompt_scores = torch.matmul(_by_group(q, cache, groups), prompt_k.transpose(-1, -2))
    if cache.prompt_mask is not None:
        prompt_scores += cache.prompt_mask
    scores = torch.cat((_by_row(prompt_scores, cache, groups), torch.matmul(q, own_k.transpose(-1, -2))), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    from_prompt = torch.matmul(_by_group(weights[..., :width], cache, groups), prompt_v)
    return (_by_row(from_prompt, cache, groups) + torch.matmul(weights[..., width:], own_v)).reshape(rows, -1)


def _by_group(rows: Tensor, cache: Cache, groups: int) -> Tensor:
    """[R, Hkv, r, X] -> [G, Hkv, n * r, X]; places of dropped rows hold zeros."""
    _, kv_heads, repeat, size = rows.shape
    if cache.slots is not None:
        rows = rows.new_zeros(groups * cache.samples, kv_heads, repeat, size).index_copy_(0, cache.slots, rows)
    return rows.view(groups, cache.samples, kv_heads, repeat, size).transpose(1, 2).flatten(2, 3)


def _by_row(grouped: Tensor, cache: Cache, groups: int) -> Tensor:
    """The way back: [G, Hkv, n * r, X] -> [R, Hkv, r, X]."""
    _, kv_heads, stacked, size = grouped.shape
    rows = grouped.view(groups, kv_heads, cache.samples, stacked // cache.samples, size).transpose(1, 2).flatten(0, 1)
    return rows if cache.slots is None else rows.index_select(0, cache.slots)
