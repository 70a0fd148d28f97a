"""Floating-point operations of a training pass, counted from a model's sizes: for balancing packs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Grouped-query attention, gated MLP, untied head: what the counts below assume.
_DECODERS = ("llama", "mistral", "qwen2", "qwen2_5_vl", "qwen2_moe", "qwen2_vl")
_DECODERS_WITH_VISION = ("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """Multiply-adds per unit of work, forward; a multiply-add is 2 FLOPs, backward costs twice the forward."""

    token: float
    """Per text token: weights of the decoder layers it passes (of a MoE: router and chosen experts)."""
    head: float
    """Per token through the language-model head: hidden size x vocabulary."""
    pair: float
    """Per (query, key) pair of one of the two attention matmuls, all layers."""
    patch: float = 0.0
    """Per image patch: weights of the vision tower and its mergers."""
    patch_pair: float = 0.0
    """Per pair of patches of one image, as `pair`."""

    @classmethod
    def of(cls, model_type: str, text: Mapping[str, Any], vision: Mapping[str, Any] | None = None) -> ModelFlops | None:
        """From configurations as in transformers' `to_dict()`; None for a family whose layers are not known here."""
        family = model_type.removesuffix("_text")
        if family not in _DECODERS + _DECODERS_WITH_VISION:
            return None
        hidden, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
        head_dim = text.get("head_dim") or hidden // heads
        if family.endswith("_moe"):
            experts = text["num_experts_per_tok"] * text["moe_intermediate_size"]
            width = experts + (text.get("shared_expert_intermediate_size") or 0)
            # transformers 5 writes the second name, the hub's files have the first.
            mlp = hidden * (3 * width + (text.get("num_experts") or text["num_local_experts"]))
        else:
            mlp = hidden * 3 * text["intermediate_size"]
        attention = hidden * head_dim * 2 * (heads + text["num_key_value_heads"])
        tower = _vision(vision) if vision and family in _DECODERS_WITH_VISION else (0.0, 0.0)
        return cls(
            token=layers * (mlp + attention),
            head=hidden * text["vocab_size"],
            pair=layers * heads * head_dim,
            patch=tower[0],
            patch_pair=tower[1],
        )

    def training(self, lengths: Sequence[int], image_patches: Sequence[int] = ()) -> float:
        """FLOPs of forward and backward over whole sequences (prompt + response tokens) and images (patches each).

        The usual estimate behind published MFU numbers: recomputation is not counted, the embedding is counted like
        the head, the mergers once per patch.
        """
        tokens, patches = sum(lengths), sum(image_patches)
        pairs = sum(n * n for n in lengths) / 2
        patch_pairs = sum(n * n for n in image_patches)
        dense = (self.token + 2 * self.head) * tokens + self.patch * patches
        return 6 * dense + 12 * (self.pair * pairs + self.patch_pair * patch_pairs)


def _vision(vision: Mapping[str, Any]) -> tuple[float, float]:
    """(per patch, per pair of patches) of a Qwen3-VL tower: plain MLP, full attention, a merger per deepstack level."""
    hidden, depth = vision["hidden_size"], vision["depth"]
    embed = hidden * vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    block = 2 * hidden * vision["intermediate_size"] + 4 * hidden * hidden
    merged = hidden * vision["spatial_merge_size"] ** 2
    mergers = (1 + len(vision["deepstack_visual_indexes"])) * merged * (merged + vision["out_hidden_size"])
    return float(embed + depth * block + mergers), float(depth * hidden)
