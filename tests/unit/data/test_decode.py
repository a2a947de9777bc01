"""The decoder against Pillow: what it makes of a file must be what the eye sees in it."""

import contextlib
import io
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image

from fedshelf.data.decode import MAX_PIXELS, UnusablePhotoError, decode, photo_size
from tests.unit.data.samples import pixels

pillow_heif.register_heif_opener()  # to write such photos here


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def difference(actual: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == np.uint8
    return float(np.abs(actual.astype(int) - expected.astype(int)).mean())


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "TIFF", "JPEG", "AVIF", "HEIF"])
def test_every_format_gives_the_picture(format: str) -> None:
    data = encode(Image.fromarray(pixels(0)), format, quality=95, lossless=True)
    assert difference(decode(data, 40), pixels(0)) < (3 if format in {"JPEG", "AVIF", "HEIF"} else 0.01)


def test_of_several_pictures_in_one_file_the_first_counts() -> None:
    first, second = (Image.fromarray(pixels(seed)) for seed in (0, 1))
    for name, most in (("GIF", 12.0), ("TIFF", 0.01), ("WEBP", 0.01)):  # a GIF has 256 colors
        data = encode(first, name, save_all=True, append_images=[second], lossless=True)
        assert difference(decode(data, 40), pixels(0)) < most


@pytest.mark.parametrize(("width", "height"), [(400, 300), (40, 900), (31, 17), (500, 20), (1, 1)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_photo_of_any_shape_is_squashed_to_a_square(format: str, width: int, height: int) -> None:
    picture = Image.fromarray(pixels(1, width, height))
    expected = np.asarray(picture.resize((48, 48), Image.Resampling.BOX if width > 48 else Image.Resampling.BILINEAR))
    assert difference(decode(encode(picture, format), 48), expected) < 8


def test_shrinking_averages_instead_of_sampling() -> None:
    checkers = np.indices((480, 480)).sum(0) % 2 * 255
    data = encode(Image.fromarray(np.repeat(checkers[:, :, None], 3, 2).astype(np.uint8)))
    assert np.abs(decode(data, 48).astype(int) - 127).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_the_photo_is_turned_upright_by_its_exif_orientation(format: str, orientation: int) -> None:
    upright = Image.fromarray(pixels(2, 64, 64))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, format, exif=exif.tobytes(), quality=95)
    assert difference(decode(data, 64), np.asarray(upright)) < 4


def test_damaged_exif_does_not_lose_the_photo() -> None:
    data = encode(
        Image.fromarray(pixels(3)), "JPEG", quality=95, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\xff" * 40
    )
    assert difference(decode(data, 40), pixels(3)) < 2


def test_grayscale_and_one_bit_photos_become_gray() -> None:
    gray = Image.fromarray(pixels(4)).convert("L")
    expected = np.repeat(np.asarray(gray)[:, :, None], 3, 2)
    assert difference(decode(encode(gray), 40), expected) == 0
    assert difference(decode(encode(gray, "JPEG", quality=95), 40), expected) < 2
    one_bit = decode(encode(gray.convert("1")), 40)
    assert set(np.unique(one_bit)) == {0, 255}


def test_cmyk_photos_have_their_colours() -> None:
    cmyk = Image.fromarray(pixels(5)).convert("CMYK")
    assert difference(decode(encode(cmyk, "JPEG", quality=95), 40), np.asarray(cmyk.convert("RGB"))) < 4


def test_sixteen_bits_are_scaled_to_eight() -> None:
    gray = np.asarray(Image.fromarray(pixels(6)).convert("L"))
    data = encode(Image.fromarray(gray.astype(np.uint16) * 257))
    assert difference(decode(data, 40), np.repeat(gray[:, :, None], 3, 2)) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    picture = Image.fromarray(pixels(7)).convert("L").convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 20, 40))
    data = encode(picture.quantize() if mode == "P" else picture.convert(mode))
    decoded = decode(data, 40)
    assert (decoded[:, :20] == 255).all()
    assert (decoded[:, 20:] != 255).any()


def test_a_palette_photo_has_its_colours() -> None:
    palette = Image.fromarray(pixels(8)).quantize(64)
    assert difference(decode(encode(palette), 40), np.asarray(palette.convert("RGB"))) == 0


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF"])
def test_a_truncated_file_is_refused_with_a_reason(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    with pytest.raises(UnusablePhotoError, match="damaged"):
        decode(data[: len(data) // 2], 32)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF"])
def test_damage_of_any_kind_is_a_reason_and_nothing_else(format: str) -> None:
    data = encode(Image.fromarray(pixels(0)), format)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 9)):
            damaged[position] = rng.integers(256)
        with contextlib.suppress(UnusablePhotoError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert decode(bytes(damaged), 16).shape == (16, 16, 3)


def test_without_its_library_a_heic_photo_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from fedshelf.data.decode import MissingDecoderError, decode\n"
        "try:\n    decode(sys.stdin.buffer.read(), 16)\nexcept MissingDecoderError as error:\n    print(error)"
    )
    data = encode(Image.fromarray(pixels(0)), "HEIF")
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert b"pip install 'fedshelf[heic]'" in done.stdout


@pytest.mark.parametrize(
    "data", [b"hello, I am text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe", b"\x00" * 99]
)
def test_what_is_no_image_is_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(UnusablePhotoError, match="not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC"):
        decode(data, 32)


def test_another_image_format_is_refused() -> None:
    with pytest.raises(UnusablePhotoError, match="not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC"):
        decode(encode(Image.fromarray(pixels(0)), "PPM"), 32)


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(UnusablePhotoError, match="empty"):
        decode(b"", 32)


def test_stray_bytes_that_other_programs_tolerate_do_not_lose_the_photo() -> None:
    data = encode(Image.fromarray(pixels(9)), "JPEG", quality=95)
    assert difference(decode(data + b"\x00" * 100, 40), pixels(9)) < 2


@pytest.mark.parametrize("format", ["PNG", "BMP"])
def test_a_decompression_bomb_is_refused_from_its_header_without_a_warning(format: str) -> None:
    side = int(MAX_PIXELS**0.5) + 10
    if format == "PNG":
        data = encode(Image.new("1", (side, side)))
    else:
        header = bytearray(encode(Image.new("L", (8, 8)), "BMP"))
        header[18:26] = side.to_bytes(4, "little") * 2
        data = bytes(header)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(UnusablePhotoError, match="too large"):
            decode(data, 32)
    assert caught == []


def test_a_jpeg_bomb_is_refused_from_its_header() -> None:
    data = bytearray(encode(Image.fromarray(pixels(0)), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = (40_000).to_bytes(2, "big") * 2
    with pytest.raises(UnusablePhotoError, match="too large: 40000 x 40000"):
        decode(bytes(data), 32)


def test_the_size_is_read_from_the_header() -> None:
    assert photo_size(encode(Image.fromarray(pixels(0, 31, 17)), "JPEG")) == (31, 17)
