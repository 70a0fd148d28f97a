"""Images: limits hold before anything large is decoded, and every reader sees the same pixels."""

import io
import struct
import zlib

import pytest
from PIL import Image

from dapo.data.images import MAX_PIXELS, decode_image, image_size, normalise_image
from dapo.errors import DataError
from tests.data.folders import image_bytes


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(("file_format", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("PNG", "L"), ("PNG", "P")])
def test_plain_png_and_jpeg_are_kept_byte_for_byte(file_format: str, mode: str) -> None:
    data = image_bytes(file_format=file_format, mode=mode)
    assert normalise_image(data) is data


def test_transparent_figure_is_put_on_white_paper() -> None:
    figure = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    figure.putpixel((1, 1), (0, 0, 0, 255))
    plain = decode_image(normalise_image(saved(figure, "PNG")))
    assert plain.getpixel((0, 0)) == (255, 255, 255)
    assert plain.getpixel((1, 1)) == (0, 0, 0)


def test_photo_with_an_orientation_is_turned_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    sideways = saved(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif)
    turned = normalise_image(sideways)
    assert image_size(turned) == (40, 20)
    assert normalise_image(turned) is turned


def test_sixteen_bit_grey_is_scaled_and_not_saturated() -> None:
    deep = Image.new("I;16", (2, 1))
    deep.putpixel((0, 0), 65535)
    deep.putpixel((1, 0), 32768)
    plain = decode_image(normalise_image(saved(deep, "PNG")))
    assert plain.getpixel((0, 0)) == (255, 255, 255)
    assert plain.getpixel((1, 0)) == (128, 128, 128)


def test_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(normalise_image(moving)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_small_file_that_claims_a_huge_picture_is_refused_from_its_header(side: int) -> None:
    with pytest.raises(DataError, match=f"beyond the limit of {MAX_PIXELS}"):
        image_size(claimed_png(side, side))


def test_ribbon_that_no_image_processor_takes_is_refused() -> None:
    with pytest.raises(DataError, match="more than 200 times"):
        normalise_image(image_bytes(2010, 10))


def test_cut_off_file_is_damaged() -> None:
    whole = image_bytes(200, 200, file_format="JPEG")
    with pytest.raises(DataError, match="damaged JPEG"):
        normalise_image(whole[: len(whole) // 2])


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not a readable image"):
        normalise_image(data)
