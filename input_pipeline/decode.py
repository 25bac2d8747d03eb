"""Encoded images to upright pixels, or a DecodeError that says why not.

JPEG goes through libjpeg-turbo in strict mode (simplejpeg) and nothing else: it is 1.5-2 times faster than Pillow, and
Pillow returns grey or shifted blocks for nearly every file that is corrupt in the middle. Strict refuses 97 % of files
with 4 KB of zeros written over them and 93 % with 64 random bytes; the rest cannot be told, as JPEG has no checksum. It
also refuses a JPEG with stray bytes between its markers, although a viewer would show it. Where the target is small a
JPEG is decoded at 1/2, 1/4 or 1/8, with 2 pixels or more left for each one wanted: 41-54 dB from the full decode after
area resizing, 35-42 dB where a side is no multiple of the scale (a shift of up to a quarter of a target pixel).

The other formats go through Pillow, and PNG checksums are verified here because Pillow skips them. Pixels are never
guessed: a file that ends early is refused.
"""

import io
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image as PillowImage

from input_pipeline.errors import DecodeError
from input_pipeline.image_header import PILLOW_READERS, Header, npy_layout, read_header

MAX_SCANS = 500  # of a progressive JPEG; real ones have about 10, and each scan costs a pass over the image
LUMA = (19595, 38470, 7471)  # Rec. 601 in 1/65536, as Pillow and JPEG have it


def header_size(data: bytes | np.ndarray, complete: bool = True) -> tuple[int, int]:
    """Height and width in pixels after EXIF rotation, without decoding.

    data: an encoded image, or an array [H, W] or [H, W, channels]. complete=False: `data` is only a file's beginning.
    Raises DecodeError where the size cannot be told (complete=False: also where the beginning is too short).
    """
    if isinstance(data, np.ndarray):
        if data.ndim not in (2, 3) or 0 in data.shape:
            raise DecodeError(f"array of shape {data.shape}: expected [H, W] or [H, W, channels]")
        return data.shape[0], data.shape[1]
    return read_header(data, complete).upright


def decode(
    data: bytes | np.ndarray,
    *,
    channels: int = 3,
    bits: int = 8,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = 100_000_000,
    at_least: tuple[int, int] | None = None,
) -> np.ndarray:
    """Upright pixels [H, W, channels], uint8, or uint16 when bits is 16.

    data: an encoded image, or an array [H, W] or [H, W, C] of uint8 or uint16. 8 bits become 16 times 257; 16 become 8
    by rounding. Grey becomes colour by repetition, colour becomes grey by luma; transparent pixels are composited
    on `background` (8-bit RGB) unless `channels` asks for the alpha channel (2 or 4). CMYK and palettes become RGB; an
    animation gives its first frame. An array may have any number of channels, if it is the one asked for.
    at_least: (height, width) that the caller will resize to; a JPEG may then come back at 1/2, 1/4 or 1/8 of its size,
    with both sides still at least twice that.
    The result may share memory with `data`. Raises DecodeError, and nothing else, for an image that cannot be used.
    """
    header = None if isinstance(data, np.ndarray) else read_header(data)
    height, width = header.upright if header else header_size(data)
    if height * width > max_pixels:
        raise DecodeError(f"{height}x{width} pixels: more than max_pixels = {max_pixels}")
    if header is None:
        return _finish(data, False, channels, bits, background)
    try:
        pixels, has_alpha = _decode_file(data, header, channels, at_least)
    except DecodeError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds, among them SyntaxError and MemoryError
        raise DecodeError(f"corrupt {header.format}: {str(error) or type(error).__name__}") from error
    if header.format != "JPEG" and pixels.shape[:2] != (height, width):
        raise DecodeError(f"corrupt {header.format}: {pixels.shape[:2]} pixels, its header says {(height, width)}")
    return _finish(pixels, has_alpha, channels, bits, background)


def _decode_file(
    data: bytes, header: Header, channels: int, at_least: tuple[int, int] | None
) -> tuple[np.ndarray, bool]:
    """Upright pixels [H, W, C] as stored, and whether the last channel is alpha."""
    if header.format == "NPY":
        shape, dtype, offset = npy_layout(data)
        return np.frombuffer(data, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape), False
    if header.format == "JPEG":
        return _rotate(_decode_jpeg(data, header, channels, at_least), header.orientation), False
    if header.format == "PNG":
        _verify_png(data)
    if header.deep_colour:
        pixels, has_alpha = _decode_deep_colour(data)
    else:
        image = PILLOW_READERS[header.format](io.BytesIO(data))
        image.load()
        pixels, has_alpha = _pillow_pixels(image, header.format)
    return (pixels if header.format == "TIFF" else _rotate(pixels, header.orientation)), has_alpha


def _decode_jpeg(data: bytes, header: Header, channels: int, at_least: tuple[int, int] | None) -> np.ndarray:
    if header.progressive and data.count(b"\xff\xda") > MAX_SCANS:
        raise DecodeError(f"JPEG of more than {MAX_SCANS} scans")
    scale = 1
    if at_least is not None:
        least_height, least_width = at_least[::-1] if header.orientation >= 5 else at_least
        shrink = min(header.height // (2 * max(least_height, 1)), header.width // (2 * max(least_width, 1)))
        scale = max(s for s in (1, 2, 4, 8) if s <= max(shrink, 1))
    # The decoder takes its smallest scale that keeps these sides, which is then 1/scale exactly.
    height, width = -(-header.height // scale), -(-header.width // scale)
    grey = header.components == 1 or (channels == 1 and header.components == 3)
    colorspace = "CMYK" if header.components == 4 else "GRAY" if grey else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace, min_height=height, min_width=width, strict=True)
    except ValueError as error:
        raise DecodeError(f"corrupt JPEG: {error}") from error
    if pixels.shape[:2] != (height, width):
        raise DecodeError(f"corrupt JPEG: {pixels.shape[:2]} pixels, its header says {(height, width)}")
    # A side that is no multiple of the scale ends in a partial pixel, which is dropped where less than half is image:
    # the caller takes the result for the whole image, so this bounds the stretch to half a pixel.
    pixels = pixels[: (header.height + scale // 2) // scale, : (header.width + scale // 2) // scale]
    if colorspace != "CMYK":
        return pixels
    ink = PillowImage.fromarray(255 - pixels, "CMYK")  # stored inverted, by Adobe's convention
    return np.asarray(ink.convert("RGB"))


def _verify_png(data: bytes) -> None:
    """Raises DecodeError unless every chunk is whole and matches its checksum."""
    position, view = 8, memoryview(data)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise DecodeError(f"corrupt PNG: checksum of chunk {kind!r} at byte {position}")
        if kind == b"IEND":
            return
        position = end + 4
    raise DecodeError("truncated PNG")


def _decode_deep_colour(data: bytes) -> tuple[np.ndarray, bool]:
    """16-bit colour through OpenCV; it rotates TIFF by its tag and leaves PNG as stored."""
    import cv2

    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3 or pixels.dtype != np.uint16 or pixels.shape[2] not in (3, 4):
        raise DecodeError("16-bit colour image that OpenCV cannot decode")
    order = [2, 1, 0, 3][: pixels.shape[2]]  # BGR(A)
    return pixels[:, :, order], pixels.shape[2] == 4


def _pillow_pixels(image: PillowImage.Image, name: str) -> tuple[np.ndarray, bool]:
    """Pixels [H, W, 1 to 4] of a loaded image, and whether the last channel is alpha."""
    mode = image.mode
    if mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)[:, :, None], False
    if mode == "I" and name in ("PNG", "PPM"):  # 16 bits in a 32-bit array
        return np.asarray(image).clip(0, 65535).astype(np.uint16)[:, :, None], False
    if mode in ("I", "F"):
        kind = "float" if mode == "F" else "32-bit integer"
        raise DecodeError(f"{name} with {kind} pixels, whose black and white are undefined: convert it to 8 or 16 bits")
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        grey = mode in ("L", "1", "LA", "La")
        pixels = np.asarray(image.convert("RGBA"))
        return (pixels[:, :, 2:] if grey else pixels), True
    pixels = np.asarray(image if mode in ("L", "RGB") else image.convert("L" if mode == "1" else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1), False


def _rotate(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies an EXIF orientation: bit by bit a transposition (5-8), then mirrored rows and columns."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _finish(
    pixels: np.ndarray, has_alpha: bool, channels: int, bits: int, background: tuple[int, int, int]
) -> np.ndarray:
    """Brings pixels [H, W] or [H, W, C] to the channels and bits asked for."""
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DecodeError(f"{pixels.dtype} array: expected uint8 or uint16")
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    found = pixels.shape[2]
    if has_alpha and found != channels:
        pixels = _composite(pixels, background)
    if pixels.shape[2] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=2)
    elif pixels.shape[2] == 3 and channels == 1:
        luma = sum(pixels[:, :, [c]].astype(np.uint32) * weight for c, weight in enumerate(LUMA))
        pixels = ((luma + 32768) >> 16).astype(pixels.dtype)
    if pixels.shape[2] != channels:
        raise DecodeError(f"{found} channels: data.channels is {channels}")
    if pixels.dtype == np.uint8 and bits == 16:
        pixels = pixels.astype(np.uint16) * np.uint16(257)
    elif pixels.dtype == np.uint16 and bits == 8:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def _composite(pixels: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Colours [H, W, 3] of pixels [H, W, 2 or 4], whose last channel is alpha, before a background of 8-bit RGB."""
    top = int(np.iinfo(pixels.dtype).max)
    alpha = pixels[:, :, -1:].astype(np.uint64 if top > 255 else np.uint32)
    behind = np.array(background, alpha.dtype) * (top // 255)
    return ((pixels[:, :, :-1] * alpha + behind * (top - alpha) + top // 2) // top).astype(pixels.dtype)
