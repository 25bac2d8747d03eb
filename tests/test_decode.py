"""Decoding against Pillow on the same bytes, formulas for what Pillow does not do, and hostile bytes."""

import functools
import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from input_pipeline.decode import decode, header_size
from input_pipeline.errors import DecodeError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (13, 21, 3), np.uint8)
DEEP = RNG.integers(0, 65536, (13, 21, 3), np.uint16)
LOSSLESS = {
    "PNG": ("PNG", {}),
    "PNG interlaced": ("PNG", {"interlace": 1}),
    "BMP": ("BMP", {}),
    "PPM": ("PPM", {}),
    "TIFF": ("TIFF", {}),
    "TIFF LZW": ("TIFF", {"compression": "tiff_lzw"}),
    "TIFF deflate": ("TIFF", {"compression": "tiff_deflate"}),
    "WebP": ("WEBP", {"lossless": True}),
    "JPEG 2000": ("JPEG2000", {}),
}
LOSSY = {
    "JPEG": ("JPEG", {}),
    "JPEG progressive": ("JPEG", {"progressive": True}),
    "AVIF": ("AVIF", {}),
    "GIF": ("GIF", {}),
}


@functools.cache
def photo() -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")


def encode(pixels, format, **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def png(pixels: np.ndarray, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with any colour type and chunks, which Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    depth = 8 * pixels.dtype.itemsize
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in body)


def psnr(a, b) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_formats_give_the_stored_pixels(name):
    format, options = LOSSLESS[name]
    data = encode(RGB, format, **options)
    np.testing.assert_array_equal(decode(data), RGB)
    assert header_size(data) == RGB.shape[:2]


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats_agree_with_pillow(name):
    format, options = LOSSY[name]
    data = encode(photo()[:120, :90], format, **options)
    np.testing.assert_array_equal(decode(data), np.asarray(opened(data).convert("RGB")))
    assert header_size(data) == (120, 90)


MODES = {"PNG": ("1", "L", "P"), "TIFF": ("1", "L", "P", "CMYK", "YCbCr"), "JPEG": ("L", "CMYK", "YCbCr")}


@pytest.mark.parametrize("format,mode", [(format, mode) for format, modes in MODES.items() for mode in modes])
def test_modes_agree_with_pillow(format, mode):
    data = encode(Image.fromarray(photo()[:60, :80]).convert(mode), format)
    wanted = np.asarray(opened(data).convert("RGB")).astype(int)
    assert abs(decode(data) - wanted).max() <= 1
    assert abs(decode(data, channels=1)[..., 0] - np.asarray(opened(data).convert("L")).astype(int)).max() <= 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_in_size_and_pixels(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"subsampling": 0} if format == "JPEG" else {}
    data = encode(photo()[:16, :24], format, exif=exif, **options)
    image = opened(data)
    image.load()
    wanted = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode(data), wanted)
    assert header_size(data) == wanted.shape[:2] == ((24, 16) if orientation >= 5 else (16, 24))


@pytest.mark.parametrize("order", ["<", ">"])
def test_broken_exif_means_upright(order):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    for body in (b"", struct.pack(order + "I", 10**6), struct.pack(order + "IHHHIHH", 8, 9, 0x0112, 3, 1, 77, 0)):
        exif = b"Exif\0\0" + mark + body
        segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        data = encode(RGB, "JPEG")
        assert header_size(data[:2] + segment + data[2:]) == RGB.shape[:2]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("divisor,scale", [(1, 1), (3, 1), (4, 2), (7, 2), (8, 4), (16, 8), (40, 8)])
def test_scaled_jpeg_keeps_twice_the_target_and_the_picture(orientation, divisor, scale):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for height, least_psnr in ((416, 41), (427, 34)):  # with and without a partial row at the end
        data = encode(photo()[:height], "JPEG", quality=92, exif=exif)
        full = decode(data)
        target = full.shape[0] // divisor, full.shape[1] // divisor
        small = decode(data, at_least=target)
        if scale == 1:
            np.testing.assert_array_equal(small, full)
            continue
        assert small.shape == ((full.shape[0] + scale // 2) // scale, (full.shape[1] + scale // 2) // scale, 3)
        assert small.shape[0] >= 2 * target[0] and small.shape[1] >= 2 * target[1]
        resized = [cv2.resize(image, target[::-1], interpolation=cv2.INTER_AREA) for image in (full, small)]
        assert psnr(*resized) > least_psnr


def test_scaling_is_decided_by_the_narrower_side():
    data = encode(np.zeros((64, 640, 3), np.uint8), "JPEG")
    assert decode(data, at_least=(32, 40)).shape == (64, 640, 3)
    assert decode(data, at_least=(16, 40)).shape == (32, 320, 3)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
@pytest.mark.parametrize("deep", [False, True])
def test_alpha_is_composited_on_the_background(background, deep):
    pixels = np.concatenate([DEEP, RNG.integers(0, 65536, (13, 21, 1), np.uint16)], axis=2)
    pixels = pixels if deep else (pixels >> 8).astype(np.uint8)
    top = 65535 if deep else 255
    alpha = pixels[..., 3:] / top
    wanted = pixels[..., :3] / top * alpha + np.array(background) / 255 * (1 - alpha)
    data = png(pixels, 6)
    np.testing.assert_allclose(decode(data, background=background), wanted * 255, atol=1.01)
    np.testing.assert_allclose(
        decode(data, background=background, bits=16), wanted * 65535, atol=130 if not deep else 1
    )
    np.testing.assert_array_equal(decode(data, channels=4, bits=16 if deep else 8), pixels)


def test_every_kind_of_transparency():
    grey = np.array([[[100, 0], [100, 255]]], np.uint8)
    assert decode(png(grey, 4), background=(1, 2, 3)).tolist() == [[[1, 2, 3], [100, 100, 100]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 50, 60, 70])
    palette.putdata([0, 1])
    for format in ("PNG", "GIF"):
        data = encode(palette, format, transparency=0)
        assert decode(data, background=(1, 2, 3)).tolist() == [[[1, 2, 3], [50, 60, 70]]]
    keyed = png(np.array([[[5, 6, 7], [8, 9, 10]]], np.uint8), 2, (b"tRNS", struct.pack(">HHH", 5, 6, 7)))
    assert decode(keyed, background=(1, 2, 3)).tolist() == [[[1, 2, 3], [8, 9, 10]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_deep_grey(format):
    grey = DEEP[..., 0]
    data = encode(grey, format)
    np.testing.assert_array_equal(decode(data, channels=1, bits=16)[..., 0], grey)
    np.testing.assert_array_equal(decode(data)[..., 2], np.rint(grey / 257).astype(np.uint8))


@pytest.mark.parametrize("ending", [".png", ".tiff"])
def test_deep_colour_is_not_cut_to_eight_bits(ending):
    data = cv2.imencode(ending, DEEP[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(decode(data, bits=16), DEEP)
    np.testing.assert_array_equal(decode(data), np.rint(DEEP / 257).astype(np.uint8))
    with_alpha = np.concatenate([DEEP[..., :1], np.full((13, 21, 1), 65535, np.uint16)], axis=2)
    np.testing.assert_array_equal(decode(png(with_alpha, 4), bits=16), np.repeat(DEEP[..., :1], 3, axis=2))


def deep_tiff(pixels: np.ndarray, orientation: int) -> bytes:
    height, width, channels = pixels.shape
    content = pixels.astype("<u2").tobytes()
    directory = 8 + len(content)
    tags = {256: width, 257: height, 258: None, 259: 1, 262: 2, 273: 8, 274: orientation, 277: 3, 278: height}
    tags |= {279: len(content), 284: 1}
    depths = directory + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 3, channels, depths) if v is None else struct.pack("<HHII", tag, 4, 1, v)
        for tag, v in tags.items()
    )
    head = b"II*\0" + struct.pack("<I", directory) + content
    return head + struct.pack("<H", len(tags)) + entries + struct.pack("<I3H", 0, 16, 16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_of_deep_tiff(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    rotated = opened(encode((DEEP >> 8).astype(np.uint8), "PNG", exif=exif))
    wanted = np.asarray(ImageOps.exif_transpose(rotated))
    data = deep_tiff(DEEP, orientation)
    np.testing.assert_array_equal(decode(data, bits=16) >> 8, wanted)
    assert header_size(data) == wanted.shape[:2]


def test_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((8, 9, 3), v, np.uint8)) for v in (10, 200)]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (decode(data) == 10).all(), format


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("stored", ["array", "npy"])
def test_arrays(dtype, stored):
    def given(array):
        file = io.BytesIO()
        np.save(file, array)
        return array if stored == "array" else file.getvalue()

    bits = 8 * np.dtype(dtype).itemsize
    many = RNG.integers(0, np.iinfo(dtype).max, (5, 6, 7), dtype)
    np.testing.assert_array_equal(decode(given(many), channels=7, bits=bits), many)
    assert header_size(given(many)) == (5, 6)
    np.testing.assert_array_equal(decode(given(many[..., 0]), bits=bits), np.repeat(many[..., :1], 3, axis=2))
    luma = many[..., :3] @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(decode(given(many[..., :3]), channels=1, bits=bits)[..., 0], luma, atol=0.51 + bits / 16)
    other = decode(given(many), channels=7, bits=24 - bits)
    np.testing.assert_array_equal(other, many.astype(np.uint16) * 257 if bits == 8 else np.rint(many / 257))
    with pytest.raises(DecodeError, match="7 channels: data.channels is 3"):
        decode(given(many))
    with pytest.raises(DecodeError, match="float64"):
        decode(given(np.zeros((3, 4, 3))))


def test_arrays_of_other_shapes_are_refused():
    for shape in ((3,), (2, 3, 4, 5), (0, 3, 3)):
        with pytest.raises(DecodeError, match="expected"):
            decode(np.zeros(shape, np.uint8))


REFUSALS = {
    b"": "empty file",
    b"<?xml version='1.0'?>\n<svg width='3'></svg>": "SVG",
    b"  <!DOCTYPE html><html></html>": "HTML",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1": "git lfs pull",
    b"%PDF-1.7 ....": "PDF",
    b"%!PS-Adobe-3.0 EPSF-3.0": "PostScript",
    b"\0\0\0\x18ftypheic\0\0\0\0": "HEIC",
    b"\xff\x0a0000": "JPEG XL",
    b"\x1f\x8b\x08 0": "gzip",
    b"just some text": "unknown image format",
}


@pytest.mark.parametrize("data", REFUSALS)
def test_other_files_are_refused_by_name(data):
    for act in (decode, header_size):
        with pytest.raises(DecodeError, match=REFUSALS[data]):
            act(data)


def test_pixels_without_a_range_are_refused():
    for dtype, word in ((np.float32, "float"), (np.int32, "32-bit integer")):
        with pytest.raises(DecodeError, match=word):
            decode(encode(np.ones((4, 4), dtype), "TIFF"))


def test_size_limit_needs_no_pixels():
    bomb = encode(np.zeros((4, 4), np.uint8), "PNG")
    bomb = bomb[:16] + struct.pack(">II", 60000, 60000) + bomb[24:]
    assert header_size(bomb) == (60000, 60000)
    with pytest.raises(DecodeError, match="max_pixels = 100000000"):
        decode(bomb)
    assert decode(encode(RGB, "PNG"), max_pixels=13 * 21).shape == RGB.shape
    with pytest.raises(DecodeError, match="13x21"):
        decode(encode(RGB, "PNG"), max_pixels=13 * 21 - 1)


@pytest.mark.parametrize("name", ["PNG", "BMP", "PPM", "JPEG 2000"])
def test_the_limit_is_ours_and_not_pillows(name, monkeypatch):
    format, options = LOSSLESS[name]
    data = encode(RGB, format, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 13 * 21 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        opened(data)
    assert decode(data).shape == RGB.shape


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_truncated_files_are_refused(name, share):
    format, options = (LOSSLESS | LOSSY)[name]
    data = encode(photo()[:120, :90], format, **options)
    with pytest.raises(DecodeError):
        decode(data[: int(len(data) * share)])


def test_corruption_that_pillow_returns_as_an_image():
    jpeg = encode(photo(), "JPEG")
    refused = 0
    for start in range(1000, len(jpeg) - 4096, 2500):
        bad = jpeg[:start] + bytes(4096) + jpeg[start + 4096 :]
        opened(bad).load()
        try:
            decode(bad)
        except DecodeError as error:
            assert "corrupt JPEG" in str(error)
            refused += 1
    assert refused >= 20  # of 23: JPEG has no checksum, and damage may happen to be a valid code
    stored = bytearray(png(RGB, 2))
    stored[-20] ^= 1  # behind the last pixel: in zlib's checksum or the chunk's
    with pytest.raises(DecodeError, match="checksum"):
        decode(bytes(stored))


def test_a_jpeg_of_endless_scans_is_refused():
    data = encode(RGB, "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff", start + 20)]
    with pytest.raises(DecodeError, match="500 scans"):
        decode(data[:start] + scan * 600 + data[start:])


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_the_beginning_of_a_file_gives_the_same_size_or_none(name):
    format, options = (LOSSLESS | LOSSY)[name]
    exif = Image.Exif()
    exif[0x0112] = 6
    with_exif = {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    data = encode(photo(), format, **options, **with_exif)
    found = 0
    for length in (0, 10, 30, 100, 1000, len(data) - 1):
        try:
            assert header_size(data[:length], complete=False) == header_size(data)
            found += 1
        except DecodeError:
            pass
    assert found >= (1 if format in ("JPEG", "PNG", "BMP", "PPM", "GIF") else 0)


@functools.cache
def seeds() -> tuple[bytes, ...]:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = [encode(photo()[:24, :32], format, **options) for format, options in (LOSSLESS | LOSSY).values()]
    rotated = [encode(photo()[:24, :32], format, exif=exif) for format in ("JPEG", "PNG", "WEBP", "TIFF")]
    cmyk = [encode(Image.fromarray(photo()[:24, :32]).convert("CMYK"), format) for format in ("JPEG", "TIFF")]
    deep = [encode(DEEP[..., 0], format) for format in ("PNG", "TIFF", "PPM")] + [deep_tiff(DEEP, 6), png(DEEP, 2)]
    palette = [encode(Image.fromarray(RGB).convert("P"), format) for format in ("PNG", "BMP", "TIFF")]
    file = io.BytesIO()
    np.save(file, RGB)
    return (*plain, *rotated, *cmyk, *deep, *palette, file.getvalue())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_hostile_bytes_give_an_image_or_a_decode_error(data):
    content = bytearray(data.draw(st.sampled_from(seeds())))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(80, len(content) - 1)))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "delete"]))
        if action == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif action == "cut" and at > 12:
            del content[at:]
        elif action == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif len(content) > 16:
            del content[at : at + data.draw(st.integers(1, 4))]
        content = content or bytearray(b"\0")
    check_hostile(bytes(content), data.draw(st.sampled_from([1, 3])), data.draw(st.sampled_from([8, 16])))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", *(seed[:24] for seed in seeds())]))
def test_random_bytes_give_an_image_or_a_decode_error(content, start):
    check_hostile(start + content, 3, 8)


def check_hostile(content: bytes, channels: int, bits: int):
    try:
        pixels = decode(content, channels=channels, bits=bits, max_pixels=1_000_000)
    except DecodeError as error:
        assert str(error)
        return
    assert pixels.shape == (*header_size(content), channels)
    assert pixels.dtype == (np.uint16 if bits == 16 else np.uint8)
