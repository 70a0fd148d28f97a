"""One round of requests to a vLLM engine: what is asked, and what comes back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from dapo.errors import EngineError
from dapo.rollout.engine import Begun, prompts_needed
from dapo.rollout.routed_experts import experts_of
from dapo.rollout.sampling import request_seed
from dapo.rollout.verification import check_completion
from dapo.types import Completion, Finished, FinishReason, Prompt, SamplingParams

if TYPE_CHECKING:
    from dapo.data.processor import PromptProcessor


_ROUNDS = count(1)


@dataclass
class _Request:
    """All samples of a new prompt, or one sample of a prompt asked before."""

    index: int
    """Of the prompt."""
    prompt: Prompt
    first: int
    """Sample that vLLM's output 0 is."""
    samples: int
    limit: int
    begun: Completion | None = None
    written: dict[int, Any] = field(default_factory=dict)
    """Newest output of each sample that has not ended."""

    @property
    def written_before(self) -> int:
        """Tokens of the response, by an earlier round."""
        return len(self.begun.token_ids) if self.begun else 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt, with what was written of the response before."""
        return self.prompt.token_ids + (self.begun.token_ids if self.begun else ())


class Requests:
    """Sends one round at a time.

    Args:
        engine: vLLM's `LLMEngine`.
        version: policy version that the engine holds.
        expert_layers: layers whose chosen experts the engine reports; completions carry them.
        asked: entered round each call that waits for vLLM's answer.
    """

    def __init__(
        self,
        engine: Any,
        processor: PromptProcessor,
        vocab_size: int,
        version: int,
        *,
        expert_layers: Sequence[int] = (),
        asked: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.engine, self.processor, self.expert_layers = engine, processor, expert_layers
        self.vocab_size, self.version, self._asked = vocab_size, version, asked

    def stream(self, prompts: Sequence[Prompt], params: SamplingParams, begun: Begun) -> Iterator[Finished]:
        """See `Engine.stream`."""
        open_requests: dict[str, _Request] = {}
        # A request that could not be aborted would be taken for one of the next round.
        this_round = next(_ROUNDS)
        try:
            for number, request in enumerate(_requests(prompts, params, begun)):
                # Whole outputs only, or every token as it comes: then what a request has written can be kept.
                sampling = self._sampling(params, request, each_token=params.finish_share < 1)
                name = f"{this_round}-{number}"
                open_requests[name] = request
                with self._asked():
                    self.engine.add_request(name, self._inputs(request), sampling)
            yield from self._run(open_requests, len(prompts), params)
        except BaseException as error:
            with suppress(Exception):  # an engine that died refuses this too, which would hide why
                self.engine.abort_request(list(open_requests))
            if isinstance(error, EngineError) or not isinstance(error, Exception):
                raise
            # vLLM raises many kinds; whichever it is, this round has failed.
            raise EngineError(f"vLLM failed while generating: {type(error).__name__}: {error}") from error
        self.engine.abort_request(list(open_requests))

    def _run(self, open_requests: dict[str, _Request], prompts: int, params: SamplingParams) -> Iterator[Finished]:
        missing = Counter(r.index for r in open_requests.values() for _ in range(r.samples))
        allowed = prompts - prompts_needed(prompts, params)
        while len(missing) > allowed:
            with self._asked():
                outputs = self.engine.step()
            for output in outputs:
                request = open_requests[output.request_id]
                for sample in output.outputs:
                    if sample.finish_reason is None:
                        request.written[sample.index] = sample
                        continue
                    _check(output, sample, request)
                    request.written.pop(sample.index, None)
                    missing[request.index] -= 1
                    yield self._finished(request, sample, params)
                if not missing[request.index]:
                    del missing[request.index]
                if output.finished:
                    del open_requests[output.request_id]
            if not self.engine.has_unfinished_requests() and missing:
                raise EngineError(f"vLLM ended the round with {sum(missing.values())} samples missing")
        for request in open_requests.values():
            for sample in request.written.values():
                if sample.token_ids:
                    yield self._finished(request, sample, params)

    def _finished(self, request: _Request, sample: Any, params: SamplingParams) -> Finished:
        flat, ids = sample.logprobs, tuple(sample.token_ids)
        if ids and ids[-1] in params.stop_token_ids:
            reason = FinishReason.STOP
        else:
            reason = FinishReason.UNFINISHED if sample.finish_reason is None else FinishReason.LENGTH
        experts = b""
        if self.expert_layers:
            first = request.first + sample.index == 0
            experts = experts_of(sample, request.prompt, self.expert_layers, first=first)
        logprobs = tuple(flat.logprobs[i] for i in flat.start_indices)
        completion = Completion(ids, logprobs, reason, self.version, experts=experts)
        check_completion(completion, self.vocab_size, params.banned_token_ids)
        if request.begun is not None:
            completion = request.begun.continued(completion)
        return Finished(request.index, request.first + sample.index, completion)

    def _inputs(self, request: _Request) -> dict[str, Any]:
        from dapo.data.images import decode_image

        # vLLM expands placeholders by itself; expanded ones it would silently expand again.
        inputs: dict[str, Any] = {"prompt_token_ids": self.processor.collapse(request.tokens)}
        if request.prompt.images:
            inputs["multi_modal_data"] = {"image": [decode_image(data) for data in request.prompt.images]}
        return inputs

    def _sampling(self, params: SamplingParams, request: _Request, *, each_token: bool) -> Any:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        return vllm.SamplingParams(
            n=request.samples,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=request.limit,
            # vLLM gives sample i the seed after this one plus i.
            seed=request_seed(params.seed, request.prompt.id, request.written_before) + request.first,
            logprobs=0,
            flat_logprobs=True,
            # Ours are the stop ids; the tokenizer's own would stop besides.
            ignore_eos=True,
            stop_token_ids=list(params.stop_token_ids),
            logit_bias=dict.fromkeys(params.banned_token_ids, -100.0) or None,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if each_token else RequestOutputKind.FINAL_ONLY,
        )


def _requests(prompts: Sequence[Prompt], params: SamplingParams, begun: Begun) -> Iterator[_Request]:
    """One request for a new prompt; one for each sample that is still wanted of a prompt asked before."""
    for index, prompt in enumerate(prompts):
        before = begun[index] if begun else [None] * params.n
        if not any(before):
            yield _Request(index, prompt, 0, params.n, params.max_tokens)
            continue
        for sample, completion in enumerate(before):
            written = len(completion.token_ids) if completion else 0
            if completion is None or not completion.finished:
                yield _Request(index, prompt, sample, 1, params.max_tokens - written, completion)


def _check(output: Any, sample: Any, request: _Request) -> None:
    if tuple(output.prompt_token_ids) != request.tokens:
        raise EngineError(
            f"prompt {request.prompt.id}: vLLM saw {len(output.prompt_token_ids)} tokens, the trainer has "
            f"{len(request.tokens)}; their image processors or templates differ"
        )
    if sample.finish_reason not in ("stop", "length"):
        raise EngineError(f"prompt {request.prompt.id}: vLLM gave up on a response ({sample.finish_reason})")
