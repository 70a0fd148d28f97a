"""Which experts a model's routers choose while it generates, for a trainer that is to choose the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dapo.errors import ConfigError, EngineError
from dapo.model.experts import routers
from dapo.types import Prompt


class RoutedExperts:
    """Listens to the routers of a model, pass by pass.

    Raises:
        ConfigError: the model has no experts.
    """

    def __init__(self, model: nn.Module) -> None:
        found: list[Any] = list(routers(model).values())
        if not found:
            raise ConfigError("rollout.router_replay=true, but the model has no experts; set it to false")
        self._shape = len(found), int(found[0].top_k)
        self._dtype = torch.uint8 if found[0].num_experts <= 256 else torch.int16
        self._calls: list[Tensor] = []
        self._table = torch.empty(0)
        for router in found:
            router.register_forward_hook(self._listen)

    def _listen(self, router: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self._calls.append(output[2])

    def begin(self, last: Tensor, samples: int, tokens: int) -> None:
        """After the prompts of a wave: what was chosen for the last token of each.

        Args:
            last: [G] its row in the pass; a layer that was given only these tokens reports no more.
            samples: rows per prompt from now on.
            tokens: most that a row will write.
        """
        first = torch.stack([c if len(c) == len(last) else c[last] for c in self._take()], 1)
        self._table = torch.zeros(len(last) * samples, tokens, *self._shape, dtype=self._dtype)
        self._table[:, 0] = first.repeat_interleave(samples, 0).to("cpu", self._dtype)

    def add(self, index: int, rows: Tensor) -> None:
        """After a pass over the rows' own token number `index`."""
        self._table[rows.cpu(), index + 1] = torch.stack(self._take(), 1).to("cpu", self._dtype)

    def of(self, row: int, length: int, *, first: bool) -> bytes:
        """The record of a response of `length` tokens (`Completion.experts`); a first one includes the prompt."""
        record = self._table[row, 0 if first else 1 : length]
        return record.contiguous().view(torch.uint8).numpy().tobytes()

    def _take(self) -> list[Tensor]:
        calls, self._calls = self._calls, []
        return calls


def experts_of(sample: Any, prompt: Prompt, layers: Sequence[int], *, first: bool) -> bytes:
    """The record of vLLM's sample, which holds [tokens, all layers, k]; of the prompt only in the first sample.

    Raises:
        EngineError: it reports nothing, or too few tokens.
    """
    inputs = len(prompt.token_ids) + len(sample.token_ids) - 1
    routed = sample.routed_experts
    if routed is None or len(routed) < inputs:
        raise EngineError(
            f"prompt {prompt.id}: vLLM reported the experts of {0 if routed is None else len(routed)} of "
            f"{inputs} tokens; set rollout.router_replay=false"
        )
    record: bytes = routed[0 if first else len(prompt.token_ids) : inputs, list(layers)].tobytes()
    return record


def expert_layers(folder: Path) -> list[int]:
    """Which layers of the model in a Hugging Face folder have experts.

    Raises:
        ConfigError: none has.
    """
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    dense, every = text.get("mlp_only_layers") or [], text.get("decoder_sparse_step") or 1
    experts = text.get("num_experts") or text.get("num_local_experts")
    found = [n for n in range(text["num_hidden_layers"]) if experts and n not in dense and (n + 1) % every == 0]
    if not found:
        raise ConfigError(f"rollout.router_replay=true, but the model in {folder} has no experts; set it to false")
    return found
