"""Decoding photo files to square RGB arrays, identically on every machine and in every thread.

Shapes: S the image size in pixels; an image is uint8 [S, S, 3], RGB.
"""

import functools
import io
import threading
import warnings

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

# Increment this whenever a decoded pixel may change: cached photos are then decoded again.
DECODER_VERSION = 2
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a gigabyte in RGB
# The first of several pictures in a file is used. Pillow reads the MPO files of phones as JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_ORIENTATION_TAG = 0x0112
_EXIF_SEARCH_BYTES = 1 << 17

_filters_lock = threading.Lock()
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
        UnusablePhotoError: empty, corrupt, truncated, of another format, or of more than `MAX_PIXELS`.
    """
    if not data:
        raise UnusablePhotoError("the file is empty")
    pixels = _decode_jpeg(data, image_size) if simplejpeg.is_jpeg(data) else None
    if pixels is None:
        pixels, orientation = _decode_with_pillow(data)
    else:
        orientation = _jpeg_orientation(data)
    return _turn_upright(_squash(pixels, image_size), orientation)


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
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        if colorspace in {"CMYK", "YCCK"}:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False, min_height=image_size, min_width=image_size, min_factor=1
        )
    except ValueError:
        return None
    return pixels


def _decode_with_pillow(data: bytes) -> tuple[NDArray[np.uint8], int]:
    image, orientation = _open_with_pillow(data)
    try:
        image.load()
        return _as_rgb(image), orientation
    except Exception as error:  # Pillow raises all kinds of exceptions on damaged data
        raise UnusablePhotoError(f"the image data are damaged ({error})") from error


def _open_with_pillow(data: bytes) -> tuple[Image.Image, int]:
    """The opened image, with only its header read, and its EXIF orientation."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and b"avif" not in data[:64]:
        _register_heic()
    try:
        with (
            _filters_lock,
            warnings.catch_warnings(),
        ):  # warning filters are global to the process: one thread at a time
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
            orientation = 1 if image.format == "TIFF" else _orientation(image)  # Pillow rotates a TIFF itself
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnusablePhotoError(f"the photo is too large: more than {MAX_PIXELS / 1e6:.0f} megapixels") from error
    except Exception as error:
        reason = "the file is not a JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF or HEIC image, or its header is damaged"
        raise UnusablePhotoError(reason) from error
    _check_pixels(*image.size)
    return image, orientation


@functools.cache
def _register_heic() -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise MissingDecoderError("it is a HEIC photo, for which pip install 'fedshelf[heic]' is needed") from error
    pillow_heif.register_heif_opener()


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnusablePhotoError(
            f"the photo is too large: {width} x {height} pixels, at most {MAX_PIXELS / 1e6:.0f} megapixels are decoded"
        )


def _as_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit gray, in any of Pillow's modes
        gray = np.asarray(image).astype(np.int64)
        return np.repeat(np.clip(gray // 257, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        cutout = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", cutout.size, "white"), cutout)
    return np.asarray(image.convert("RGB"))


def _squash(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize to [size, size, 3]: shrink by areas first, then enlarge sides that are still too short."""
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
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  Pillow raises nearly anything on damaged EXIF, and the pixels are still good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn_upright(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Undo the camera's orientation."""
    if orientation in {5, 6, 7, 8}:
        image = image.transpose(1, 0, 2)
    if orientation in {2, 3, 6, 7}:
        image = image[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        image = image[::-1]
    return np.ascontiguousarray(image)
