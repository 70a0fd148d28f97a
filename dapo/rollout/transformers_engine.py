"""The light engine: real transformers modules, our own decode loop. Needs nothing that training does not need.

A prompt and its images are encoded once for all its samples, finished rows leave the batch, and a request's random
stream depends on (seed, prompt id, sample) alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dapo import torchvision_cpu
from dapo.errors import EngineError, WeightsError
from dapo.model.tensors import absolute_sum
from dapo.rollout.checks import check_completion
from dapo.rollout.decoder import Cache, Decoder
from dapo.rollout.sampling import Sampler, request_seed, uniforms
from dapo.types import Completion, FinishReason, Prompt, SamplingParams

if TYPE_CHECKING:
    from dapo.data.processor import PromptProcessor

_ROW_QUANTUM = 16
"""Batch sizes are multiples of this: oneDNN compiles a kernel per size (0.3 to 2 ms each), and keeps it."""
_COMPACT_BELOW = 7 / 8
"""Finished rows are dropped when at most this share of the batch still writes."""
_PROMPT_QUANTUM = 8


class Finished(NamedTuple):
    """One response, as soon as it ended."""

    prompt: int
    """Index into the prompts given."""
    sample: int
    completion: Completion


class TransformersEngine:
    """`Engine` on transformers' Qwen3, Qwen3-MoE, Qwen3-VL and Qwen3-VL-MoE.

    Args:
        weights: a Hugging Face folder.
        processor: of the same folder; gives pixels and placeholder ids.
        dtype: of weights and cache.
        max_num_seqs: sequences decoded together.
        kv_cache_mib: upper bound of the key-value cache; fewer sequences are decoded together where it would not fit.

    Raises:
        WeightsError: the folder holds no such model.
    """

    def __init__(
        self,
        weights: Path,
        processor: PromptProcessor,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_num_seqs: int = 256,
        kv_cache_mib: int = 256,
    ) -> None:
        self.processor = processor
        self.device = torch.device(device)
        self.max_num_seqs, self.kv_cache_bytes = max_num_seqs, kv_cache_mib * 2**20
        self.model = _load(Path(weights), dtype, self.device)
        body = self.model.model
        text = getattr(body, "language_model", body)
        self._visual = getattr(body, "visual", None)
        self._decoder = Decoder(text, self.model.lm_head, multimodal=self._visual is not None)
        self._weights = dict(self.model.state_dict())
        self.vocab_size = int(self.model.lm_head.weight.shape[0])
        self.version = 0

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        out: list[list[Completion | None]] = [[None] * params.n for _ in prompts]
        for done in self.stream(prompts, params):
            out[done.prompt][done.sample] = done.completion
        return [[c for c in group if c is not None] for group in out]

    @torch.no_grad()
    def stream(self, prompts: Sequence[Prompt], params: SamplingParams) -> Iterator[Finished]:
        """Like `generate`, but each response is given as soon as its batch notices that it ended.

        Raises:
            EngineError: see `Engine.generate`.
        """
        if params.max_tokens < 1 or params.n < 1:
            raise EngineError(f"max_tokens={params.max_tokens} and n={params.n} must be at least 1")
        for wave in self._waves(prompts, params):
            yield from self._wave(prompts, wave, params)

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, unchanged: Collection[str] = ()
    ) -> None:
        """Copy in place. Nothing depends on old weights afterwards: caches live for one `generate` only.

        Raises:
            EngineError: a name is unknown or a shape differs, or a tensor of the model was not given.
        """
        missing = set(self._weights).difference(unchanged)
        with torch.no_grad():
            for name, tensor in weights:
                target = self._weights.get(name)
                if target is None or target.shape != tensor.shape:
                    has = "no such tensor" if target is None else f"one of shape {tuple(target.shape)}"
                    raise EngineError(f"weight sync: {name} of shape {tuple(tensor.shape)}: the engine has {has}")
                target.copy_(tensor)
                missing.discard(name)
        # A tied head is one tensor under two names.
        pointers = {self._weights[name].data_ptr() for name in set(self._weights) - missing}
        missing = {name for name in missing if self._weights[name].data_ptr() not in pointers}
        if missing:
            raise EngineError(f"weight sync: {len(missing)} tensors did not arrive, the first: {min(missing)}")
        self._decoder.refresh()
        self.version = version

    def fingerprint(self) -> dict[str, float]:
        return {name: absolute_sum(tensor) for name, tensor in self._weights.items()}

    def sleep(self) -> None:
        """Nothing to free: the cache lives for one `generate`, and the weights are small where this engine is used."""

    def wake(self) -> None:
        """See `sleep`."""

    def close(self) -> None:
        self._weights.clear()
        del self.model, self._decoder, self._visual

    # one wave: prompts decoded together

    def _waves(self, prompts: Sequence[Prompt], params: SamplingParams) -> Iterator[list[int]]:
        """Indices of prompts whose samples fit the batch and the cache together; similar lengths share a wave."""
        layer = self._decoder.layers[0]
        per_token = 2 * layer.kv_heads * layer.head_dim * len(self._decoder.layers) * self._decoder.dtype.itemsize
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids), reverse=True)
        while order:
            tokens = len(prompts[order[0]].token_ids) + params.n * params.max_tokens
            fit = min(self.max_num_seqs // params.n, self.kv_cache_bytes // (per_token * tokens))
            count = max(1, fit)
            yield order[:count]
            order = order[count:]

    def _wave(self, prompts: Sequence[Prompt], wave: list[int], params: SamplingParams) -> Iterator[Finished]:
        logits, cache = self._prefill([prompts[i] for i in wave], params.n)
        logits = logits.repeat_interleave(params.n, dim=0)
        seeds = [request_seed(params.seed, prompts[i].id) + s for i in wave for s in range(params.n)]
        sampler = Sampler(params, self.vocab_size, self.device)
        stop = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
        stop[[i for i in params.stop_token_ids if 0 <= i < self.vocab_size]] = True
        table = self._decoder.angles(self._positions(int(cache.positions.max()) + params.max_tokens))
        log = _Log(len(seeds), params, stop, self.device)
        uniform = torch.empty(0, 0)
        for index in range(params.max_tokens):
            column = index % 64
            if column == 0:
                uniform = torch.from_numpy(uniforms(seeds, index, min(64, params.max_tokens - index))).to(self.device)
            ids, logprobs = sampler(logits, uniform[log.rows, column])
            writing = log.add(index, ids, logprobs)
            if index + 1 == params.max_tokens or not writing:
                break
            if (keep := log.compact(writing)) is not None:
                yield from self._finished(log.take_done(), wave, params)
                log.keep(keep)
                cache.keep(keep, index)
                ids = ids[keep]
            logits = self._decoder.step(ids, cache, index, params.max_tokens, table)
        yield from self._finished(log.take_all(), wave, params)

    def _prefill(self, prompts: list[Prompt], samples: int) -> tuple[Tensor, Cache]:
        from dapo.model.rope import image_token_index, mrope_positions

        lengths = [len(p.token_ids) for p in prompts]
        width = -(-max(lengths) // _PROMPT_QUANTUM) * _PROMPT_QUANTUM
        image_id, merge = self.processor.image_token_id, self.processor.merge_size
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        positions = torch.zeros(self._decoder.axes, len(prompts), width, dtype=torch.long)
        visual = [torch.empty(0, dtype=torch.long)]
        for row, prompt in enumerate(prompts):
            n = lengths[row]
            ids[row, :n] = torch.tensor(prompt.token_ids)
            where = mrope_positions(prompt.token_ids, prompt.image_grids, image_token_id=image_id, merge_size=merge)
            positions[:, row, :n] = where[: self._decoder.axes]
            if prompt.image_grids:
                assert image_id is not None
                index = image_token_index(
                    prompt.token_ids, prompt.image_grids, image_token_id=image_id, merge_size=merge
                )
                visual.append(index + row * width)
        places = torch.cat(visual).to(self.device)
        x = self._decoder.embed(ids.to(self.device))
        deepstack: list[Tensor] = []
        if len(places):
            features, deepstack = self._see(prompts)
            x.view(-1, x.shape[-1])[places] = features
        at = torch.tensor(lengths, device=self.device)
        return self._decoder.prefill(x, positions.to(self.device), at, deepstack, places, samples)

    def _see(self, prompts: list[Prompt]) -> tuple[Tensor, list[Tensor]]:
        """Image features [F, H] and, per early layer, what is added to them there."""
        if self._visual is None:
            raise EngineError("a prompt has an image but the engine's model is text-only")
        pixels, grids = self.processor.vision_inputs(prompts)
        seen = self._visual(
            pixels.to(self.device, self._decoder.dtype), grid_thw=grids.to(self.device), return_dict=True
        )
        return seen.pooler_output, list(seen.deepstack_features)

    def _positions(self, count: int) -> Tensor:
        return torch.arange(count, device=self.device).expand(self._decoder.axes, -1)

    def _finished(self, ended: list[_Response], wave: list[int], params: SamplingParams) -> Iterator[Finished]:
        for row, ids, logprobs, stopped in ended:
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            completion = Completion(tuple(ids), tuple(logprobs), reason, self.version)
            check_completion(completion, self.vocab_size, params.banned_token_ids)
            yield Finished(wave[row // params.n], row % params.n, completion)


_Response = tuple[int, list[int], list[float], bool]


class _Log:
    """What the rows of a wave have written, and which of them still write."""

    def __init__(self, rows: int, params: SamplingParams, stop: Tensor, device: torch.device) -> None:
        self.rows = torch.arange(rows, device=device)
        """Number in the wave of each row of the batch."""
        self.stop = stop
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.taken = torch.zeros(rows, dtype=torch.bool)
        self.ids = torch.zeros(rows, params.max_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(rows, params.max_tokens, device=device)
        self.length = 0
        # Asking an accelerator whether rows have finished stops its queue.
        self.look_every = 1 if device.type == "cpu" else 8

    def add(self, index: int, ids: Tensor, logprobs: Tensor) -> int:
        """Note one token per row; returns how many rows still write (where it is not looked: as many as there are)."""
        self.ids[self.rows, index], self.logprobs[self.rows, index] = ids, logprobs
        self.length = index + 1
        self.done |= self.stop[ids]
        if index % self.look_every:
            return len(self.rows)
        return len(self.rows) - int(self.done.sum())

    def compact(self, writing: int) -> Tensor | None:
        """Rows to keep, if it is worth it: those that write, and as many finished ones as fill the quantum."""
        size = -(-writing // _ROW_QUANTUM) * _ROW_QUANTUM
        if size > _COMPACT_BELOW * len(self.rows):
            return None
        order = torch.argsort(self.done.to(torch.uint8), stable=True)
        return order[:size].sort().values

    def keep(self, rows: Tensor) -> None:
        self.rows, self.done = self.rows[rows], self.done[rows]

    def take_done(self) -> list[_Response]:
        """Finished rows not taken yet."""
        return self._take(self.rows[self.done])

    def take_all(self) -> list[_Response]:
        """Everything left; rows without a stop token reached the limit."""
        return self._take(self.rows)

    def _take(self, rows: Tensor) -> list[_Response]:
        rows = rows.cpu()
        rows = rows[~self.taken[rows]]
        self.taken[rows] = True
        there = rows.to(self.ids.device)
        stopped = self.stop[self.ids[there, : self.length]]
        # argmax gives the first of equal values: the first stop token.
        lengths = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, self.length).tolist()
        ids, logprobs = self.ids[there, : self.length].tolist(), self.logprobs[there, : self.length].tolist()
        return [
            (row, ids[i][:n], logprobs[i][:n], flag)
            for i, (row, n, flag) in enumerate(zip(rows.tolist(), lengths, stopped.any(1).tolist(), strict=True))
        ]


def _load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    torchvision_cpu.install()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model: Any = kind.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{folder}: the engine cannot load a model from it: {error}") from None
    return model.to(device).eval().requires_grad_(False)
