"""The transformers engine: real transformers modules, our own decode loop. Needs nothing that training does not need.

A prompt and its images are encoded once for all its samples, finished rows leave the batch, and a request's random
stream depends on (seed, prompt id, sample) alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dapo import torchvision_cpu
from dapo.errors import EngineError, WeightsError
from dapo.model.tensors import absolute_sum
from dapo.rollout.decode_batch import DecodeBatch, Job, Response, make_jobs
from dapo.rollout.decoder import Cache, Decoder
from dapo.rollout.engine import Begun, collected, prompts_needed
from dapo.rollout.routed_experts import RoutedExperts
from dapo.rollout.sampling import Sampler, request_seed, uniforms
from dapo.rollout.verification import check_completion, kept_sums
from dapo.types import Completion, Finished, Prompt, SamplingParams

if TYPE_CHECKING:
    from dapo.data.processor import PromptProcessor

_PROMPT_QUANTUM = 8


class TransformersEngine:
    """`Engine` on transformers' Qwen3, Qwen3-MoE, Qwen3-VL and Qwen3-VL-MoE.

    Args:
        weights: a Hugging Face folder.
        processor: of the same folder; gives pixels and placeholder ids.
        dtype: of weights and cache.
        max_num_seqs: sequences decoded together.
        kv_cache_mib: upper bound of the key-value cache; fewer sequences are decoded together where it would not fit.
        return_routed_experts: completions say which experts were chosen (`Completion.experts`).

    Raises:
        WeightsError: the folder holds no such model.
        ConfigError: experts are asked for and there are none.
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
        return_routed_experts: bool = False,
    ) -> None:
        self.processor = processor
        self.device = torch.device(device)
        self.max_num_seqs, self.kv_cache_bytes = max_num_seqs, kv_cache_mib * 2**20
        self.model = _load(Path(weights), dtype, self.device)
        body = self.model.model
        text = getattr(body, "language_model", body)
        self._visual = getattr(body, "visual", None)
        self._decoder = Decoder(text, self.model.lm_head, multimodal=self._visual is not None)
        self._experts = RoutedExperts(self.model) if return_routed_experts else None
        self._weights = dict(self.model.state_dict())
        self._sums: dict[str, float] = {}
        self.vocab_size = int(self.model.lm_head.weight.shape[0])
        self.version = 0

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[Completion]]:
        return collected(self.stream(prompts, params), len(prompts), params.n)

    @torch.no_grad()
    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun = ()) -> Iterator[Finished]:
        """See `Engine.stream`. Responses are given when their batch notices that they ended."""
        if params.max_tokens < 1 or params.n < 1:
            raise EngineError(f"max_tokens={params.max_tokens} and n={params.n} must be at least 1")
        jobs = make_jobs(prompts, params, begun)
        missing = Counter(job.index for job in jobs for _ in job.samples)
        allowed = len(prompts) - prompts_needed(len(prompts), params)
        for wave in self._waves(jobs, in_order=params.finish_share < 1):
            for done in self._wave(wave, params, enough=lambda: len(missing) <= allowed):
                if done.completion.finished:
                    missing[done.prompt] -= 1
                    if not missing[done.prompt]:
                        del missing[done.prompt]
                yield done
            if len(missing) <= allowed:
                return

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: int, unchanged: Collection[str] = ()
    ) -> None:
        """Copy in place. Nothing depends on old weights afterwards: caches live for one `generate` only.

        Raises:
            EngineError: a name is unknown or a shape differs, or a tensor of the model was not given.
        """
        self._sums = kept_sums(self._sums, unchanged)
        missing = set(self._weights).difference(unchanged)
        with torch.no_grad():
            for name, tensor in weights:
                target = self._weights.get(name)
                if target is None or target.shape != tensor.shape:
                    has = "no such tensor" if target is None else f"one of shape {tuple(target.shape)}"
                    raise EngineError(f"weight sync: {name} of shape {tuple(tensor.shape)}: the engine has {has}")
                target.copy_(tensor)
                self._sums[name] = absolute_sum(tensor)
                missing.discard(name)
        # A tied head is one tensor under two names.
        pointers = {self._weights[name].data_ptr() for name in set(self._weights) - missing}
        missing = {name for name in missing if self._weights[name].data_ptr() not in pointers}
        if missing:
            raise EngineError(f"weight sync: {len(missing)} tensors did not arrive, the first: {min(missing)}")
        self._decoder.refresh()
        self.version = version

    def fingerprint(self) -> dict[str, float]:
        """Of what was given last, before it is rounded to the engine's dtype. Empty before the first update."""
        return dict(self._sums)

    def sleep(self) -> int | None:
        """Nothing to free: the cache lives for one `generate`, and the weights are small where this engine is used."""

    def wake(self) -> bool:
        """See `sleep`."""
        return False

    def close(self) -> None:
        self._weights.clear()
        del self.model, self._decoder, self._visual

    # one wave: prompts decoded together

    def _waves(self, jobs: Sequence[Job], *, in_order: bool) -> Iterator[list[Job]]:
        """Jobs whose samples fit the batch and the cache together; of equally many samples, and of similar length."""
        layer = self._decoder.layers[0]
        per_token = 2 * layer.kv_heads * layer.head_dim * len(self._decoder.layers) * self._decoder.dtype.itemsize
        # Responses that go on come first. Where a round may end early, the order asked decides, oldest first: else the
        # same prompts would be left over every time.
        order = sorted(jobs, key=lambda job: (len(job.samples), job.index if in_order else -len(job.prompt.token_ids)))
        while order:
            first = order[0]
            samples = len(first.samples)
            tokens = len(first.prompt.token_ids) + samples * max(job.limit for job in order)
            fit = max(1, min(self.max_num_seqs // samples, self.kv_cache_bytes // (per_token * tokens)))
            count = min(fit, sum(len(job.samples) == samples for job in order))
            yield order[:count]
            order = order[count:]

    def _wave(self, wave: list[Job], params: SamplingParams, enough: Callable[[], bool]) -> Iterator[Finished]:
        samples, longest = len(wave[0].samples), max(job.limit for job in wave)
        logits, cache = self._prefill([job.prompt for job in wave], samples)
        if self._experts is not None:
            lengths = torch.tensor([len(job.prompt.token_ids) for job in wave], device=self.device)
            width = cache.prompt[0][0].shape[2]
            last = torch.arange(len(wave), device=self.device) * width + lengths - 1
            self._experts.begin(last, samples, longest)
        logits = logits.repeat_interleave(samples, dim=0)
        seeds = [request_seed(params.seed, job.prompt.id, job.written) + s for job in wave for s in job.samples]
        sampler = Sampler(params, self.vocab_size, self.device)
        stop = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
        stop[[i for i in params.stop_token_ids if 0 <= i < self.vocab_size]] = True
        table = self._decoder.angles(self._positions(int(cache.positions.max()) + longest))
        limits = torch.tensor([job.limit for job in wave for _ in job.samples], device=self.device)
        log = DecodeBatch(limits, stop)
        uniform, writing = torch.empty(0, 0), len(seeds)
        for index in range(longest):
            column = index % 64
            if column == 0:
                uniform = torch.from_numpy(uniforms(seeds, index, min(64, longest - index))).to(self.device)
            ids, logprobs = sampler(logits, uniform[log.rows, column])
            still, writing = writing, log.add(index, ids, logprobs)
            if index + 1 == longest or not writing:
                break
            keep = log.compact(writing)
            if keep is not None or (params.finish_share < 1 and writing < still):
                yield from self._finished(log.take_done(), wave, params)
                if enough():
                    break
            if keep is not None:
                log.keep(keep)
                cache.keep(keep, index)
                ids = ids[keep]
            logits = self._decoder.step(ids, cache, index, longest, table)
            if self._experts is not None:
                self._experts.add(index, log.rows)
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

    def _finished(self, ended: list[Response], wave: list[Job], params: SamplingParams) -> Iterator[Finished]:
        samples = len(wave[0].samples)
        for row, ids, logprobs, reason in ended:
            job = wave[row // samples]
            sample, experts = job.samples[row % samples], b""
            if self._experts is not None:
                experts = self._experts.of(row, len(ids), first=sample == 0)
            completion = Completion(tuple(ids), tuple(logprobs), reason, self.version, experts=experts)
            check_completion(completion, self.vocab_size, params.banned_token_ids)
            if job.begun is not None:
                completion = job.begun.continued(completion)
            yield Finished(job.index, sample, completion)


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
