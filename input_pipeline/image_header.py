"""What the first bytes of an image say: its format, its size, its EXIF rotation; no pixel is decoded.

Sizes are needed for every image before the first row is planned, so JPEG and PNG are parsed here (10 us, and the first
64 KB are enough); the rarer formats go through Pillow's header readers, which take the whole file. A file is what its
magic bytes say and never what its extension says, and only the formats below reach Pillow: its other plugins include
an interpreter (EPS) and formats with no magic bytes at all.
"""

import io
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Jpeg2KImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL import Image as PillowImage

from input_pipeline.errors import DecodeError

# The classes and not `Image.open`, whose global limit on pixels would stand beside ours (WebP and TIFF keep it: 179 M).
PILLOW_READERS: dict[str, Callable[..., PillowImage.Image]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
READ_FROM_THEIR_START = ("JPEG", "PNG", "GIF", "BMP", "PPM", "NPY")
MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x93NUMPY", "NPY"),
    *((b"P%d%c" % (digit, space), "PPM") for digit in range(1, 7) for space in b" \t\r\n"),
)
REFUSED = (
    (b"%PDF", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"8BPS", "a Photoshop file"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
)
ORIENTATION_TAG = 0x0112
NOT_SOF = (0xC4, 0xC8, 0xCC)  # of the JPEG markers 0xC0-0xCF, the ones that start no frame
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)


class Header(NamedTuple):
    """format: see `MAGIC`; height, width: of the stored pixels; orientation: EXIF 1-8, still to be applied.

    components, progressive: of a JPEG. deep_colour: 16 bits in more than one channel, which Pillow would cut to 8.
    """

    format: str
    height: int
    width: int
    orientation: int = 1
    components: int = 0
    progressive: bool = False
    deep_colour: bool = False

    @property
    def upright(self) -> tuple[int, int]:
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def sniff(data: bytes) -> str:
    """The format that the magic bytes name. Raises DecodeError that says what the bytes are instead."""
    if not data:
        raise DecodeError("empty file")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        if data[8:12] in (b"avif", b"avis"):
            return "AVIF"
        raise DecodeError(f"HEIC or video ({data[8:12]!r}) is not supported: convert it to JPEG or PNG")
    for magic, name in MAGIC:
        if data.startswith(magic):
            return name
    for magic, name in REFUSED:
        if data.startswith(magic):
            raise DecodeError(f"{name} is not an image that can be read: convert it to JPEG or PNG")
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        raise DecodeError("SVG has no pixels: render it to PNG")
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        raise DecodeError("HTML page instead of an image (a failed download?)")
    raise DecodeError(f"unknown image format: starts with {bytes(data[:12])!r}")


def read_header(data: bytes, complete: bool = True) -> Header:
    """Size and rotation of an encoded image; complete=False: `data` is only the file's beginning.

    Raises DecodeError for a format that cannot be read, a broken header, or a beginning too short to tell.
    """
    name = sniff(data)
    if not complete and name not in READ_FROM_THEIR_START:
        raise DecodeError(f"{name} needs the whole file")
    try:
        if name == "JPEG":
            header = _jpeg_header(data)
        elif name == "PNG":
            header = _png_header(data)
        elif name == "NPY":
            header = Header(name, *npy_layout(data)[0][:2])
        else:
            header = _pillow_header(name, data)
    except DecodeError:
        raise
    except (IndexError, struct.error) as error:
        raise DecodeError(f"truncated {name}: it ends within its header") from error
    except Exception as error:  # Pillow raises a dozen kinds
        raise DecodeError(f"{name} header cannot be read: {error or type(error).__name__}") from error
    if header.height <= 0 or header.width <= 0:
        raise DecodeError(f"{name} of {header.height}x{header.width} pixels")
    return header


def _jpeg_header(data: bytes) -> Header:
    """Walks the segments up to the first scan, where the pixels begin."""
    position, frame, orientation = 2, None, None
    while True:
        if data[position] != 0xFF:
            raise DecodeError("corrupt JPEG: bytes between its segments")
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker in (0xDA, 0xD9):
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        if length < 2 or position + 2 + length > len(data):
            raise DecodeError("truncated JPEG")
        segment = data[position + 4 : position + 2 + length]
        if 0xC0 <= marker <= 0xCF and marker not in NOT_SOF:
            frame = (*struct.unpack_from(">BHHB", segment), marker in PROGRESSIVE)
        elif marker == 0xE1 and orientation is None and segment[:6] == b"Exif\0\0":
            orientation = exif_orientation(segment)
        position += 2 + length
    if frame is None:
        raise DecodeError("corrupt JPEG: no frame header")
    precision, height, width, components, progressive = frame
    if precision != 8:
        raise DecodeError(f"JPEG of {precision} bits a sample: only 8 can be read")
    return Header("JPEG", height, width, orientation or 1, components, progressive)


def _png_header(data: bytes) -> Header:
    """Walks the chunks up to the pixels; an eXIf chunk behind them is not looked for."""
    if data[12:16] != b"IHDR":
        raise DecodeError("corrupt PNG: no IHDR chunk first")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    position, orientation = 8, 1
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            return Header("PNG", height, width, orientation, deep_colour=depth == 16 and colour != 0)
        if position + 12 + length > len(data):
            raise DecodeError("truncated PNG")
        if kind == b"eXIf":
            orientation = exif_orientation(data[position + 8 : position + 8 + length])
        position += 12 + length


def _pillow_header(name: str, data: bytes) -> Header:
    image = PILLOW_READERS[name](io.BytesIO(data))
    if name == "TIFF":  # Pillow rotates it while loading; whether `size` already says so depends on its version
        tags = image.tag_v2
        header = Header(name, int(tags[257]), int(tags[256]), _valid(tags.get(ORIENTATION_TAG)))
        depths = tags.get(258, (1,))
        return header._replace(deep_colour=len(depths) > 1 and max(depths) == 16)
    orientation = exif_orientation(image.info.get("exif", b"")) if name in ("WebP", "AVIF") else 1
    return Header(name, image.height, image.width, orientation)


def npy_layout(data: bytes) -> tuple[tuple[int, int, int], np.dtype, int]:
    """Shape [H, W, channels], dtype and offset of the pixels of a .npy file."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if len(shape) not in (2, 3) or fortran or dtype not in (np.dtype(np.uint8), np.dtype("<u2")):
        order = "column-major " if fortran else ""
        raise DecodeError(f"{order}{dtype} array {shape}: expected uint8 or uint16 of shape [H, W] or [H, W, channels]")
    return (*shape, 1)[:3], dtype, file.tell()


def exif_orientation(exif: bytes) -> int:
    """The rotation tag of an EXIF block, 1-8; 1 (upright) where it is missing or the block is broken."""
    block = exif[6:] if exif[:6] == b"Exif\0\0" else exif
    order = {b"II": "<", b"MM": ">"}.get(bytes(block[:2]))
    if order is None:
        return 1
    try:
        (offset,) = struct.unpack_from(order + "I", block, 4)
        (count,) = struct.unpack_from(order + "H", block, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", block, entry)
            if tag == ORIENTATION_TAG:
                return _valid(struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}.get(kind, "H"), block, entry + 8)[0])
    except struct.error:
        pass
    return 1


def _valid(orientation: int | None) -> int:
    return orientation if orientation in range(1, 9) else 1
