"""Files that cost far more than they weigh: refused from their header, with the reason."""

import io
import logging
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from fedshelf.data.cache import PhotoCache
from fedshelf.data.decode import MAX_SCANS, UnusablePhotoError, decode, decode_upright
from fedshelf.data.folder import scan
from fedshelf.data.health import check
from tests.unit.data.samples import pixels, write_pack

pillow_heif.register_heif_opener()  # to write such photos here
MEMORY_MB = 64  # that a refused photo may take, in a process that has decoded one of its kind


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def solid_webp(width: int, height: int) -> bytes:
    """A lossless WebP of one color: 34 bytes, whatever its size."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
    bits = int.from_bytes(data[21:25], "little") & ~0xFFFFFFF | (height - 1) << 14 | (width - 1)
    data[21:25] = bits.to_bytes(4, "little")
    return bytes(data)


def animated_webp(width: int, height: int) -> bytes:
    """The header of an animation, whose canvas Pillow allocates when it opens the file: 34 bytes."""
    canvas = bytes((2, 0, 0, 0)) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + b"ANIM"
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_scans(count: int, mode: str = "RGB") -> bytes:
    """A progressive JPEG, with its last scan repeated."""
    data = encode(Image.fromarray(pixels(0)).convert(mode), "JPEG", progressive=True)
    end = data.rindex(b"\xff\xd9")
    last = data[data.rindex(b"\xff\xda") : end]
    return data[:end] + last * (count - data.count(b"\xff\xda")) + data[end:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_chunks(count: int) -> bytes:
    data = encode(Image.fromarray(pixels(0)), "PNG")
    return data[:33] + chunk(b"prVt") * count + data[33:]


def gif_of_comments(count: int) -> bytes:
    data = encode(Image.new("L", (8, 8)), "GIF")
    start = data.index(b"\x2c", 13 + 3 * (2 << (data[10] & 7)))
    return data[:start] + b"\x21\xfe" + (b"\xff" + b"x" * 255) * count + b"\0" + data[start:]


def jpeg_of_comments(count: int) -> bytes:
    data = encode(Image.fromarray(pixels(0)), "JPEG", exif=Image.Exif().tobytes())
    return data[:2] + b"\xff\xfe\x00\x02" * count + data[2:]


def tiff_of_bits(count: int) -> bytes:
    """A TIFF whose tag BitsPerSample has `count` numbers."""
    data = bytearray(encode(Image.new("RGB", (8, 8)), "TIFF"))
    start = struct.unpack_from("<I", data, 4)[0]
    (entries,) = struct.unpack_from("<H", data, start)
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        if struct.unpack_from("<H", data, at)[0] == 258:
            struct.pack_into("<HHII", data, at, 258, 3, count, len(data))
    return bytes(data) + b"\x08\x00" * count


def bmp_of_runs(side: int) -> bytes:
    """A BMP of runs of one pixel each, which Pillow decodes in Python."""
    content = (b"\x01\x05" * side + b"\x00\x00") * side + b"\x00\x01"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(content), 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(content), 0, 0, 14 + len(header)) + header + content


def with_other_size(side: int, told: int, format: str) -> bytes:
    """A picture of `side` pixels whose header says `told`."""
    data = encode(Image.new("RGB", (side, side)), format, quality=10)
    at = data.index(b"ispe") + 8
    return data[:at] + told.to_bytes(4, "big") * 2 + data[at + 8 :]


def large_lossy_webp() -> bytes:
    data = bytearray(encode(Image.new("RGB", (8, 8)), "WEBP"))
    data[26:30] = (8000).to_bytes(2, "little") * 2
    return bytes(data)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "solid.webp": (lambda: solid_webp(16383, 16383), "too large: 16383 x 16383 pixels"),
    "animated.webp": (lambda: animated_webp(16383, 16383), "too large: 16383 x 16383 pixels"),
    "lossy.webp": (large_lossy_webp, "too large: 8000 x 8000 pixels"),
    "large.avif": (lambda: with_other_size(64, 9000, "AVIF"), "too large: 9000 x 9000 pixels"),
    "lying.heic": (lambda: with_other_size(900, 64, "HEIF"), "damaged"),
    "scans.jpg": (lambda: jpeg_of_scans(3000), "more than 32 scans"),
    "cmyk.jpg": (lambda: jpeg_of_scans(3000, "CMYK"), "more than 32 scans"),
    "comments.jpg": (lambda: jpeg_of_comments(1 << 20), "far more parts"),
    "chunks.png": (lambda: png_of_chunks(1 << 20), "far more parts"),
    "comments.gif": (lambda: gif_of_comments(1 << 15), "far more parts"),
    "bits.tiff": (lambda: tiff_of_bits(12 << 20), "more than 16 MiB before its pixels"),
    "runs.bmp": (lambda: bmp_of_runs(1200), "far more parts"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_with_its_reason(name: str) -> None:
    make, reason = BOMBS[name]
    data = make()
    for action in (lambda: decode(data, 32), lambda: decode_upright(data)):
        with pytest.raises(UnusablePhotoError, match=reason):
            action()


def test_no_bomb_takes_memory(tmp_path: Path) -> None:
    for name, (make, _) in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from fedshelf.data.decode import UnusablePhotoError, decode\n"
        "def peak():\n    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    data, before = path.read_bytes(), peak()\n"
        "    try:\n        decode(data, 32)\n"
        "    except UnusablePhotoError:\n        print(path.name, peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=True, text=True)
    grown = {name: int(number) for name, number in map(str.split, done.stdout.splitlines())}
    assert grown.keys() == BOMBS.keys()
    assert {name: number for name, number in grown.items() if number > MEMORY_MB} == {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "I;16", "RGB"])
def test_a_large_picture_converted_in_strips_is_the_same(mode: str) -> None:
    rng = np.random.default_rng(1)
    small = Image.fromarray(rng.integers(0, 256, (90, 120, 4), dtype=np.uint8))
    picture = small.resize((2000, 1500), Image.Resampling.NEAREST)
    if mode == "I;16":
        gray = np.asarray(picture.convert("L")).astype(np.uint16) * 257
        data, expected = encode(Image.fromarray(gray), "PNG"), np.repeat((gray // 257)[:, :, None], 3, 2)
    else:
        picture = picture.convert("RGB").quantize(64) if mode == "P" else picture.convert("RGBA").convert(mode)
        data = encode(picture, "TIFF" if mode == "CMYK" else "PNG")
        whole = picture.convert("RGBA")
        if mode in {"RGBA", "LA"}:
            whole = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
        expected = np.asarray((picture if mode == "CMYK" else whole).convert("RGB"))
    np.testing.assert_array_equal(decode_upright(data), expected)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"progressive": True, "subsampling": 0}, {"quality": 100, "optimize": True}]
)
def test_a_jpeg_of_a_common_encoder_has_few_scans(options: dict[str, Any]) -> None:
    data = encode(Image.fromarray(pixels(0, 200, 150)), "JPEG", **options)
    assert decode(data, 40).shape == (40, 40, 3)
    assert data.count(b"\xff\xda") <= MAX_SCANS // 2


def test_what_follows_the_picture_is_no_scan() -> None:
    data = encode(Image.fromarray(pixels(0)), "JPEG", progressive=True)
    motion = data + b"\xff\xda\x00\x08" * 100  # a phone's video after the photo
    np.testing.assert_array_equal(decode(motion, 40), decode(data, 40))


def test_a_preview_within_the_photo_counts_for_no_scans() -> None:
    preview = b"\xff\xda" * 100
    data = encode(Image.fromarray(pixels(0)), "JPEG", progressive=True, exif=Image.Exif().tobytes() + preview)
    assert decode(data, 40).shape == (40, 40, 3)


def test_large_pictures_are_decoded_one_at_a_time() -> None:
    data = encode(Image.new("L", (4500, 4500)), "PNG")
    decoded = []
    threads = [threading.Thread(target=lambda: decoded.append(decode(data, 16).shape)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert decoded == [(16, 16, 3)] * 3


def test_a_bomb_counts_as_a_damaged_photo_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_pack(tmp_path / "store", {"A": 3})
    (root / "A" / "solid.webp").write_bytes(solid_webp(16383, 16383))
    (root / "A" / "scans.jpg").write_bytes(jpeg_of_scans(3000))
    photos = scan(root, val_fraction=0, seed=0).train
    with caplog.at_level(logging.WARNING):
        cached = PhotoCache(root=tmp_path / "cache").open(photos, 16)
    assert len(cached.kept) == 3
    assert {problem.path.name for problem in cached.problems} == {"solid.webp", "scans.jpg"}
    assert "solid.webp': the photo is too large" in caplog.text
    assert "scans.jpg': the JPEG has more than 32 scans" in caplog.text
    assert set(check(root, val_fraction=0).unusable) == {"A/solid.webp", "A/scans.jpg"}
