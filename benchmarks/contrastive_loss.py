"""What the contrastive losses take over more and more images, against the dense loss: memory and time.

    python -m benchmarks.contrastive_loss [--images 1024 4096 16384 65536] [--json FILE]

A run is the value and all gradients, N images and their N texts, vectors of 512 numbers, blocks of 1024. The dense loss
is the usual one: logits by one product in float32, jax's own log-sum-exp and gradients, the pairs on the diagonal.
Memory is what the compiled program needs beside its inputs and outputs. The dense loss runs as long as that is at most
8 GiB; after that it is compiled alone. At eight devices the images are split over them, and XLA splits the dense loss;
these programs are compiled for virtual devices and not run. 65536 images take about 4 CPU minutes a loss.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import common
from navit_jax import sharding
from navit_jax.contrastive_loss import KINDS, Ids, contrastive_loss

IMAGES, WIDTH, BLOCK, LIMIT = (1024, 4096, 16384, 65536), 512, 1024, 8 * 2**30
SCALE, BIAS = 10.0, -10.0
DEVICES = 8


class Cost(NamedTuple):
    """Of one kind of loss over N images: bytes of memory a device, alone and of eight; seconds, None: not run."""

    kind: str
    images: int
    ours: int
    dense: int
    ours_of_eight: int
    dense_of_eight: int
    ours_seconds: float
    dense_seconds: float | None


def ours(kind: str, mesh: Mesh) -> Callable:
    def loss(z_NE, z_ME, scale, bias, pairs):
        with sharding.under(mesh):
            return contrastive_loss(z_NE, z_ME, pairs, scale, bias, kind=kind, mesh=mesh, block=BLOCK)[0]

    return loss


def dense(kind: str, mesh: Mesh) -> Callable:
    def loss(z_NE, z_ME, scale, bias, pairs):
        x_NM = scale * jnp.einsum("NE,ME->NM", z_NE, z_ME, precision=jax.lax.Precision.HIGHEST)
        if kind == "sigmoid":
            same_NM = pairs.example_N[:, None] == pairs.example_M
            return jax.nn.softplus(jnp.where(same_NM, -1, 1) * (x_NM + bias)).sum()
        positive_N = scale * (z_NE * z_ME).sum(1)
        return ((jax.nn.logsumexp(x_NM, 1) + jax.nn.logsumexp(x_NM, 0)) / 2 - positive_N).sum()

    return loss


def compile_step(loss: Callable, mesh: Mesh, images: int) -> jax.stages.Compiled:
    """Value and gradients of a loss over so many images and texts, rows split over the mesh."""
    z, ids = jax.ShapeDtypeStruct((images, WIDTH), jnp.float32), jax.ShapeDtypeStruct((images,), jnp.int32)
    rate, rows, whole = jax.ShapeDtypeStruct((), jnp.float32), sharding.rows(mesh), sharding.replicated(mesh)
    places = rows, rows, whole, whole
    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), in_shardings=(*places, rows), out_shardings=(whole, places)
    )
    return step.lower(z, z, rate, rate, Ids(*[ids] * 6)).compile()


def temporaries(step: jax.stages.Compiled) -> int:
    return step.memory_analysis().temp_size_in_bytes


def batch(images: int) -> tuple:
    """The same pairs for both: image n belongs to text n, as the dense loss expects it."""
    rng = np.random.default_rng(0)
    z_2NE = rng.normal(size=(2, images, WIDTH)).astype(np.float32)
    z_2NE /= np.linalg.norm(z_2NE, axis=-1, keepdims=True)
    ids = np.arange(images, dtype=np.int32)
    return jax.device_put((*z_2NE, np.float32(SCALE), np.float32(BIAS), Ids(*[ids] * 6)))


def seconds(steps: list[jax.stages.Compiled], images: int) -> list[float]:
    """Of each step, the fastest of 5 after one to warm up, by turns; up from 10,000 images of 1, with no warming up.

    Raises AssertionError where two steps disagree by more than 1e-4 in the value or in a gradient of the vectors.
    """
    args, times, repeats = batch(images), [], 6 if images < 10_000 else 1
    for _ in range(repeats):
        found, times = [], [*times, []]
        for step in steps:
            start = time.perf_counter()
            found.append(jax.block_until_ready(step(*args)))
            times[-1].append(time.perf_counter() - start)
        for other in found[1:]:
            for a, b in zip(jax.tree.leaves(found[0])[:3], jax.tree.leaves(other)[:3], strict=True):
                assert jnp.abs(a - b).max() <= 1e-4 * jnp.abs(b).max()
    return np.min(times[-5:], axis=0).tolist()


def on_eight(images: list[int]) -> dict:
    """{kind: [[bytes of ours, bytes of dense], ...]} a device, from another process, as this one has its devices."""
    command = [sys.executable, "-m", "benchmarks.contrastive_loss", "--memory-only", "--images", *map(str, images)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def memory(images: list[int]) -> dict:
    mesh = sharding.make_mesh()
    return {
        kind: [[temporaries(compile_step(make(kind, mesh), mesh, n)) for make in (ours, dense)] for n in images]
        for kind in KINDS
    }


def measure(images: list[int]) -> list[Cost]:
    mesh, found = sharding.make_mesh(devices=jax.devices()[:1]), []
    split = on_eight(images)
    for kind in KINDS:
        for i, n in enumerate(images):
            steps = [compile_step(make(kind, mesh), mesh, n) for make in (ours, dense)]
            needs = [temporaries(step) for step in steps]
            took = seconds(steps[: 1 + (needs[1] <= LIMIT)], n)
            found.append(Cost(kind, n, *needs, *split[kind][i], took[0], took[1] if len(took) == 2 else None))
            print(" | ".join(table(found[-1:])[1][0]), file=sys.stderr)
    return found


def table(found: list[Cost]) -> tuple[list[str], list[list[str]]]:
    header = ["loss", "images", "ours, MiB", "dense, MiB", "dense / ours", "of 8 devices: ours, MiB", "dense, MiB"]
    rows = []
    for c in found:
        sizes = [f"{b / 2**20:,.0f}" for b in (c.ours, c.dense, c.ours_of_eight, c.dense_of_eight)]
        sizes.insert(2, f"{c.dense / c.ours:.1f}")
        dense = "not run" if c.dense_seconds is None else f"{c.dense_seconds:.2f}"
        rows.append([c.kind, f"{c.images:,}", *sizes, f"{c.ours_seconds:.2f}", dense])
    return [*header, "ours, seconds", "dense, seconds"], rows


def json_rows(found: list[Cost]) -> list[dict]:
    rows = []
    for c in found:
        pairs = [("memory", "MiB", c.ours / 2**20, c.dense / 2**20)]
        pairs.append(("memory of 8 devices", "MiB a device", c.ours_of_eight / 2**20, c.dense_of_eight / 2**20))
        if c.dense_seconds is not None:
            pairs.append(("time", "s", c.ours_seconds, c.dense_seconds))
        for name, unit, mine, peer in pairs:
            name = f"{c.kind} loss of {c.images} pairs, {name}"
            rows.append(dict(name=name, unit=unit, ours=mine, peer=peer, ratio=peer / mine))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--json", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--memory-only", action="store_true", help="print bytes a device of what is compiled, as JSON")
    args = parser.parse_args()
    if args.memory_only:
        print(json.dumps(memory(args.images)))
        return
    found = measure(args.images)
    print(f"On {common.machine()}; {common.versions('jax')}.\n\n{common.markdown(*table(found))}")
    if args.json:
        args.json.write_text(json.dumps(json_rows(found), indent=1))


if __name__ == "__main__":
    main()
