"""Images in every form that people have them: the same tokens, or the reason why there are none; and grids."""

import io
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from input_pipeline.errors import UserError
from input_pipeline.patches import unpatchify
from navit_jax.predict.images import Sizing, Unreadable, in_threads, many

PATCH = 4


def sizing(max_tokens=16, **fields):
    return Sizing(**{**dict(patch=PATCH, channels=3, max_tokens=max_tokens), **fields})


def seen(image, **fields):
    """The pixels that a model is given of an image whose size no grid changes."""
    values, grid = sizing(256, enlarge=False, **fields)(image)
    coords = np.stack(np.divmod(np.arange(len(values)), grid[1]), axis=1)
    return unpatchify(values, coords, grid, PATCH, 0)


def pixels(seed, height=20, width=36, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, PillowImage.Image) else PillowImage.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def test_paths_bytes_pillow_images_and_arrays(tmp_path):
    image, path = pixels(0), tmp_path / "a.png"
    path.write_bytes(saved(image))
    data = path.read_bytes()
    forms = [
        path,
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        PillowImage.open(path),
        PillowImage.fromarray(image),
    ]
    for form in [*forms, image, image[:, ::-1][:, ::-1]]:
        assert np.array_equal(seen(form), image)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_rotation_is_applied_to_files_and_pillow_images(orientation):
    image, exif = pixels(1), PillowImage.Exif()
    exif[0x0112] = orientation
    data = saved(image, exif=exif)
    upright = np.rot90(image, {1: 0, 3: 2, 6: 3, 8: 1}[orientation])
    assert np.array_equal(seen(data), upright) and np.array_equal(seen(PillowImage.open(io.BytesIO(data))), upright)


def test_modes_of_pillow_mean_what_a_file_of_them_means():
    colour, alpha = PillowImage.fromarray(pixels(2)), pixels(3, channels=1)
    rgba = colour.copy()
    rgba.putalpha(PillowImage.fromarray(alpha[..., 0]))
    grey = PillowImage.fromarray(pixels(4)[..., 0])
    deep = PillowImage.fromarray(np.arange(720, dtype=np.uint16).reshape(20, 36) * 91)
    for image in (
        colour,
        rgba,
        grey,
        rgba.convert("LA"),
        grey.convert("1"),
        colour.convert("P"),
        rgba.quantize(16),
        deep,
    ):
        assert np.array_equal(seen(image), seen(saved(image)))
    assert np.array_equal(seen(colour.convert("CMYK")), np.asarray(colour.convert("CMYK").convert("RGB")))
    blended = np.asarray(rgba, float)[..., :3] * (alpha / 255.0) + 255 - alpha
    assert np.abs(seen(rgba) - blended).max() <= 0.5 + 1e-9
    assert np.array_equal(seen(grey), np.repeat(np.asarray(grey)[:, :, None], 3, axis=2))


def test_channels_and_bits_are_those_that_the_model_wants():
    deep = (np.arange(720, dtype=np.uint16).reshape(20, 36, 1) * 91).repeat(3, axis=2)
    assert np.array_equal(seen(deep, bits=16), deep)
    assert np.array_equal(seen(deep), np.rint(deep / 257).astype(np.uint8))
    assert np.array_equal(seen(pixels(5), bits=16), pixels(5).astype(np.uint16) * 257)
    luma = pixels(5) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(seen(pixels(5), channels=1)[..., 0] - luma).max() <= 0.51
    assert np.array_equal(seen(pixels(6, channels=6), channels=6), pixels(6, channels=6))
    assert sizing(channels=6)(pixels(5)).reason == "3 channels: data.channels is 6"


def bad_images(folder):
    png = saved(pixels(7, 60, 60))
    cut = PillowImage.open(io.BytesIO(png[: len(png) // 2]))
    return [
        ("missing.png", "No such file or directory"),
        (folder, "Is a directory"),
        ("a\0b", "null byte"),
        (b"", "empty file"),
        (b"%PDF-1.4", "PDF"),
        (png[:-20], "truncated PNG"),
        (cut, "trunc"),
        (None, "NoneType: expected a path"),
        (3.5, "float: expected a path"),
        (np.zeros((4, 4, 3)), "float64 array: expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), "shape (0, 4, 3)"),
        (np.zeros((3, 40, 40), np.uint8), "40 channels"),
        (PillowImage.new("F", (8, 8)), "float pixels"),
    ]


def test_what_cannot_be_read_is_returned_with_the_reason(tmp_path):
    for image, reason in bad_images(tmp_path):
        found = sizing()(image)
        assert isinstance(found, Unreadable) and found.image is image and reason in found.reason


def test_one_opened_file_in_many_threads():
    opened = PillowImage.open(io.BytesIO(saved(pixels(8, 300, 400))))
    found = list(in_threads(sizing(), [opened] * 60, threads=8, ahead=40))
    assert all(np.array_equal(x.values, found[0].values) for x in found)


def test_threads_keep_the_order_and_read_no_further_than_asked():
    read = []
    source = (read.append(i) or i for i in itertools.count())
    answers = in_threads(lambda i: -i, source, threads=3, ahead=10)
    for i in range(50):
        assert next(answers) == -i and len(read) <= i + 10
    answers.close()
    assert len(read) <= 60


sides = st.integers(1, 3000)


@given(sides, sides, st.integers(1, 2000), st.sampled_from([1, 2]), st.sampled_from([0, 12, 40]), st.booleans())
def test_grids_keep_within_every_limit_and_near_the_aspect(height, width, budget, multiple, longest, enlarge):
    fewest, most = multiple**2, longest**2 or 2000
    made = sizing(min(max(budget, fewest), most), multiple=multiple, longest=longest, enlarge=enlarge)
    rows, columns = made.grid(height, width)
    assert 0 < rows * columns <= made.max_tokens and not rows % multiple and not columns % multiple
    assert max(rows, columns) <= (longest or 2000)
    unit = PATCH * multiple
    if not enlarge:
        assert rows <= multiple * -(-height // unit) and columns <= multiple * -(-width // unit)
    short, long = sorted((height, width))
    low, high = sorted((rows, columns)) if height != width else (rows, columns)
    assert (low - multiple) / max(high, 1) <= short / long + 1e-9 <= (low + multiple) / max(high - multiple, 1e-9)


def test_grids_by_hand():
    assert sizing(36).grid(8, 800) == (1, 36)
    assert sizing(36, longest=6).grid(8, 800) == (1, 6)
    assert sizing(36, longest=6).grid(300, 600) == (3, 6)
    assert sizing(36, longest=6).grid(600, 600) == (6, 6)
    assert sizing(36, enlarge=False).grid(9, 7) == (3, 2)
    assert sizing(17, squash=True).grid(8, 800) == (4, 4)
    assert sizing(40, multiple=2).grid(100, 100) == (6, 6)
    assert sizing(40, multiple=2).grid(1, 900) == (2, 20)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(max_tokens=37, longest=6), "knows 6 patches a side: it must be at most 36"),
        (dict(max_tokens=0), "at least 1"),
        (dict(max_tokens=3, multiple=2), "at least 4: grids of this model have multiples of 2"),
        (dict(max_tokens=2.5), "whole number"),
        (dict(max_tokens=True), "whole number"),
        (dict(max_tokens=10**9), "at most"),
    ],
)
def test_budgets_that_cannot_be(fields, said):
    with pytest.raises(UserError) as error:
        sizing(**fields)
    assert said in str(error.value)


@pytest.mark.parametrize("one", ["a.png", b"\xff\xd8", PillowImage.new("L", (2, 2)), pixels(0), pixels(0)[..., 0], 7])
def test_one_image_instead_of_several(one):
    with pytest.raises(UserError) as error:
        many(one, iter)
    assert ("list" in str(error.value)) and type(one).__name__ in str(error.value)


def test_what_has_a_length_gives_a_list():
    assert (
        many((1, 2), iter) == [1, 2]
        and many({1: 0}.keys(), iter) == [1]
        and len(many(np.zeros((2, 3, 4, 3)), iter)) == 2
    )
    assert not isinstance(many(iter([1]), iter), list)


def test_importing_the_package_is_cheap():
    code = "import sys, navit_jax; navit_jax.load; print(sorted({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
