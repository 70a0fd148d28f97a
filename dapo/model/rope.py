"""Multimodal rotary positions (mRoPE) of Qwen3-VL: three coordinates per token, from token ids and image grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dapo.errors import DataError


def mrope_positions(
    token_ids: Sequence[int] | Tensor,
    image_grids: Sequence[tuple[int, int, int]],
    *,
    image_token_id: int | None,
    merge_size: int = 2,
) -> Tensor:
    """Positions of one unpadded sequence whose image placeholders are already expanded.

    Text counts on by one on all three axes. An image of t x h x w patches takes (t, h/m, w/m) coordinates from its
    start, and the text after it goes on at start + max(h, w) / m. Placeholder ids beyond the grids (a response may
    sample one) are text.

    Args:
        token_ids: [N] ids.
        image_grids: (time, height, width) in patches per image, in order.
        image_token_id: the placeholder; None for a text-only model (then there are no grids).
        merge_size: patches merged per axis into one placeholder (m).

    Returns:
        [3, N] int64 on CPU: time, height, width. Equal to transformers' `get_rope_index` on such a sequence.

    Raises:
        DataError: fewer placeholders than the grids ask for, or an image's placeholders are not in one run.

    Source: Qwen2-VL, arXiv 2409.12191, section 2.1; Qwen3-VL separates images by text, so each run is one image.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64).cpu()
    positions = torch.arange(len(ids)).expand(3, -1)
    if not image_grids:
        return positions.clone()
    counts = [t * (h // merge_size) * (w // merge_size) for t, h, w in image_grids]
    placeholders = (ids == image_token_id).nonzero().flatten() if image_token_id is not None else ids.new_empty(0)
    if len(placeholders) < sum(counts):
        raise DataError(
            f"{len(image_grids)} images need {sum(counts)} placeholder tokens, the sequence of {len(ids)} tokens has "
            f"{len(placeholders)}: it was cut inside an image, or its ids are not expanded; use the processor's ids"
        )
    positions = positions.clone()
    used, shift = 0, 0
    for (t, h, w), count in zip(image_grids, counts, strict=True):
        start = int(placeholders[used])
        if int(placeholders[used + count - 1]) != start + count - 1:
            raise DataError(
                f"image of grid {(t, h, w)} needs {count} placeholders in one run from token {start}, found a gap; "
                "the prompt's ids do not belong to its images"
            )
        used += count
        rows, columns = h // merge_size, w // merge_size
        axes = [torch.arange(n) for n in (t, rows, columns)]
        positions[:, start : start + count] = (
            start + shift + torch.stack(torch.meshgrid(axes, indexing="ij")).flatten(1)
        )
        shift += max(rows, columns) - count
        positions[:, start + count :] = torch.arange(start + count, len(ids)) + shift
    return positions


def image_token_index(
    token_ids: Sequence[int] | Tensor,
    image_grids: Sequence[tuple[int, int, int]],
    *,
    image_token_id: int,
    merge_size: int = 2,
) -> Tensor:
    """Where image features go in a prompt: the first sum(t h w / m^2) placeholders; later ones are only text.

    Returns:
        int64 indices into the sequence, one per image feature, in order.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64).cpu()
    features = sum(t * (h // merge_size) * (w // merge_size) for t, h, w in image_grids)
    return (ids == image_token_id).nonzero().flatten()[:features]
