"""Small Hugging Face folders for tests: the files of a model without its weights, or with a few made-up ones."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image, ImageDraw

CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PADDED_VOCAB = 320
PATCH, MERGE = 16, 2
TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.content is string %}{{- m.content }}{%- else %}{%- for c in m.content %}"
    "{%- if c.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else %}{{- c.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level tokenizer with Qwen's control tokens; returns their ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(CONTROL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL}


def write_vision_folder(folder: Path, *, longest_edge: int = 64 * 32 * 32) -> Path:
    """Tokenizer, processor and configuration of a small Qwen3-VL; its output has columns beyond the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder)
    config = {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "text_config": {"model_type": "qwen3_vl_text", "vocab_size": PADDED_VOCAB, "hidden_size": 64},
        "vision_config": {
            "model_type": "qwen3_vl",
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    base = {
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "processor_class": "Qwen3VLProcessor",
    }
    size = {"shortest_edge": 32 * 32, "longest_edge": longest_edge}
    image = base | {"image_processor_type": "Qwen2VLImageProcessorFast", "size": size}
    video = base | {"video_processor_type": "Qwen3VLVideoProcessor", "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder


def write_text_folder(folder: Path) -> Path:
    """Tokenizer and configuration of a small text-only Qwen3."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": PADDED_VOCAB}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def image_bytes(
    width: int = 40, height: int = 40, *, number: int = 0, file_format: str = "PNG", mode: str = "RGB"
) -> bytes:
    """An encoded image; different numbers give different images."""
    image = Image.new("RGB", (width, height), "white")
    corner = (width - 1 - number % max(1, width // 2), height - 1)
    ImageDraw.Draw(image).rectangle((0, 0, *corner), outline="black", fill=(number % 256, 90, 30))
    out = io.BytesIO()
    image.convert(mode).save(out, file_format)
    return out.getvalue()
