"""The model as the trainer sees it: a pack of tokens in, log-probabilities and entropies of its targets out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from dapo.model.experts import RouterReplay
from dapo.model.layout import PackLayout
from dapo.model.logprobs import token_logprobs
from dapo.model.ulysses import SequenceGroup, SequenceSlice, join_values
from dapo.model.vision import DeepStack, VisionInputs, vision_features


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
    experts: Tensor | None = None
    """[N, layers, k] experts that the routers must choose, -1 where they may choose; None: they always may."""
    part: SequenceSlice | None = None
    """Sequence parallelism: the tensors above are this rank's share of a pack (the layout is of the whole)."""

    def share(self, group: SequenceGroup | None) -> PackInputs:
        """This rank's tokens, padded to equal shares, and what belongs to them."""
        if group is None:
            return self
        low, high = group.bounds(len(self.token_ids))
        missing = max(0, high - len(self.token_ids))
        features = ((self.image_index >= low) & (self.image_index < high)).nonzero().flatten()
        targets = ((self.sources >= low) & (self.sources < high)).nonzero().flatten()
        return replace(
            self,
            token_ids=functional.pad(self.token_ids, (0, missing))[low:high],
            positions=functional.pad(self.positions, (0, missing))[:, low:high],
            sources=self.sources[targets] - low,
            targets=self.targets[targets],
            image_index=self.image_index[features] - low,
            experts=None
            if self.experts is None
            else functional.pad(self.experts, (0, 0, 0, 0, 0, missing), value=-1)[low:high],
            part=SequenceSlice(group, features, targets, len(self.targets)),
        )

    def to(self, device: torch.device) -> PackInputs:
        """On a device; images are there already."""
        part = self.part
        if part is not None:
            part = replace(part, feature_rows=part.feature_rows.to(device), target_rows=part.target_rows.to(device))
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            sources=self.sources.to(device),
            targets=self.targets.to(device),
            image_index=self.image_index.to(device),
            experts=None if self.experts is None else self.experts.to(device),
            part=part,
        )


class Network(nn.Module):
    """Text and vision model with the fused output head. FSDP gathers the head's weights for this module's forward."""

    def __init__(
        self, model: PreTrainedModel, temperature: float, banned: Tensor | None, *, router_replay: bool = False
    ) -> None:
        super().__init__()
        self.replay = RouterReplay(model) if router_replay else None
        self.model = model
        self.temperature = temperature
        self.banned = banned
        self._deepstack = None if self.visual is None else DeepStack(self.visual, self.text)

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
        if self.replay is not None:
            self.replay.chosen = pack.experts
        text: Any = self.text
        embeddings = text.embed_tokens(pack.token_ids[None])
        extra: dict[str, Any] = {}
        if self._deepstack is not None:
            self._deepstack.clear()
        if pack.vision is not None:
            assert self.visual is not None and self._deepstack is not None, "a text-only model was given images"  # noqa: PT018
            features, deepstack = vision_features(self.visual, pack.vision)
            if pack.part is not None:
                features = features.index_select(0, pack.part.feature_rows)
                deepstack = [layer.index_select(0, pack.part.feature_rows) for layer in deepstack]
            if len(pack.image_index):
                embeddings = embeddings.index_copy(1, pack.image_index, features[None].to(embeddings.dtype))
                self._deepstack.place(pack.image_index, deepstack)
            else:
                # Also where no image falls on this rank's tokens: its backward pass has collectives, too.
                nothing = torch.stack([x.sum() for x in (features, *deepstack)]).sum() * 0.0
                embeddings = embeddings + nothing.to(embeddings.dtype)
        positions = pack.positions[:, None] if self.visual is not None else pack.positions[:1]
        if pack.part is not None:
            extra["sequence_group"] = pack.part.group
        hidden = text(
            inputs_embeds=embeddings, position_ids=positions, use_cache=False, pack_layout=pack.layout, **extra
        ).last_hidden_state[0]
        head: Any = self.model.lm_head
        logprobs, entropy = token_logprobs(
            hidden.index_select(0, pack.sources),
            head.weight,
            pack.targets,
            temperature=self.temperature,
            banned=self.banned,
        )
        if pack.part is not None:
            logprobs, entropy = join_values(logprobs, pack.part), join_values(entropy, pack.part)
        return logprobs, entropy
