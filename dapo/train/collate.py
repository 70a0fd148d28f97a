"""From records to tensors: one pack of the plan as the network's inputs and the objective's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dapo.model.layout import PackLayout
from dapo.model.linear import rounded_rows
from dapo.model.network import Network, PackInputs
from dapo.model.rope import image_token_index, mrope_positions
from dapo.model.ulysses import SequenceGroup
from dapo.model.vision import blank_image, vision_inputs
from dapo.types import Pack, Prompt, TrainBatch


class Processor(Protocol):
    """What the trainer needs of `dapo.data.processor.PromptProcessor`."""

    @property
    def image_token_id(self) -> int | None: ...
    @property
    def merge_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def banned_token_ids(self) -> tuple[int, ...]: ...
    def vision_inputs(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class PackTargets:
    """What the objective needs beside log-probabilities; T tokens of S sequences, flat, on the device."""

    advantages: Tensor
    """[T]"""
    rollout_logprobs: Tensor
    """[T] by the engine while sampling."""
    sequence_ids: Tensor
    """[T] 0 .. S - 1"""
    trained: Tensor
    """[S] bool"""
    sequences: tuple[tuple[int, int], ...]
    """(group, sequence) of the batch for each of the S."""
    lengths: tuple[int, ...]
    """[S] tokens"""


class Collator:
    """Makes tensors of packs. Positions of a prompt are computed once per batch."""

    def __init__(
        self,
        processor: Processor,
        network: Network,
        device: torch.device,
        dtype: torch.dtype,
        sequence_group: SequenceGroup | None = None,
    ) -> None:
        self.processor, self.network, self.device, self.dtype = processor, network, device, dtype
        self.sequence_group = sequence_group
        self.always_see = False
        """Sharded ranks run the vision tower on every pack, with a blank image if need be: gathering its weights
        needs all of them, and a tower that only some ranks run would hang or crash the others."""
        self._like = torch.empty(0, device=device, dtype=dtype)
        self._positions: dict[int, Tensor] = {}
        self._batch: TrainBatch | None = None

    def __call__(self, batch: TrainBatch, pack: Pack) -> tuple[PackInputs, PackTargets]:
        """One pack; without segments it is a filler: one token that nothing is trained on."""
        if batch is not self._batch:
            self._batch, self._positions = batch, {}
        if not pack.segments:
            return self._filler()
        prompts = [batch.groups[s.group].prompt for s in pack.segments]
        positions = [self._prompt_positions(s.group, p) for s, p in zip(pack.segments, prompts, strict=True)]
        token_ids = [token for p in prompts for token in p.token_ids]
        sources: list[int] = []
        targets: list[int] = []
        advantages: list[float] = []
        rollout: list[float] = []
        trained: list[bool] = []
        sequences: list[tuple[int, int]] = []
        lengths: list[int] = []
        inputs: list[tuple[int, ...]] = []
        # A few unused tokens after the prompts: a round number of rows is computed faster.
        written = sum(
            len(batch.groups[s.group].sequences[i].response_ids) - 1 for s in pack.segments for i in s.sequences
        )
        tokens = len(token_ids) + written
        padding = rounded_rows(tokens, self._like) - tokens
        token_ids.extend([0] * padding)
        positions.append(torch.arange(padding).expand(3, -1))
        prompt_end, at = 0, len(token_ids)
        for segment, prompt, where in zip(pack.segments, prompts, positions[: len(prompts)], strict=True):
            prompt_end += len(prompt.token_ids)
            start, inside = int(where.max()) + 1, []
            for index in segment.sequences:
                sequence = batch.groups[segment.group].sequences[index]
                ids, n = sequence.response_ids, len(sequence.response_ids)
                assert n, f"prompt {prompt.id}, response {index} has no tokens: no engine may return that"
                token_ids.extend(ids[:-1])
                sources.append(prompt_end - 1)
                sources.extend(range(at, at + n - 1))
                at += n - 1
                targets.extend(ids)
                rollout.extend(sequence.rollout_logprobs)
                advantages.append(sequence.advantage)
                trained.append(sequence.trained)
                sequences.append((segment.group, index))
                lengths.append(n)
                inside.append(n - 1)
                positions.append(torch.arange(start, start + n - 1).expand(3, -1))
            inputs.append(tuple(inside))
        lengths_S = torch.tensor(lengths)
        sequence_ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths_S)
        vision, image_index = self._vision(prompts)
        lengths_P = tuple(len(p.token_ids) for p in prompts)
        layout = PackLayout(
            (*lengths_P, padding) if padding else lengths_P, (*inputs, ()) if padding else tuple(inputs)
        )
        here = self.device
        whole = PackInputs(
            torch.tensor(token_ids),
            torch.cat(positions, dim=1),
            layout,
            torch.tensor(sources),
            torch.tensor(targets),
            vision,
            image_index,
            self._experts(batch, pack, prompts, padding),
        )
        return (
            whole.share(self.sequence_group).to(here),
            PackTargets(
                torch.tensor(advantages, dtype=self.dtype)[sequence_ids].to(here),
                torch.tensor(rollout, dtype=self.dtype).to(here),
                sequence_ids.to(here),
                torch.tensor(trained).to(here),
                tuple(sequences),
                tuple(lengths),
            ),
        )

    def _prompt_positions(self, group: int, prompt: Prompt) -> Tensor:
        if group not in self._positions:
            self._positions[group] = mrope_positions(
                prompt.token_ids,
                prompt.image_grids,
                image_token_id=self.processor.image_token_id,
                merge_size=self.processor.merge_size,
            )
        return self._positions[group]

    def _vision(self, prompts: Sequence[Prompt]) -> tuple[Any, Tensor]:
        """Images of the prompts and where their features go."""
        seen = [p for p in prompts if p.image_grids]
        if not seen:
            return self._blank(), torch.empty(0, dtype=torch.long)
        assert self.processor.image_token_id is not None, "a prompt has images but the model has no image token"
        pixels, _ = self.processor.vision_inputs(seen)
        places, start = [], 0
        for prompt in prompts:
            places.append(
                start
                + image_token_index(
                    prompt.token_ids,
                    prompt.image_grids,
                    image_token_id=self.processor.image_token_id,
                    merge_size=self.processor.merge_size,
                )
            )
            start += len(prompt.token_ids)
        grids = tuple(grid for p in seen for grid in p.image_grids)
        return vision_inputs(pixels, grids, self.network.visual, self.device), torch.cat(places)

    def _experts(self, batch: TrainBatch, pack: Pack, prompts: Sequence[Prompt], padding: int) -> Tensor | None:
        """[N, layers, k] as the engine chose, in pack order; for a prompt, those that its first response recorded."""
        replay = self.network.replay
        if replay is None:
            return None
        shared: list[Tensor] = []
        own: list[Tensor] = []
        for segment, prompt in zip(pack.segments, prompts, strict=True):
            sequences = batch.groups[segment.group].sequences
            inputs = len(sequences[0].response_ids) - 1
            recorded = replay.read(sequences[0].experts, inputs)
            recorded = recorded[max(0, len(recorded) - inputs - len(prompt.token_ids)) : len(recorded) - inputs]
            shared += [replay.read(b"", len(prompt.token_ids) - len(recorded)), recorded]
            for index in segment.sequences:
                inputs = len(sequences[index].response_ids) - 1
                rows = replay.read(sequences[index].experts, inputs)
                own.append(rows[len(rows) - inputs :])
        return torch.cat([*shared, replay.read(b"", padding), *own])

    def _blank(self) -> Any:
        needed = self.always_see and self.network.visual is not None
        return blank_image(self.network.visual, self.device) if needed else None

    def _filler(self) -> tuple[PackInputs, PackTargets]:
        banned = set(self.processor.banned_token_ids)
        allowed = next(i for i in range(self.processor.vocab_size) if i not in banned)
        one, first = torch.tensor([allowed]), torch.zeros(1, dtype=torch.long)
        whole = PackInputs(
            one, first.expand(3, -1), PackLayout((1,), ((0,),)), first, one, self._blank(), image_index=first[:0]
        )
        zero = torch.zeros(1, dtype=self.dtype, device=self.device)
        untrained = torch.zeros(1, dtype=torch.bool, device=self.device)
        targets = PackTargets(zero, zero, first.to(self.device), untrained, (), ())
        return whole.share(self.sequence_group).to(self.device), targets
