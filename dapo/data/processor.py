"""The model's own tokenizer, chat template and image processor: the one way from a question to token ids and pixels.

Lengths come from image headers and the model's resize rule, pixels from the image processor when a batch needs them;
`vision_inputs` checks that both agree. The trainer and the engine are given the ids made here.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dapo.data.images import IMAGE_MARKER, decode_image, image_size
from dapo.data.model_files import generation_config, load_config, load_processor
from dapo.errors import DataError, WeightsError
from dapo.types import Prompt

if TYPE_CHECKING:
    import torch

Grid = tuple[int, int, int]


class Encoded(NamedTuple):
    """A question as the model reads it: ids with one placeholder per image feature, and (t, h, w) patches per image."""

    token_ids: tuple[int, ...]
    grids: tuple[Grid, ...]


class PromptProcessor:
    """Tokenizer and image processor of one Hugging Face folder; text-only models have no image processor.

    Args:
        weights_folder: holds config.json, the tokenizer's files and, for a vision model, preprocessor_config.json.
        cache_mib: pixels of recently used images kept by `vision_inputs`.

    Raises:
        WeightsError: files are missing or contradict each other.
    """

    def __init__(self, weights_folder: Path | str, *, cache_mib: int = 256) -> None:
        self.folder = Path(weights_folder)
        self._config = load_config(self.folder)
        self._tokenizer, self._image_processor, self._template = load_processor(self.folder, self._config)
        self._pixels: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._pixel_bytes, self._max_pixel_bytes = 0, cache_mib * 2**20
        self._grid_of_size = lru_cache(maxsize=65536)(self._measure)
        self._check()

    # ids

    def encode(self, question: str, images: Sequence[bytes] = (), instruction: str = "") -> Encoded:
        """One question through the chat template; see `encode_many`."""
        return self.encode_many([(question, images)], instruction)[0]

    def encode_many(self, items: Sequence[tuple[str, Sequence[bytes]]], instruction: str = "") -> list[Encoded]:
        """Questions with their images through the chat template, ready for an answer.

        Args:
            items: (question, encoded images). `<image>` in the question says where an image stands.
            instruction: appended to every question after a space; empty: nothing is appended.

        Raises:
            DataError: markers and images differ in number, an image is unreadable, the text contains a control token
                of the model, or images are given to a text-only model.
        """
        if not items:
            return []
        conversations = [[{"role": "user", "content": self._content(q, im, instruction)}] for q, im in items]
        texts = self._tokenizer.apply_chat_template(
            conversations, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        collapsed = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [self._expand(ids, images) for ids, (_, images) in zip(collapsed, items, strict=True)]

    def collapse(self, token_ids: Iterable[int]) -> list[int]:
        """Ids with one placeholder per image: what an engine that expands by itself must be given."""
        out: list[int] = []
        for token, run in groupby(token_ids):
            out.extend([token] if token == self.image_token_id else run)
        return out

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without control tokens."""
        return self.decode_many([token_ids])[0]

    def decode_many(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Text of each response without control tokens."""
        texts: list[str] = self._tokenizer.batch_decode(
            [list(ids) for ids in responses], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    # pixels

    def vision_inputs(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels of all images of all prompts, in order.

        Returns:
            pixel_values [patches, patch_dim] float32 and grid_thw [images, 3] int64; both empty without images.
        """
        import torch

        files = [data for prompt in prompts for data in prompt.images]
        grids = [grid for prompt in prompts for grid in prompt.image_grids]
        if not files:
            return torch.empty(0, 0), torch.empty(0, 3, dtype=torch.long)
        keys = [hashlib.sha256(data).digest() for data in files]
        missing = {key: data for key, data in zip(keys, files, strict=True) if key not in self._pixels}
        found = {key: self._pixels[key] for key in keys if key in self._pixels}
        found |= self._read_pixels(missing)
        for key, grid in zip(keys, grids, strict=True):
            assert len(found[key]) == grid[0] * grid[1] * grid[2], "an image has other patches than its prompt says"
        self._remember(found)
        return torch.cat([found[key] for key in keys]), torch.tensor(grids, dtype=torch.long)

    def _read_pixels(self, files: dict[bytes, bytes]) -> dict[bytes, torch.Tensor]:
        if not files:
            return {}
        decoded = [decode_image(data) for data in files.values()]
        batch = self._image_processor(images=decoded, return_tensors="pt")
        patches = batch["image_grid_thw"].prod(dim=1).tolist()
        # Own memory for each image: a view would keep the whole batch alive in the cache.
        return {key: part.clone() for key, part in zip(files, batch["pixel_values"].split(patches), strict=True)}

    def _remember(self, found: dict[bytes, torch.Tensor]) -> None:
        for key, pixels in found.items():
            if key not in self._pixels:
                self._pixel_bytes += pixels.nbytes
            self._pixels[key] = pixels
            self._pixels.move_to_end(key)
        while self._pixel_bytes > self._max_pixel_bytes:
            _, oldest = self._pixels.popitem(last=False)
            self._pixel_bytes -= oldest.nbytes

    # what the model's files say

    @property
    def has_images(self) -> bool:
        """Whether the model sees images at all."""
        return self._image_processor is not None

    @cached_property
    def image_token_id(self) -> int | None:
        """The image placeholder; None for a text-only model."""
        return getattr(self._config, "image_token_id", None)

    @cached_property
    def merge_size(self) -> int:
        """Patches along one side of the square that becomes one image feature; 1 for a text-only model."""
        return int(self._image_processor.merge_size) if self.has_images else 1

    @cached_property
    def vocab_size(self) -> int:
        """Columns of the model's output, padding included."""
        return int(self._config.get_text_config().vocab_size)

    @cached_property
    def pad_token_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return int(self.stop_token_ids[0] if pad is None else pad)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's own first, then those of generation_config.json."""
        ids = [self._tokenizer.eos_token_id, *_as_list(generation_config(self.folder).get("eos_token_id"))]
        return tuple(dict.fromkeys(int(token) for token in ids if token is not None))

    @cached_property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Ids no response may contain: the vision tokens, and columns of the output that are no token at all."""
        known = self._tokenizer.get_vocab()
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        vision = {getattr(self._config, name, None) for name in names}
        vision |= {known.get(token) for token in ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")}
        vision |= {known.get(token) for token in ("<|image_pad|>", "<|video_pad|>")}
        padding = set(range(self.vocab_size)).difference(known.values())
        banned = {token for token in vision if token is not None and token < self.vocab_size} | padding
        return tuple(sorted(banned.difference(self.stop_token_ids)))

    # helpers

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        added = self._tokenizer.added_tokens_decoder.values()
        return tuple(str(token) for token in added if token.special)

    def _content(self, question: str, images: Sequence[bytes], instruction: str) -> Any:
        text = f"{question} {instruction}" if instruction else question
        for token in self._control_tokens:
            if token in text:
                raise DataError(f"the text {text[:80]!r} contains the model's control token {token!r}; remove the row")
        if images and not self.has_images:
            raise DataError(f"the question {question[:80]!r} has {len(images)} images but {self.folder} is text-only")
        if not images and IMAGE_MARKER not in text:
            return text if not self.has_images else [{"type": "text", "text": text}]
        parts = text.split(IMAGE_MARKER) if IMAGE_MARKER in text else [""] * len(images) + [text]
        if len(parts) - 1 != len(images):
            raise DataError(
                f"the question {question[:80]!r} has {len(parts) - 1} {IMAGE_MARKER} markers and {len(images)} images; "
                "they must be equal in number (or no marker at all: then the images come first)"
            )
        content: list[dict[str, str]] = []
        for position, part in enumerate(parts):
            content += [{"type": "image"}] if position else []
            content += [{"type": "text", "text": part}] if part else []
        return content

    def _expand(self, ids: Sequence[int], images: Sequence[bytes]) -> Encoded:
        grids = tuple(self._grid_of_size(*image_size(data)) for data in images)
        out: list[int] = []
        seen = 0
        for token in ids:
            if token != self.image_token_id:
                out.append(token)
                continue
            assert seen < len(grids), "the chat template wrote more image placeholders than there are images"
            t, h, w = grids[seen]
            out.extend([token] * (t * h * w // self.merge_size**2))
            seen += 1
        assert seen == len(grids), f"the chat template wrote {seen} image placeholders for {len(grids)} images"
        assert self.collapse(out) == list(ids), "two images stand side by side without a token between them"
        return Encoded(tuple(out), grids)

    def _measure(self, height: int, width: int) -> Grid:
        """(t, h, w) patches of an image, by the image processor's own resize rule."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        image = self._image_processor
        size, patch = image.size, image.patch_size
        low, high = size["shortest_edge"], size["longest_edge"]
        resized = smart_resize(height, width, factor=patch * image.merge_size, min_pixels=low, max_pixels=high)
        grid = (1, resized[0] // patch, resized[1] // patch)
        assert grid[1] * grid[2] == image.get_number_of_image_patches(height, width, {}), "another resize rule"
        return grid

    def _check(self) -> None:
        if not self.stop_token_ids:
            raise WeightsError(f"{self.folder} names no end-of-sequence token; set eos_token in tokenizer_config.json")
        if self._template is None:
            raise WeightsError(f"{self.folder} has no chat template (chat_template.jinja or in tokenizer_config.json)")
        if not self.has_images:
            return
        vision = self._config.vision_config
        for name, ours, theirs in (
            ("patch_size", self._image_processor.patch_size, vision.patch_size),
            ("merge_size", self._image_processor.merge_size, vision.spatial_merge_size),
            ("temporal_patch_size", self._image_processor.temporal_patch_size, vision.temporal_patch_size),
        ):
            if ours != theirs:
                raise WeightsError(
                    f"{self.folder}: preprocessor_config.json has {name}={ours} but config.json's vision_config needs "
                    f"{theirs}; the files are not of one model, fetch the folder again"
                )
        placeholder = self._tokenizer.convert_tokens_to_ids("<|image_pad|>")
        if placeholder != self.image_token_id:
            raise WeightsError(
                f"{self.folder}: the tokenizer's <|image_pad|> is {placeholder}, config.json's image_token_id is "
                f"{self.image_token_id}; the files are not of one model, fetch the folder again"
            )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
