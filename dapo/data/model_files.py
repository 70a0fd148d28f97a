"""The files of a Hugging Face folder that turn questions into ids: configuration, tokenizer, processor, template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dapo import torchvision_cpu
from dapo.errors import WeightsError


def load_config(folder: Path) -> Any:
    """config.json as transformers' configuration.

    Raises:
        WeightsError: it is missing or not understood.
    """
    torchvision_cpu.install()
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise WeightsError(f"{folder} has no config.json: it is not a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder}/config.json cannot be read: {error}") from None


def load_processor(folder: Path, config: Any) -> tuple[Any, Any, str | None]:
    """Tokenizer, image processor (None for a text-only model) and chat template.

    Raises:
        WeightsError: their files are missing or not understood.
    """
    from transformers import AutoProcessor, AutoTokenizer

    sees = getattr(config, "vision_config", None) is not None
    loader = AutoProcessor if sees else AutoTokenizer
    try:
        loaded = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = "processor" if sees else "tokenizer"
        raise WeightsError(f"{folder}: the model's {what} cannot be loaded: {error}") from None
    if not sees:
        return loaded, None, loaded.chat_template
    return loaded.tokenizer, loaded.image_processor, loaded.chat_template or loaded.tokenizer.chat_template


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json, empty where there is none."""
    path = folder / "generation_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}
