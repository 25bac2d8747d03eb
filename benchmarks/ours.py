"""Our side of the training-step benchmarks: the model, objective, optimizer and step that `train.py` runs.

A step starts from images in memory, as the peers' do: rows of patches are cut and put on the device in it.
"""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.images import LABELS, PATCH, make_images
from configs import base
from input_pipeline import patches
from input_pipeline.capacity import Capacity
from input_pipeline.packed import Batch, Packed
from navit_jax import console, objectives, optim, sharding, train_step


def pack(images: Sequence[np.ndarray], labels: np.ndarray, rows: list[list[int]], length: int) -> Batch:
    """The rows of a step; K is what the fullest row needs."""
    slots = max(map(len, rows))
    values = np.zeros((len(rows), length, PATCH * PATCH * images[0].shape[2]), np.uint8)
    ids, coords = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length, 3), np.int32)
    grids, targets = np.zeros((len(rows), slots, 3), np.int32), np.full((len(rows), slots), -1, np.int32)
    index = np.full((len(rows), slots), -1, np.int32)
    for b, members in enumerate(rows):
        start = 0
        for k, i in enumerate(members):
            h, w = images[i].shape[0] // PATCH, images[i].shape[1] // PATCH
            stop = start + h * w
            values[b, start:stop], ids[b, start:stop] = patches.patchify(images[i], PATCH), k + 1
            coords[b, start:stop, 1], coords[b, start:stop, 2] = np.divmod(np.arange(h * w), w)
            grids[b, k], targets[b, k], index[b, k] = (1, h, w), labels[i], i
            start = stop
    return Batch(Packed(values, ids, coords, grids), targets, index)


class Ours:
    """Packed rows, as planned.

    spec: that of an `images.Step`; `sizes`, width, depth, heads and mlp_dim; `model`, further fields of config.model.
    """

    def __init__(self, spec: dict):
        grids = np.array(spec["grids"])
        self.images, self.labels = make_images(grids, PATCH)
        self.place(grids, spec)
        config = base.get_config()
        config.loss.kind = "softmax"
        config.model.update(variant="Ti/16", **spec["sizes"], **spec.get("model", {}))
        config.optim.update(lr=1e-4, schedule="constant", weight_decay=(), clip_norm=0.0)  # plain Adam
        self.objective = objectives.make(config, LABELS)
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        tx, _ = optim.make_optimizer(config.optim, self.objective.shapes, 1000)
        like = jax.eval_shape(lambda p: train_step.init_state(p, tx, False), self.objective.shapes)
        places = sharding.state_shardings(self.mesh, like)
        self.state = train_step.new_state(lambda: self.objective.init(0), tx, False, places)
        jax.block_until_ready(self.state)
        self.run = train_step.make_train_step(self.objective.gradient(self.mesh), tx, self.mesh, places)
        self.compiled = None
        self.host = sharding.put_host(self.mesh, (0.0,))
        gflop = self.objective.flops(grids.prod(1), np.zeros(0)) / 1e9
        fill = float(grids.prod(1).sum() / (len(self.rows) * self.length))
        self.info = dict(rows=len(self.rows), fill=fill, gflop=gflop)

    def place(self, grids_I2: np.ndarray, spec: dict) -> None:
        """Which image lies in which row, the rows' length and what they promise."""
        self.rows, self.length = spec["rows"], spec["length"]
        rows, slabs = spec["capacity"]
        self.capacity = Capacity(rows, tuple(map(tuple, slabs)))

    def batch(self) -> Batch:
        batch = pack(self.images, self.labels, self.rows, self.length)
        batch = batch._replace(images=batch.images._replace(capacity=self.capacity))
        return sharding.put(self.mesh, batch, len(self.rows))

    def step(self) -> dict:
        start = time.perf_counter()
        batch = jax.block_until_ready(self.batch())
        packed = time.perf_counter()
        if self.compiled is None:
            self.compiled = console.compile_step(self.run, self.state, batch, self.host)
        self.state, metrics = self.compiled(self.state, batch, self.host)
        loss = float(metrics["loss"]) / float(metrics["images"])
        jax.block_until_ready(self.state)
        return dict(pack=packed - start, loss=loss)

    def temporaries(self) -> dict:
        """MiB that XLA says the step needs beside its inputs and outputs."""
        return dict(temporaries=self.compiled.memory_analysis().temp_size_in_bytes / 2**20)

    def peak(self) -> dict:
        """GFLOP/s of f32 products, the best of 5: square, and of the shapes that the model has."""
        return dict(square=gflops(2048, 2048, 2048), model=gflops(6144, 192, 768))


class OursPadded(Ours):
    """The same model with one image a row, padded to the longest: of squares of one size, the usual ViT."""

    def place(self, grids_I2: np.ndarray, spec: dict) -> None:
        self.length, self.capacity = int(grids_I2.prod(1).max()), None
        self.rows = [[i] for i in range(len(grids_I2))]


def gflops(m: int, k: int, n: int) -> float:
    """Of an f32 product [m, k] x [k, n] under jit, the best of 5 calls of 8 products."""
    a, b = jnp.ones((m, k)), jnp.ones((k, n))
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, b))
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(8):
            jax.block_until_ready(product(a, b))
        best = max(best, 8 * 2e-9 * m * k * n / (time.perf_counter() - start))
    return best


SIDES = {"ours": Ours, "ours padded": OursPadded}
