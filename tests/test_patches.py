import cv2
import numpy as np
import pytest
from einops import rearrange
from PIL import Image
from sklearn.datasets import load_sample_images

from configs import base
from input_pipeline import augment, patches
from input_pipeline.errors import UserError


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_patchify_order_and_inverse(channels, dtype):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (24, 40, channels), dtype)
    values = patches.patchify(image, 8)
    assert np.array_equal(values, rearrange(image, "(h p) (w q) c -> (h w) (p q c)", p=8, q=8))
    coords = np.stack(np.divmod(np.arange(15), 5), 1)
    assert np.array_equal(patches.unpatchify(values, coords, (3, 5), 8, 0), image)


@pytest.mark.parametrize(("size", "target"), [((100, 80), (32, 48)), ((20, 200), (64, 64)), ((30, 30), (64, 16))])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_resize_is_close_to_pillows(size, target, channels):
    y, x = np.mgrid[: size[0], : size[1]]
    image = np.stack([127 + 100 * np.sin(y / 9 + c) * np.cos(x / 11) for c in range(channels)], 2).astype(np.uint8)
    got = patches.resize(image, *target)
    assert got.shape == (*target, channels) and got.dtype == np.uint8
    for c in range(channels):
        want = np.asarray(Image.fromarray(image[:, :, c]).resize(target[::-1], Image.Resampling.BILINEAR), float)
        assert np.abs(got[:, :, c] - want).mean() < 4


@pytest.mark.parametrize("shrink", [1.1, 1.6, 2.3, 2.9, 3.5, 5.3, 7.8, 9.0])
def test_resize_is_as_near_to_pillows_bicubic_as_area_averaging_is(shrink):
    for photo in load_sample_images().images:
        height, width = (round(side / shrink) for side in photo.shape[:2])
        wanted = np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.BICUBIC), float)
        area = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
        ours, averaged = (20 * np.log10(255 / np.std(x - wanted)) for x in (patches.resize(photo, height, width), area))
        assert ours > averaged - 2 and ours > 37


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_resize_keeps_brightness(dtype, value):
    flat = np.full((90, 120, 3), value, dtype)
    for shrink in (0.7, 1.1, 1.37, 2.2, 3.3, 5.7, 7.9, 20.0):
        assert (patches.resize(flat, round(90 / shrink), round(120 / shrink)) == value).all()


def test_only_the_kept_patches_are_written():
    image = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    kept, out = np.array([1, 7, 14]), np.zeros((3, 192), np.uint8)
    patches.patchify(image, 8, kept, out=out)
    assert np.array_equal(out, patches.patchify(image, 8)[kept])


def test_resize_does_not_alias():
    stripes = np.tile(np.array([[0], [255]], np.uint8), (64, 128))[:, :, None]
    assert np.abs(patches.resize(stripes, 16, 16).astype(int) - 127).max() <= 2


def test_augmentation_keeps_shape_and_depends_on_the_generator_alone():
    cfg = base.augment()
    cfg.update(flip=True, randaugment_ops=2, erasing=1.0)
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    outs = [augment.augment(image, cfg, np.random.default_rng(i)) for i in (1, 1, 2)]
    assert all(o.shape == image.shape and o.dtype == np.uint8 for o in outs)
    assert np.array_equal(outs[0], outs[1]) and not np.array_equal(outs[0], outs[2])


@pytest.mark.parametrize("name", augment._OPS)
def test_every_operation_runs_at_full_strength(name):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8))
    for strength in (-1.0, 0.0, 1.0):
        assert augment._OPS[name](image, strength).size == (24, 16)


def test_randaugment_is_refused_for_other_pixels():
    cfg = base.augment()
    cfg.randaugment_ops = 2
    with pytest.raises(UserError, match="4 channels"):
        augment.check(cfg, 4, 8)
