"""One attention entry for text and vision: plain, packed and shared-prefix, in transformers' attention registry.

The layout of a pack travels as a keyword argument through transformers' modules (`pack_layout=`); no class is patched.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from dapo.model import attention_short, attention_split
from dapo.model.layout import PackLayout
from dapo.model.ulysses import SequenceGroup, gather_tokens, repeated_heads, scatter_tokens

ATTENTION = "dapo_packed"
"""Name in the registry."""
VISION_ATTENTION = "dapo_packed_flash"
"""The same entry. With "flash" in its name transformers hands it all images of a pack in one call; to be set on the
vision tower's config after construction, because a model that is constructed with such a name looks for a package."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    pack_layout: PackLayout | None = None,
    sequence_group: SequenceGroup | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' modules call it.

    Args:
        query: [1, H, N, D] of a pack, or without a layout [B, H, T, D] of equally long sequences.
        key, value: [1, K, N, D]; K divides H (grouped-query attention).
        pack_layout: how the N tokens lie; without it, full or causal attention within each row.
        sequence_group: the ranks that each hold a share of the pack's tokens; N is then this rank's share.

    Returns:
        [1, N, H, D] and None (no attention weights).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if pack_layout is None:
        causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        causal = causal and attention_mask is None
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scale
        )
        return out.transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if sequence_group is None:
        return _attend(q, k, v, pack_layout, scale)[None], None
    copies = repeated_heads(k.shape[1], sequence_group.size)
    k, v = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k, v))
    q, k, v = (gather_tokens(x, pack_layout.tokens, sequence_group) for x in (q, k, v))
    return scatter_tokens(_attend(q, k, v, pack_layout, scale), sequence_group)[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, scale: float) -> Tensor:
    assert q.shape[0] == layout.tokens, f"the layout describes {layout.tokens} tokens, attention was given {len(q)}"
    kernel = attention_split.kernel_for(q, layout)
    if kernel is None:
        return attention_short.attend(q, k, v, layout, scale)
    return attention_split.attend(q, k, v, layout, scale, kernel)


AttentionInterface.register(ATTENTION, packed_attention)
AttentionInterface.register(VISION_ATTENTION, packed_attention)
