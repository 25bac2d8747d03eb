"""A source of random images in memory, for tests of the loader and the trainer."""

import numpy as np

from input_pipeline.sources import Record


class MemorySource:
    """`count` images of random sizes; image i is labelled i % classes. `broken` ones hold bytes that are no image."""

    def __init__(self, count=40, classes=3, seed=0, broken=(), channels=3, low=10, high=60, dtype=np.uint8):
        rng = np.random.default_rng(seed)
        self.class_names = tuple(f"class{c}" for c in range(classes))
        self.shapes = rng.integers(low, high, (count, 2))
        self.seed, self.broken, self.channels, self.dtype = seed, set(broken), channels, dtype

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, i):
        rng = np.random.default_rng((self.seed, i))
        top = np.iinfo(self.dtype).max
        image = rng.integers(0, top, (*self.shapes[i], self.channels), self.dtype, endpoint=True)
        return Record(b"no image" if i in self.broken else image, i % len(self.class_names))

    def describe(self, i):
        return f"memory image {i}"

    def known_sizes(self):
        return self.shapes.astype(np.int32)

    def fingerprint(self):
        return f"memory-{len(self)}-{self.seed}"
