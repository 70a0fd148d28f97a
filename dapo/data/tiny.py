"""A small real Qwen3-VL made on the spot: random weights, own tokenizer, own processor, warmed up on synthetic figures.

The folder is an ordinary Hugging Face one; transformers and vLLM load it like a downloaded model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo import torchvision_cpu
from dapo.config.model import TinyModel
from dapo.data import synthetic
from dapo.data.storage import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATCH_PIXELS, MERGE = 8, 2
_CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Text like any other to a decoder that skips control tokens: graders look for them.
_THINK = ("<think>", "</think>")
_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.content is string %}{{- m.content }}{%- else %}{%- for c in m.content %}"
    "{%- if c.type == 'image' or 'image' in c or 'image_url' in c %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif c.type == 'video' or 'video' in c %}{{- '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{%- elif 'text' in c %}{{- c.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def tiny_key(source: TinyModel) -> str:
    """16 hex digits of everything that decides the weights: the settings and the code that makes them."""
    here = Path(__file__).parent
    digest = hashlib.sha256(source.model_dump_json().encode())
    for name in ("synthetic.py", "tiny.py", "warmup.py"):
        digest.update((here / name).read_bytes())
    return digest.hexdigest()[:16]


def make_tiny(source: TinyModel, folder: Path, progress: Progress) -> Path:
    """Make the model in `folder`, or leave it as it is where it exists: it is renamed into place when it is whole.

    Args:
        source: architecture, seed and warm-up.
        folder: should have `tiny_key(source)` in its name, else another model may be there already.
        progress: called after every supervised step.

    Returns:
        `folder`.
    """
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(source, partial, progress)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster and made the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write(source: TinyModel, folder: Path, progress: Progress) -> None:
    torchvision_cpu.install()
    import torch

    from dapo.data.warmup import warm_up

    vocabulary = _write_processor(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        model = build_model(source.architecture, vocabulary)
        model.config.save_pretrained(folder)
        if source.warmup_steps:
            warm_up(model, folder, source, progress)
    _save_model(model, folder)


def build_model(architecture: str, vocabulary: dict[str, int]) -> PreTrainedModel:
    """The network with random float32 weights, of about a million parameters (dense).

    Args:
        architecture: dense or moe.
        vocabulary: all tokens; the output has exactly as many columns, so that no id outside can be sampled.
    """
    import transformers

    # vLLM takes head sizes of 32, 64, ... only, and mrope_section must sum to half of it. No hidden size may equal an
    # expert's width or twice it: the shapes distinguish the two expert layouts on disk.
    text: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        "pad_token_id": vocabulary["<|endoftext|>"],
        "eos_token_id": vocabulary["<|im_end|>"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": PATCH_PIXELS,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": (synthetic.IMAGE_PIXELS // PATCH_PIXELS) ** 2,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.05,
    }
    shared: dict[str, Any] = {
        "vision_config": vision,
        "image_token_id": vocabulary["<|image_pad|>"],
        "video_token_id": vocabulary["<|video_pad|>"],
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    model: PreTrainedModel
    if architecture == "moe":
        text |= {
            "moe_intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,  # transformers always normalises and has no such field; vLLM reads it
        }
        moe = transformers.Qwen3VLMoeConfig(text_config=text, **shared)
        model = transformers.Qwen3VLMoeForConditionalGeneration(moe)
    else:
        dense = transformers.Qwen3VLConfig(text_config=text, **shared)
        model = transformers.Qwen3VLForConditionalGeneration(dense)
    model.generation_config.update(
        do_sample=True, eos_token_id=vocabulary["<|im_end|>"], pad_token_id=vocabulary["<|endoftext|>"]
    )
    return model


def _write_processor(folder: Path) -> dict[str, int]:
    """Tokenizer, chat template, image and video processor; returns the vocabulary."""
    tokenizer = _make_tokenizer()
    tokenizer.save_pretrained(folder)
    area = (PATCH_PIXELS * MERGE) ** 2
    base = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": PATCH_PIXELS,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        # From one image feature to 64 of them.
        "size": {"shortest_edge": area, "longest_edge": 64 * area},
    }
    image = base | {"image_processor_type": "Qwen2VLImageProcessorFast"}
    video = base | {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2, "min_frames": 4, "max_frames": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2))
    return tokenizer.get_vocab()


def _make_tokenizer() -> Any:
    """Byte-level like Qwen's, digits one by one, with merges for the words of the synthetic questions."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=alphabet, show_progress=False, min_frequency=2, special_tokens=[]
    )
    exercises = [e for kind in synthetic.exercises().values() for e in kind]
    texts = [f"{e.text}\n{e.formula()}\n\\boxed{{{e.answer()}}}" for e in exercises]
    raw.train_from_iterator([*texts, *["system user assistant"] * 2], trainer)
    model = json.loads(raw.to_str())["model"]
    make: Any = Qwen2Tokenizer  # its annotations ask for strings where it takes pairs
    tokenizer = make(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(_CONTROL),
        chat_template=_TEMPLATE,
        model_max_length=4096,
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _THINK])
    return tokenizer


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    if model.config.model_type.endswith("moe"):
        # On the hub experts lie transposed to what transformers 5 writes; vLLM reads only that, transformers both.
        from safetensors.torch import load_file, save_file

        experts = ("experts.gate_up_proj", "experts.down_proj")
        tensors = {
            name: tensor.transpose(1, 2).contiguous() if name.endswith(experts) else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read; the cache is shared.
    path.chmod((folder / "config.json").stat().st_mode & 0o777)
