"""Our side of `benchmarks.packed_inference`: a model that a person calls, with weights from the peer's own files."""

import time

import numpy as np

import navit_jax
from benchmarks.images import PATCH, make_images
from navit_jax.predict import Model


class Ours:
    """Vectors of all images, from arrays in memory, each of its own size.

    spec: `grids`; `weights`, a folder that `navit_jax.load` reads; `most`, tokens of an image.
    """

    def __init__(self, spec: dict):
        self.images, _ = make_images(np.array(spec["grids"]), PATCH)
        self.model: Model = navit_jax.load(spec["weights"], threads=spec["threads"])
        self.most = spec["most"]
        self.info = dict(tokens=int(np.prod(spec["grids"], axis=1).sum()))

    def run(self) -> list[np.ndarray]:
        return self.model.embed(self.images, self.most, enlarge=False)

    def step(self) -> dict:
        """Inference of all images; seconds are measured around it."""
        start = time.perf_counter()
        found = self.run()
        return dict(loss=float(np.mean(found)), pack=0.0, inside=time.perf_counter() - start)

    def vectors(self) -> dict:
        return dict(vectors=[x.tolist() for x in self.run()], programs=self.model.compiled)


SIDES = {"ours inference": Ours}
