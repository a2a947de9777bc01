"""Decoding photo files to square RGB arrays, identically on every machine and in every thread.

A file may be a bomb: a few bytes that take gigabytes or minutes. What a photo costs is known from its header, before
anything is allocated: its pixels, times the bytes that its decoder takes for one (`MAX_DECODE_BYTES`), the scans of a
JPEG, and the number of pieces that the file consists of. Large photos are decoded one at a time.

Shapes: S the image size in pixels; an image is uint8 [S, S, 3], RGB.
"""

import contextlib
import functools
import io
import re
import threading
import warnings

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image

# Increment this whenever a decoded pixel may change: cached photos are then decoded again.
DECODER_VERSION = 2
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a gigabyte in RGB
MAX_DECODE_BYTES = 700_000_000
MAX_SCANS = 32  # of a JPEG; cameras write 1, progressive encoders about 10. Each costs a pass over all pixels
MAX_HEADER_BYTES = 16 << 20
# Reads from the file, at about a microsecond each: of the header, and of the pixels after it.
_MAX_HEADER_READS, _MAX_READS = 50_000, 2_000_000
_MAX_SEGMENTS = 10_000  # of a JPEG, before its pixels
_LARGE_PIXELS = 16_000_000
_STRIP_PIXELS = 1 << 21
# Measured peaks, for formats that need more than the 7 bytes of a decoded pixel and its copy in RGB.
_BYTES_PER_PIXEL = {"WEBP": 16, "AVIF": 13, "HEIF": 14}
# The first of several pictures in a file is used. Pillow reads the MPO files of phones as JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_ORIENTATION_TAG = 0x0112
_EXIF_SEARCH_BYTES = 1 << 17
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # those followed by a segment, and EOI
_SOS, _EOI, _SOFS = 0xDA, 0xD9, frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

_filters_lock = threading.Lock()
_large_lock = threading.Lock()
Image.init()  # register all formats now, independent of the thread that decodes first

# Photos are decoded in parallel, each on one thread; OpenCV's own pool would also not survive a fork.
cv2.setNumThreads(1)


class UnusablePhotoError(Exception):
    """The photo cannot be decoded. The message is the reason, for a person. Internal to the package `data`."""


class MissingDecoderError(UnusablePhotoError):
    """The photo could be decoded if a library were installed."""


def decode(data: bytes, image_size: int) -> NDArray[np.uint8]:
    """Decode a photo, rotate it upright by its EXIF orientation, and resize it to [S, S, 3].

    JPEG is decoded by libjpeg-turbo at the smallest DCT scale that is large enough; CMYK, files that libjpeg-turbo
    rejects, and other formats (PNG, WebP, BMP, GIF, TIFF, AVIF, and HEIC if pillow-heif is installed) are decoded by
    Pillow. Shrinking averages over areas (no aliasing). Transparency is composited on white, 16 bits are scaled to 8.

    Args:
        data: bytes of the file.
        image_size: S.

    Raises:
        UnusablePhotoError: empty, corrupt, truncated, of another format, or a bomb: with more pixels, scans or parts
            than a photo has.
    """
    if not data:
        raise UnusablePhotoError("the file is empty")
    pixels = _decode_jpeg(data, image_size) if simplejpeg.is_jpeg(data) else None
    if pixels is None:
        pixels, orientation = _decode_with_pillow(data)
    else:
        orientation = _jpeg_orientation(data)
    return _turn_upright(squash(pixels, image_size), orientation)


def from_image(image: Image.Image, image_size: int) -> NDArray[np.uint8]:
    """Convert an opened picture as `decode` does after decoding: rotated upright, resized to [S, S, 3].

    Raises:
        UnusablePhotoError: its data are damaged.
    """
    try:
        pixels = _as_rgb(image)
    except Exception as error:  # Pillow raises all kinds of exceptions on damaged data
        raise UnusablePhotoError(f"the image data are damaged ({error})") from error
    return _turn_upright(squash(pixels, image_size), _orientation(image))


def decode_upright(data: bytes) -> NDArray[np.uint8]:
    """Decode at full size, rotated upright: uint8 [H, W, 3].

    Raises:
        UnusablePhotoError: see `decode`.
    """
    if not data:
        raise UnusablePhotoError("the file is empty")
    pixels, orientation = _decode_with_pillow(data)
    return _turn_upright(pixels, orientation)


def photo_size(data: bytes) -> tuple[int, int]:
    """Width and height as stored, read from the header only.

    Raises:
        UnusablePhotoError: see `decode`.
    """
    image, _ = _open_with_pillow(data)
    return image.size


def _decode_jpeg(data: bytes, image_size: int) -> NDArray[np.uint8] | None:
    """The pixels; None if Pillow has to decode the file (CMYK, or data that strict decoding rejects)."""
    num_scans = _count_scans(data)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height, "JPEG")
        if colorspace in {"CMYK", "YCCK"}:
            return None
        with _one_at_a_time(width * height if num_scans > 1 else 0):  # one scan: no whole picture is in memory
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
                data, "RGB", fastdct=False, fastupsample=False, min_height=image_size, min_width=image_size,
                min_factor=1,
            )  # fmt: skip
    except ValueError:
        return None
    return pixels


def _decode_with_pillow(data: bytes) -> tuple[NDArray[np.uint8], int]:
    image, orientation = _open_with_pillow(data)
    try:
        with _one_at_a_time(image.width * image.height):
            image.load()
            return _as_rgb(image), orientation
    except Exception as error:  # Pillow raises all kinds of exceptions on damaged data
        raise UnusablePhotoError(f"the image data are damaged ({error})") from error


def _open_with_pillow(data: bytes) -> tuple[Image.Image, int]:
    """The opened image, with only its header read, and its EXIF orientation."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and b"avif" not in data[:64]:
        _register_heic()
    if data.startswith(b"\xff\xd8"):
        _count_scans(data)
    elif webp := _webp_size(data):  # Pillow allocates the canvas when it opens the file
        _check_pixels(*webp, "WEBP")
    source = _Source(data)
    try:
        with (
            _filters_lock,
            warnings.catch_warnings(),
        ):  # warning filters are global to the process: one thread at a time
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=[name for name in _FORMATS if name in Image.OPEN])
            orientation = 1 if image.format == "TIFF" else _orientation(image)  # Pillow rotates a TIFF itself
    except UnusablePhotoError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnusablePhotoError(f"the photo is too large: more than {MAX_PIXELS / 1e6:.0f} megapixels") from error
    except Exception as error:
        reason = "the file is not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC image, or its header is damaged"
        raise UnusablePhotoError(reason) from error
    _check_pixels(*image.size, image.format or "")
    source.left, source.left_bytes = _MAX_READS, len(data)
    return image, orientation


@functools.cache
def _register_heic() -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise MissingDecoderError("it is a HEIC photo, for which pip install 'fedshelf[heic]' is needed") from error
    pillow_heif.register_heif_opener()


class _Source(io.BytesIO):
    """A file for Pillow, which parses headers piece by piece: bounds the pieces, and what they hold together.

    Attributes:
        left: number of reads that are left.
        left_bytes: number of bytes that may still be read, except by a decoder that takes the whole file at once.
    """

    left, left_bytes = _MAX_HEADER_READS, MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.left -= 1
        self.left_bytes -= len(data) if size is not None and size >= 0 else 0
        if self.left < 0:
            raise UnusablePhotoError("the file consists of far more parts than a photo has")
        if self.left_bytes < 0:
            raise UnusablePhotoError(f"the file has more than {MAX_HEADER_BYTES >> 20} MiB before its pixels")
        return data


def _check_pixels(width: int, height: int, format: str) -> None:
    most = min(MAX_PIXELS, MAX_DECODE_BYTES // _BYTES_PER_PIXEL.get(format, 7))
    if width * height > most:
        raise UnusablePhotoError(
            f"the photo is too large: {width} x {height} pixels, at most {most / 1e6:.0f} megapixels of "
            f"{format or 'this format'} are decoded"
        )


def _one_at_a_time(num_pixels: int) -> contextlib.AbstractContextManager[object]:
    return _large_lock if num_pixels > _LARGE_PIXELS else contextlib.nullcontext()


def _count_scans(data: bytes) -> int:
    """The number of scans of a JPEG: 1 unless it is progressive, or has a scan for each color.

    Raises:
        UnusablePhotoError: it has more than `MAX_SCANS`, or more segments than a photo has.
    """
    at = num_scans = num_components = 0
    is_progressive = False
    for _ in range(_MAX_SEGMENTS):
        found = _JPEG_MARKER.search(data, at)
        if found is None:
            return num_scans
        start = found.end()
        marker, length = data[start - 1], int.from_bytes(data[start : start + 2], "big")
        if marker in _SOFS:
            is_progressive, num_components = marker & 3 == 2, int.from_bytes(data[start + 7 : start + 8], "big")
        elif marker == _EOI:
            return num_scans
        elif marker == _SOS:
            num_scans += 1
            if num_scans > MAX_SCANS:
                raise UnusablePhotoError(f"the JPEG has more than {MAX_SCANS} scans, which no camera writes")
            if not is_progressive and data[start + 2 : start + 3] >= bytes((num_components,)):
                return num_scans  # libjpeg reads no further
        at = start + length
    raise UnusablePhotoError("the file consists of far more parts than a photo has")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a WebP; None in other files."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    if data[12:16] == b"VP8X":  # the canvas
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _as_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The whole picture, converted strip by strip, so that copies of it in other modes are never whole."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if image.height <= rows:
        return _strip_as_rgb(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = _strip_as_rgb(image.crop((0, top, image.width, bottom)))
    return pixels


def _strip_as_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit gray, in any of Pillow's modes
        gray = np.asarray(image).astype(np.int64)
        return np.repeat(np.clip(gray // 257, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        cutout = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", cutout.size, "white"), cutout)
    return np.asarray(image.convert("RGB"))


def squash(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize decoded pixels [H, W, 3] to [size, size, 3]: shrink by areas first, then enlarge sides that are too short.

    Raises:
        UnusablePhotoError: the picture is empty.
    """
    height, width = pixels.shape[:2]
    try:
        if height > size or width > size:
            pixels = np.asarray(cv2.resize(pixels, (min(width, size), min(height, size)), interpolation=cv2.INTER_AREA))
        if height < size or width < size:
            pixels = np.asarray(cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR))
    except cv2.error as error:
        raise UnusablePhotoError(f"the photo of {width} x {height} pixels cannot be resized") from error
    return pixels


def _jpeg_orientation(data: bytes) -> int:
    if b"Exif\x00\x00" not in data[:_EXIF_SEARCH_BYTES]:
        return 1
    try:
        _, orientation = _open_with_pillow(data)
    except UnusablePhotoError:
        return 1  # libjpeg-turbo could decode it: Pillow's stricter header check must not lose the photo
    return orientation


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if it is missing or damaged."""
    if len(image.info.get("exif") or b"") > MAX_HEADER_BYTES:
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  Pillow raises nearly anything on damaged EXIF, and the pixels are still good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def time_taken(data: bytes) -> str:
    """When the camera took a photo (EXIF DateTimeOriginal), as it wrote it; empty if it did not, or it is damaged."""
    try:
        image, _ = _open_with_pillow(data)
        if len(image.info.get("exif") or b"") > MAX_HEADER_BYTES:
            return ""
        with _filters_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
    except Exception:  # noqa: BLE001  see `_orientation`
        return ""
    return value if isinstance(value, str) else ""


def _turn_upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo the camera's orientation."""
    if orientation in {5, 6, 7, 8}:
        image = image.transpose(1, 0, 2)
    if orientation in {2, 3, 6, 7}:
        image = image[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        image = image[::-1]
    return np.ascontiguousarray(image)
