"""Small random models with a real tokenizer and processor, prompts for them, and log-probabilities by plain forward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from dapo.data.processor import PromptProcessor
from dapo.types import Completion, FinishReason, Prompt, SamplingParams
from tests.data.folders import PADDED_VOCAB, image_bytes, write_text_folder, write_vision_folder

LETTERS = tuple(range(ord("!") - 33, ord("!") - 33 + 30))
"""Ids of 30 letters of the byte alphabet: as stop ids they end random responses early, at different lengths."""


def make_folder(folder: Path, kind: str, *, seed: int = 0, tied: bool = False) -> Path:
    """A `dense` or `moe` Qwen3-VL, a `text` Qwen3 or a `text_moe` Qwen3-MoE that vLLM takes as well; `square_moe` is a
    `moe` whose experts' gate and up projections have the same shape when transposed."""
    torch.manual_seed(seed)
    text: dict[str, Any] = {
        "vocab_size": PADDED_VOCAB,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
    }
    experts = {
        "moe_intermediate_size": 32 if kind == "square_moe" else 96,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    model: Any
    if kind.startswith("text"):
        write_text_folder(folder)
        if kind == "text":
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text))
        else:
            model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**text, **experts))
    else:
        write_vision_folder(folder)
        rope = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        }
        vision = {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 16,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        written = json.loads((folder / "config.json").read_text())
        ids = {name: value for name, value in written.items() if name.endswith("_token_id")}
        shared = {"vision_config": vision, "tie_word_embeddings": tied, **ids}
        if kind in ("moe", "square_moe"):
            config = transformers.Qwen3VLMoeConfig(text_config=text | experts | {"rope_parameters": rope}, **shared)
            model = transformers.Qwen3VLMoeForConditionalGeneration(config)
        else:
            config = transformers.Qwen3VLConfig(text_config=text | {"rope_parameters": rope}, **shared)
            model = transformers.Qwen3VLForConditionalGeneration(config)
    model.requires_grad_(False)
    shake(model, 0.15, seed)
    model.config.dtype = torch.float32
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if kind == "text_moe":
        model.save_pretrained(folder)
    else:
        state = {name: hub_layout(name, p) for name, p in model.named_parameters()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hub_layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Experts as hub files have them: transposed to transformers' parameters."""
    fused = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return tensor.transpose(1, 2).contiguous() if fused else tensor


@torch.no_grad()
def shake(model: Any, size: float, seed: int) -> None:
    """Add noise to all matrices: lively distributions, or an optimiser update that one can see."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def load_plain(folder: Path) -> Any:
    """The same weights in unchanged transformers."""
    config = transformers.AutoConfig.from_pretrained(folder)
    vision = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def make_prompts(processor: PromptProcessor, count: int = 5) -> list[Prompt]:
    """Different lengths; images of different sizes (two of them in every fourth prompt) where the model sees."""
    prompts = []
    for i in range(count):
        images: tuple[bytes, ...] = ()
        if processor.has_images:
            sizes = ((40, 40), (70, 40), (64, 96), (40, 40))
            images = tuple(image_bytes(*sizes[(i + k) % 4], number=3 * i + k) for k in range(2 if i % 4 == 3 else 1))
        encoded = processor.encode(f"a={i} b={7 * i % 11}" + " and then" * (i % 3) + " area?", images)
        prompts.append(Prompt(f"train/{i}", encoded.token_ids, images, encoded.grids, answer="1", question="?"))
    return prompts


def sampling(processor: PromptProcessor, **changes: Any) -> SamplingParams:
    """Eight short samples that end by chance."""
    values: dict[str, Any] = {
        "n": 4,
        "temperature": 0.8,
        "top_p": 1.0,
        "top_k": -1,
        "max_tokens": 24,
        "stop_token_ids": (*processor.stop_token_ids, *LETTERS),
        "banned_token_ids": processor.banned_token_ids,
        "seed": 7,
    }
    return SamplingParams(**(values | changes))


def distributions(model: Any, processor: PromptProcessor, prompt: Prompt, response: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] at the response's tokens by one plain forward over the whole sequence; banned ids at -inf."""
    ids = torch.tensor([[*prompt.token_ids, *response]])
    inputs: dict[str, Any] = {}
    if prompt.images:
        pixels, grids = processor.vision_inputs([prompt])
        in_prompt = torch.arange(ids.shape[1]) < len(prompt.token_ids)
        kinds = ((ids == processor.image_token_id) & in_prompt).int()
        inputs = {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs).logits[0].float()
    logits[:, list(processor.banned_token_ids)] = -torch.inf
    return logits[len(prompt.token_ids) - 1 : -1]


def largest_gap(
    model: Any,
    processor: PromptProcessor,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    temperature: float,
) -> float:
    """Largest |log-prob of the engine - log-prob by plain forward|, nats."""
    gaps = []
    for prompt, group in zip(prompts, completions, strict=True):
        for one in group:
            logits = distributions(model, processor, prompt, one.token_ids) / temperature
            plain = torch.log_softmax(logits, -1).gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
            gaps.append((plain - torch.tensor(one.logprobs)).abs().max())
    return float(torch.stack(gaps).max())


def in_rounds(engine: Any, prompts: list[Prompt], params: SamplingParams) -> tuple[list[list[Completion]], int]:
    """All responses, written in as many rounds as it takes, each by a policy version of its own; and the rounds."""
    begun: list[list[Completion | None]] = [[None] * params.n for _ in prompts]
    rounds = 0
    while not all(one is not None and one.finished for group in begun for one in group):
        engine.version = rounds
        open_prompts = [i for i, group in enumerate(begun) if not all(one and one.finished for one in group)]
        asked = [prompts[i] for i in open_prompts]
        for done in engine.stream(asked, params, [begun[i] for i in open_prompts]):
            before = begun[open_prompts[done.prompt]][done.sample]
            assert before is None or not before.finished
            begun[open_prompts[done.prompt]][done.sample] = done.completion
        rounds += 1
    engine.version = 0
    return [[one for one in group if one is not None] for group in begun], rounds


def check_partial_rollouts(engine: Any, trainer: Any, processor: PromptProcessor, exact: float) -> None:
    """What is written in several rounds is what one round would have written, and its log-probs are exact."""
    prompts = make_prompts(processor, 6)
    greedy = sampling(processor, n=1, temperature=0.0, max_tokens=20, stop_token_ids=())
    first = [
        [replace(one, finish_reason=FinishReason.UNFINISHED) for one in group]
        for group in engine.generate(prompts, replace(greedy, max_tokens=7))
    ]
    whole = engine.generate(prompts, greedy)
    for done in engine.stream(prompts, greedy, first):
        assert done.completion.token_ids == whole[done.prompt][done.sample].token_ids
    params = sampling(processor, n=2, max_tokens=60, finish_share=0.3, stop_token_ids=LETTERS[:4])
    out, rounds = in_rounds(engine, prompts, params)
    continued = [one for group in out for one in group if one.versions]
    assert rounds > 1
    assert continued
    for one in continued:
        assert [version for version, _ in one.versions] == sorted({version for version, _ in one.versions})
        assert sum(count for _, count in one.versions) == len(one.token_ids) == len(one.logprobs)
        assert one.policy_version == one.versions[0][0]
        assert len(one.token_ids) <= params.max_tokens
        assert (one.finish_reason is FinishReason.LENGTH) == (one.token_ids[-1] not in params.stop_token_ids)
    assert largest_gap(trainer, processor, prompts, out, params.temperature) < exact
    check_rest_draws_other_numbers(engine, trainer, processor)


def check_rest_draws_other_numbers(engine: Any, trainer: Any, processor: PromptProcessor) -> None:
    """Also where it is asked for with the seed of its beginning, as after an engine died in the middle of a round."""
    prompts, version = make_prompts(processor, 4), engine.version
    params = sampling(processor, n=1, max_tokens=16, stop_token_ids=())
    # All tokens are equally likely: which one is drawn shows the number.
    flat = ((name, torch.zeros_like(p) if name == "lm_head.weight" else p) for name, p in trainer.named_parameters())
    engine.update_weights(flat, version)
    half = engine.generate(prompts, replace(params, max_tokens=8))
    begun = [[replace(one, finish_reason=FinishReason.UNFINISHED) for one in group] for group in half]
    for done in engine.stream(prompts, params, begun):
        first, rest = done.completion.token_ids[:8], done.completion.token_ids[8:]
        assert sum(a == b for a, b in zip(first, rest, strict=True)) < 3
    engine.update_weights(trainer.named_parameters(), version)
