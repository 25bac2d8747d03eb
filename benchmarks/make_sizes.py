"""Makes `tests/data/sizes_100k.npz`, the list of image sizes that packing is tested and measured on.

A mixture of what image collections hold: camera and web sizes that recur exactly (500x375, 640x480, ...), photographs
of continuous sizes, and a few per cent of banners and document pages. Run: python -m benchmarks.make_sizes
"""

import numpy as np

COMMON = [(375, 500), (500, 375), (480, 640), (640, 480), (333, 500), (427, 640), (768, 1024), (1200, 1600), (500, 500)]


def make(count: int = 100_000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    fixed = np.array(COMMON)[rng.choice(len(COMMON), count, p=np.array([18, 6, 10, 4, 10, 8, 4, 3, 3]) / 66)]
    area = np.exp(rng.normal(np.log(420**2), 0.8, count))
    wide = rng.random(count) < 0.04
    aspect = np.exp(np.where(wide, rng.uniform(-2.3, 2.3, count), rng.normal(0.12, 0.35, count)))
    free = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], 1)
    sizes = np.where((rng.random(count) < 0.6)[:, None], fixed, free)
    return np.clip(np.round(sizes), 16, 8000).astype(np.uint16)


if __name__ == "__main__":
    np.savez_compressed("tests/data/sizes_100k.npz", sizes=make())
