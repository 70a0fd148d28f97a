"""Image files: opened within limits, and brought into the one form that every reader decodes alike.

A prepared image is a PNG or JPEG of one frame, without transparency and without an orientation to be applied, so that
"decode, convert to RGB" means the same pixels in the trainer, in the engine and in the report.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageOps

from dapo.errors import DataError

IMAGE_MARKER = "<image>"
"""Where an image stands in a question's text; without any marker the images come first."""
MAX_PIXELS = 64 * 2**20
"""Larger images are refused before they are decoded: a small file can unpack into gigabytes."""
MAX_BYTES = 64 * 2**20
"""Of an encoded image."""
MAX_ASPECT = 200
"""Longest side through shortest side; the image processors refuse more."""

_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
_KEPT_FORMATS = {"PNG", "JPEG"}
_KEPT_MODES = {"1", "L", "P", "RGB"}
_ORIENTATION = 0x0112


def decode_image(data: bytes) -> Image.Image:
    """Decode an image to RGB: the trainer's processor and the engine are both given the result.

    Raises:
        DataError: not an image, damaged, or beyond the limits.
    """
    image = _open(data)
    with _decoding(image):
        return image.convert("RGB")


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header alone.

    Raises:
        DataError: not an image, or beyond the limits.
    """
    width, height = _open(data).size
    return height, width


def normalise_image(data: bytes) -> bytes:
    """The file itself where it already has the prepared form, else the image as a new PNG.

    Raises:
        DataError: not an image, damaged, or beyond the limits.
    """
    image = _open(data)
    file_format = image.format
    with _decoding(image):
        image.load()
        frames, turned = getattr(image, "n_frames", 1), image.getexif().get(_ORIENTATION, 1) != 1
    if (
        file_format in _KEPT_FORMATS
        and image.mode in _KEPT_MODES
        and frames == 1
        and not turned
        and not image.has_transparency_data
    ):
        return data
    return encode_png(ImageOps.exif_transpose(image))


def encode_png(image: Image.Image) -> bytes:
    """An image as an RGB PNG; what is transparent becomes white, as on the page it was drawn for."""
    if image.mode.startswith("I"):
        # Sixteen bits a channel: a plain conversion would saturate at 255 instead of scaling.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        page = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(page, layer)
    out = io.BytesIO()
    image.convert("RGB").save(out, "PNG")
    return out.getvalue()


def _open(data: bytes) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise DataError(f"image file of {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        with warnings.catch_warnings():
            # Pillow's own warning about size; the limit below is lower and is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise DataError(f"image beyond the limit of {MAX_PIXELS} pixels ({error})") from None
    except Exception as error:  # decoders raise what they like on hostile bytes
        raise DataError(f"not a readable image ({_reason(error)})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"image of {width} x {height} pixels is beyond the limit of {MAX_PIXELS} pixels")
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(f"image of {width} x {height} pixels; one side is more than {MAX_ASPECT} times the other")
    return image


@contextmanager
def _decoding(image: Image.Image) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise what they like on hostile bytes
        raise DataError(f"damaged {image.format} image ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:120]}"
