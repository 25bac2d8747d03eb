"""Augmentation that leaves sizes alone: flips, RandAugment, erasing, and blending with a row neighbour.

All of it runs on the resized image (a tenth of the original's pixels) and is drawn from the example's own generator,
so it does not depend on workers or order. Crops are part of the plan (`budget`), since they change the aspect. The
paper trains without any of it; small data needs it. RandAugment: Cubuk et al. 2019, Pillow's operations.
"""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

from input_pipeline.errors import UserError


def check(cfg: ConfigDict, channels: int, bits: int) -> None:
    """Refuse settings that the pixels cannot take. cfg is `config.augment`."""
    if cfg.randaugment_ops and (channels != 3 or bits != 8):
        raise UserError(
            f"augment.randaugment_ops={cfg.randaugment_ops} needs 8-bit RGB, but the data has {channels} channels "
            f"of {bits} bits. "
            "Set --config.augment.randaugment_ops=0."
        )
    if not 0 < cfg.crop_min_area <= 1 or cfg.crop_max_aspect < 1:
        raise UserError(
            f"augment.crop_min_area={cfg.crop_min_area} must lie in (0, 1] and "
            f"augment.crop_max_aspect={cfg.crop_max_aspect} be >= 1"
        )


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))


# name: (operation of image and strength in [-1, 1]), strength being the magnitude over 30 with a random sign
_OPS = {
    "autocontrast": lambda im, s: ImageOps.autocontrast(im),
    "equalize": lambda im, s: ImageOps.equalize(im),
    "rotate": lambda im, s: _rotate(im, 30 * s),
    "solarize": lambda im, s: ImageOps.solarize(im, int(256 * (1 - abs(s)))),
    "posterize": lambda im, s: ImageOps.posterize(im, max(1, 8 - int(4 * abs(s)))),
    "color": lambda im, s: ImageEnhance.Color(im).enhance(1 + 0.9 * s),
    "contrast": lambda im, s: ImageEnhance.Contrast(im).enhance(1 + 0.9 * s),
    "brightness": lambda im, s: ImageEnhance.Brightness(im).enhance(1 + 0.9 * s),
    "sharpness": lambda im, s: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * s),
    "shear_x": lambda im, s: _affine(im, (1, 0.3 * s, 0, 0, 1, 0)),
    "shear_y": lambda im, s: _affine(im, (1, 0, 0, 0.3 * s, 1, 0)),
    "translate_x": lambda im, s: _affine(im, (1, 0, 0.45 * s * im.width, 0, 1, 0)),
    "translate_y": lambda im, s: _affine(im, (1, 0, 0, 0, 1, 0.45 * s * im.height)),
}


def rand_augment(image: np.ndarray, ops: int, magnitude: float, rng: np.random.Generator) -> np.ndarray:
    """`ops` random operations of strength magnitude / 30 on [h, w, 3] uint8."""
    picture = Image.fromarray(image)
    for name in rng.choice(list(_OPS), ops):
        picture = _OPS[name](picture, magnitude / 30 * rng.choice([-1.0, 1.0]))
    return np.asarray(picture)


def erase(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A rectangle of 2-33 % of the area becomes noise (Zhong et al. 2017)."""
    h, w, channels = image.shape
    area, aspect = rng.uniform(0.02, 0.33) * h * w, np.exp(rng.uniform(-1.2, 1.2))
    eh, ew = (int(np.clip(np.sqrt(area * f), 1, side)) for f, side in ((aspect, h), (1 / aspect, w)))
    top, left = rng.integers(0, h - eh + 1), rng.integers(0, w - ew + 1)
    image = image.copy()
    image[top : top + eh, left : left + ew] = rng.integers(
        0, np.iinfo(image.dtype).max, (eh, ew, channels), endpoint=True
    )
    return image


def augment(image: np.ndarray, cfg: ConfigDict, rng: np.random.Generator) -> np.ndarray:
    """[h, w, C] to the same shape and dtype. cfg is `config.augment`."""
    if cfg.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    if cfg.randaugment_ops:
        image = rand_augment(np.ascontiguousarray(image), cfg.randaugment_ops, cfg.randaugment_magnitude, rng)
    if cfg.erasing and rng.random() < cfg.erasing:
        image = erase(image, rng)
    return image
