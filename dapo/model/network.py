"""The model as the trainer sees it: a pack of tokens in, log-probabilities and entropies of its targets out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dapo.model.layout import PackLayout
from dapo.model.logprobs import token_logprobs
from dapo.model.vision import VisionInputs, vision_features


@dataclass(frozen=True)
class PackInputs:
    """One pack as tensors on the device that computes it."""

    token_ids: Tensor
    """[N] int64, in the order of `layout`: all prompts, then all responses without their last token."""
    positions: Tensor
    """[3, N] mRoPE positions (all rows equal where there is no image)."""
    layout: PackLayout
    sources: Tensor
    """[T] index of the token whose state predicts each target."""
    targets: Tensor
    """[T] the response tokens, all of them."""
    vision: VisionInputs | None
    """The prompts' images, each once. A pack without any may carry a blank one, see `image_index`."""
    image_index: Tensor
    """[F] where image features go; empty with `vision` set: the tower runs (sharded ranks must) and counts zero."""


class Network(nn.Module):
    """Text and vision model with the fused output head. FSDP gathers the head's weights for this module's forward."""

    def __init__(self, model: PreTrainedModel, temperature: float, banned: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.banned = banned

    @property
    def text(self) -> nn.Module:
        inner: Any = self.model.model
        return inner.language_model if hasattr(inner, "language_model") else inner

    @property
    def visual(self) -> nn.Module | None:
        return getattr(self.model.model, "visual", None)

    def forward(self, pack: PackInputs) -> tuple[Tensor, Tensor]:
        """Log-probability (after temperature, banned ids left out) and entropy of each target: [T], float32, nats.

        Image features are placed by position, never by token id: a response may contain a placeholder's id.
        """
        text: Any = self.text
        embeddings = text.embed_tokens(pack.token_ids[None])
        extra: dict[str, Any] = {}
        if pack.vision is not None:
            assert self.visual is not None, "a text-only model was given images"
            features, deepstack = vision_features(self.visual, pack.vision)
            if len(pack.image_index):
                embeddings = embeddings.index_copy(1, pack.image_index, features[None].to(embeddings.dtype))
                mask = torch.zeros(len(pack.token_ids), dtype=torch.bool, device=embeddings.device)
                extra["visual_pos_masks"] = mask.index_fill_(0, pack.image_index, True)[None]
                extra["deepstack_visual_embeds"] = deepstack
            else:
                nothing = torch.stack([x.sum() for x in (features, *deepstack)]).sum() * 0.0
                embeddings = embeddings + nothing.to(embeddings.dtype)
        positions = pack.positions[:, None] if self.visual is not None else pack.positions[:1]
        hidden = text(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False, pack_layout=pack.layout, **extra
        ).last_hidden_state[0]
        head: Any = self.model.lm_head
        return token_logprobs(
            hidden.index_select(0, pack.sources),
            head.weight,
            pack.targets,
            temperature=self.temperature,
            banned=self.banned,
        )
