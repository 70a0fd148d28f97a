"""Images through the vision tower: all images of a pack in one call, with everything shape-dependent made beforehand.

transformers' tower would read lengths back from the device for each image; given the tables below it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import vision_utils

from dapo.model.layout import PackLayout

Grid = tuple[int, int, int]
_NEW_TABLES = hasattr(vision_utils, "get_vision_interpolation_indices_and_weights")
"""transformers 5.19 interpolates position embeddings by tables of [patches, 4], 5.10 by tables of [4, patches]."""


@dataclass(frozen=True)
class VisionInputs:
    """Pixels and tables of all images of a pack."""

    pixels: Tensor
    """[patches, channels * time * height * width of a patch]"""
    grids: Tensor
    """[images, 3] (time, height, width) in patches."""
    layout: PackLayout
    """Each frame is a sequence of its own, seen in both directions."""
    tables: dict[str, Any]
    """Keyword arguments of the tower: positions, interpolation, lengths."""


def vision_inputs(pixels: Tensor, grids: tuple[Grid, ...], visual: Any, device: torch.device) -> VisionInputs:
    """Move pixels to the device, with the tables for their grids."""
    frames = tuple(h * w for t, h, w in grids for _ in range(t))
    merge, side = int(visual.spatial_merge_size), int(visual.num_grid_per_side)
    parts = [_tables(grid, merge, side) for grid in grids]
    positions = torch.cat([p[0] for p in parts])
    axis = 0 if _NEW_TABLES else 1
    indices, weights = (torch.cat([p[i] for p in parts], dim=axis) for i in (1, 2))
    name = "interp" if _NEW_TABLES else "bilinear"
    ends = torch.tensor([0, *frames]).cumsum(0).to(torch.int32)
    tables = {
        "cu_seqlens": ends.to(device),
        "max_seqlen": max(frames),
        "position_ids": positions.to(device),
        f"{name}_indices": indices.to(device),
        f"{name}_weights": weights.to(device),
    }
    layout = PackLayout(frames, causal=False)
    return VisionInputs(pixels.to(device), torch.tensor(grids).to(device), layout, tables)


def blank_image(visual: Any, device: torch.device) -> VisionInputs:
    """The smallest image there is, all grey: one feature."""
    merge = int(visual.spatial_merge_size)
    embed = visual.patch_embed
    width = embed.in_channels * embed.temporal_patch_size * embed.patch_size**2
    return vision_inputs(torch.zeros(merge * merge, width), ((1, merge, merge),), visual, device)


def vision_features(visual: nn.Module, images: VisionInputs) -> tuple[Tensor, list[Tensor]]:
    """Image features for the text's input [F, H], and those added behind its first layers (DeepStack)."""
    out = visual(images.pixels, grid_thw=images.grids, return_dict=True, pack_layout=images.layout, **images.tables)
    return out.pooler_output, list(out.deepstack_features)


class DeepStack:
    """Adds image features behind the first text layers, by position.

    transformers adds them where a mask is true, which makes the host wait for the device twice in each of these layers.
    """

    def __init__(self, visual: Any, text: Any) -> None:
        self._index: Tensor | None = None
        self._features: Sequence[Tensor] = ()
        for number, layer in enumerate(text.layers[: len(visual.config.deepstack_visual_indexes)]):
            layer.register_forward_hook(partial(self._add, number))

    def place(self, index: Tensor, features: Sequence[Tensor]) -> None:
        """For the next pass and its recomputation: where each row of `features` (one [F, H] per layer) goes."""
        self._index, self._features = index, features

    def clear(self) -> None:
        self._index, self._features = None, ()

    def _add(self, number: int, layer: nn.Module, _: Any, hidden: Tensor) -> Tensor | None:
        if self._index is None:
            return None
        return hidden.index_add(1, self._index, self._features[number][None].to(hidden.dtype))


@lru_cache(maxsize=1024)
def _tables(grid: Grid, merge: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary positions, and which position embeddings each patch mixes with which weights."""
    grids = torch.tensor([grid])
    positions = vision_utils.get_vision_position_ids(grids, merge)
    if _NEW_TABLES:
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=merge
        )
    else:
        indices, weights = vision_utils.get_vision_bilinear_indices_and_weights(grids, side, merge)
    return positions, indices, weights
