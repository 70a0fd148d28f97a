"""Tiny random models as Hugging Face folders in the hub's layout, and plain data to run through them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from dapo.model.load import EXPERT_SUFFIXES
from dapo.types import Prompt, TrainBatch, TrainGroup, TrainSequence

VOCABULARY, IMAGE, START, END = 64, 60, 61, 62
PATCH = 4
LAYERS, EXPERTS, CHOICES = 2, 6, 2
BANNED = (59, IMAGE, START, END, 63)


def make_folder(folder: Path, kind: str, *, seed: int = 0, tied: bool = False, expert_size: int = 20) -> Path:
    """A `dense` or `moe` Qwen3-VL, a `text` or `text-moe` Qwen3, with lively random weights.

    Args:
        expert_size: intermediate size of each expert; 16 makes their fused tensor square.
    """
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
    }
    experts = {
        "moe_intermediate_size": expert_size,
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOICES,
        "mlp_only_layers": [],
    }
    torch.manual_seed(seed)
    if kind == "text-moe":
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**text | experts, norm_topk_prob=True))
    elif kind == "text":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text))
    else:
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        }
        vision = {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        }
        ids = {
            "image_token_id": IMAGE,
            "video_token_id": 63,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
        }
        if kind == "moe":
            config = transformers.Qwen3VLMoeConfig(
                text_config=text | experts, vision_config=vision, tie_word_embeddings=tied, **ids
            )
            model = transformers.Qwen3VLMoeForConditionalGeneration(config)
        else:
            config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)
            model = transformers.Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float32
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = {name: p.detach() for name, p in model.named_parameters()}
    save_file(hub_tensors(state, kind), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def hub_tensors(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Experts as the hub's files hold them: transposed for Qwen3-VL-MoE, one by one for Qwen3-MoE."""
    if kind == "moe":
        return {n: p.transpose(1, 2).contiguous() if n.endswith(EXPERT_SUFFIXES) else p for n, p in state.items()}
    hub = {}
    for name, tensor in state.items():
        experts, _, part = name.rpartition(".")
        if not name.endswith(EXPERT_SUFFIXES):
            hub[name] = tensor
        elif part == "gate_up_proj":
            for i, (gate, up) in enumerate(expert.chunk(2) for expert in tensor):
                hub |= {f"{experts}.{i}.gate_proj.weight": gate.clone(), f"{experts}.{i}.up_proj.weight": up.clone()}
        else:
            hub |= {f"{experts}.{i}.down_proj.weight": down.clone() for i, down in enumerate(tensor)}
    return hub


class TinyProcessor:
    """Pixels are random numbers seeded by the image's bytes."""

    merge_size = 2
    vocab_size = VOCABULARY
    banned_token_ids = BANNED

    def __init__(self, kind: str = "dense", dtype: torch.dtype = torch.float32) -> None:
        self.image_token_id = None if kind.startswith("text") else IMAGE
        self.dtype = dtype

    def vision_inputs(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        parts, grids = [], []
        for prompt in prompts:
            for data, grid in zip(prompt.images, prompt.image_grids, strict=True):
                generator = torch.Generator().manual_seed(int.from_bytes(data, "big"))
                t, h, w = grid
                parts.append(torch.randn(t * h * w, 3 * 2 * PATCH * PATCH, generator=generator, dtype=torch.float64))
                grids.append(grid)
        return torch.cat(parts).to(self.dtype), torch.tensor(grids)


def make_batch(
    *,
    groups: int = 4,
    size: int = 3,
    per_update: int = 2,
    images: str = "all",
    lengths: tuple[int, int] = (1, 12),
    seed: int = 0,
    experts: bool = False,
) -> TrainBatch:
    """Ragged prompts and responses. `images`: all, none or some (every second prompt). `experts`: random choices of the
    engine, in the first response of every prompt for a part of the prompt, too."""
    rng, choice = random.Random(seed), random.Random(seed)

    def record(tokens: int) -> bytes:
        pairs = [choice.sample(range(EXPERTS), CHOICES) for _ in range(tokens * LAYERS)]
        return bytes(expert for pair in pairs for expert in pair) if experts else b""

    made = []
    for number in range(groups):
        with_image = images == "all" or (images == "some" and number % 2 == 0)
        grids = ((1, 4, rng.choice((2, 4, 6))),) if with_image else ()
        ids = [rng.randrange(1, 59) for _ in range(rng.randint(3, 9))]
        for _, h, w in grids:
            ids[2:2] = [START, *[IMAGE] * (h * w // 4), END]
        blobs = tuple(bytes([number + 1, i]) for i in range(len(grids)))
        prompt = Prompt(f"train/{number}", tuple(ids), blobs, grids, answer="1", question="?")
        sequences = tuple(
            TrainSequence(
                response_ids=tuple(rng.randrange(1, 59) for _ in range(n)),
                advantage=rng.gauss(0, 1),
                rollout_logprobs=tuple(-rng.random() * 4 for _ in range(n)),
                trained=rng.random() < 0.9,
                experts=record(n - 1 + 2 * (index == 0)),
            )
            for index, n in enumerate(rng.randint(*lengths) for _ in range(size))
        )
        made.append(TrainGroup(prompt, sequences))
    updates = tuple(tuple(range(i, min(i + per_update, groups))) for i in range(0, groups, per_update))
    return TrainBatch(tuple(made), updates, policy_version=0)


@contextmanager
def exact_float64() -> Iterator[None]:
    """Where transformers computes in float32 on purpose (norms, rotary tables, routers), compute in float64.

    Without it, a difference of 1e-16 before such a rounding can become one of 1e-8 behind it, whoever is right.
    """
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, functional.softmax

    def wider(args, kwargs):
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return tuple(torch.float64 if a is torch.float32 else a for a in args), kwargs

    def to_wider(tensor, *args, **kwargs):
        args, kwargs = wider(args, kwargs)
        return to(tensor, *args, **kwargs)

    def softmax_wider(tensor, *args, **kwargs):
        args, kwargs = wider(args, kwargs)
        return softmax(tensor, *args, **kwargs)

    # Not a TorchFunctionMode: that would be off while gradient checkpointing recomputes.
    torch.Tensor.to, torch.Tensor.float, functional.softmax = to_wider, torch.Tensor.double, softmax_wider
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, functional.softmax = to, to_float, softmax
