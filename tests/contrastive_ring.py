"""Steps to try the contrastive loss on, its dense formula in float64, and a program for eight virtual devices.

`python tests/contrastive_ring.py FILE` writes FILE.npz, what each mesh computes of each case, and FILE.json, what the
compiled program of eight devices holds and sends. The caller's environment makes the devices.
"""

import json
import re
import sys
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from navit_jax import sharding
from navit_jax.contrastive_loss import Ids, contrastive_loss
from navit_jax.plan import hlo

N, M, E, BLOCK = 48, 32, 16, 5  # 5 divides neither side's share of any mesh, so that blocks are filled up
SCALE, BIAS = 20.0, -4.0
KINDS = ("softmax", "sigmoid")
MESHES = ("2,1,1", "1,2,1", "2,2,1", "2,2,2", "8,1,1")
CASES = ("matched", "partly", "equal texts", "one text", "no numbers", "sparse", "one pair", "apart", "empty")


def unit(rng, *shape):
    z = rng.normal(size=shape)
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def draw(case, seed=0):
    """(z_NE, z_ME, Ids) of a step; texts lie anywhere."""
    rng = np.random.default_rng([seed, CASES.index(case)])
    texts = {"one text": 1, "equal texts": 6}.get(case, 1000)
    number = rng.integers(0, texts, N) if case != "no numbers" else np.full(N, -1)
    both = rng.permutation(N)
    example_N, example_M = rng.permutation(N), both[:M]
    if case in ("partly", "equal texts", "no numbers"):
        example_N = np.where(rng.random(N) < 0.3, -1, example_N)
        example_M = np.where(rng.random(M) < 0.3, -1, example_M)
    if case == "sparse":  # whole devices without a pair
        example_N, example_M = np.where(np.arange(N) < N - 7, -1, example_N), np.where(np.arange(M) < 9, example_M, -1)
    if case == "one pair":
        example_N, example_M = np.full(N, -1), np.full(M, -1)
        example_N[rng.integers(N)] = example_M[rng.integers(M)] = 3
    if case == "apart":
        example_N = np.where(np.isin(example_N, example_M), -1, example_N)
    if case == "empty":
        example_N, example_M = np.full(N, -1), np.full(M, -1)
    image = rng.integers(0, 30, N) if case in ("partly", "one text") else np.full(N, -1)
    ids = [example_N, example_M, *(np.where(e < 0, -1, x[e]) for x in (number, image) for e in (example_N, example_M))]
    return unit(rng, N, E), unit(rng, M, E), Ids(*(x.astype(np.int32) for x in ids))


def reference(z_NE, z_ME, pairs, kind, scale=SCALE, bias=BIAS):
    """Loss, images, correct, and gradients of the vectors, the scale and the bias: dense, float64, by the formulas."""
    n, m = (np.asarray(z, np.float64) for z in (z_NE, z_ME))
    valid_N = np.array([e >= 0 and e in set(pairs.example_M.tolist()) for e in pairs.example_N])
    valid_M = np.array([e >= 0 and e in set(pairs.example_N.tolist()) for e in pairs.example_M])
    n, m = np.where(valid_N[:, None], n, 0), np.where(valid_M[:, None], m, 0)
    both = valid_N[:, None] & valid_M
    same = both & (pairs.example_N[:, None] == pairs.example_M)
    equal = (pairs.number_N[:, None] == pairs.number_M) & (pairs.number_M >= 0)
    copies = (pairs.image_N[:, None] == pairs.image_M) & (pairs.image_M >= 0)
    other = both & ~same & ~equal & ~copies
    x = scale * n @ m.T + bias * (kind == "sigmoid")
    top = np.where(other, x, -np.inf).max(1)
    correct = sum(x[i, same[i]].sum() > top[i] for i in np.flatnonzero(valid_N))
    if kind == "sigmoid":
        y = np.where(same, 1.0, -1.0)
        loss = np.where(same | other, np.log1p(np.exp(-y * x)), 0).sum()
        d = np.where(same | other, -y / (1 + np.exp(y * x)), 0)
    else:
        e = np.where(same | other, np.exp(x), 0)
        shares = [
            e / np.where(e.sum(axis) > 0, e.sum(axis), 1).reshape((-1, 1) if axis else (1, -1)) for axis in (0, 1)
        ]
        loss = -sum(np.log(share[same]).sum() for share in shares) / 2
        d = sum(share - same for share in shares) / 2
    d_bias = d.sum() * (kind == "sigmoid")
    return loss, same.sum(), correct, scale * d @ m, scale * d.T @ n, (d * (n @ m.T)).sum(), d_bias


def step(kind, mesh, block=BLOCK):
    """What `reference` gives, as a training step would compute it."""

    def run(z_NE, z_ME, pairs, scale, bias):
        def loss(*args):
            return contrastive_loss(args[0], args[1], pairs, *args[2:], kind=kind, mesh=mesh, block=block)

        with sharding.under(mesh):
            total, vjp, metrics = jax.vjp(loss, z_NE, z_ME, scale, bias, has_aux=True)
            return total, metrics["images"], metrics["correct"], *vjp(1.0)

    rows, all_ = sharding.rows(mesh), sharding.replicated(mesh)
    places = dict(in_shardings=(rows, rows, rows, all_, all_), out_shardings=(all_, all_, all_, rows, rows, all_, all_))
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0}, **places)


def alone():
    return sharding.make_mesh(devices=jax.devices()[:1])


def compiled(kind, mesh, slots, block, width=E):
    """The step for as many images as texts."""
    z, ids = jax.ShapeDtypeStruct((slots, width), jnp.float32), jax.ShapeDtypeStruct((slots,), jnp.int32)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return step(kind, mesh, block).lower(z, z, Ids(*[ids] * 6), rate, rate).compile()


def largest(text):
    """Numbers in the largest array of a compiled program."""
    return max(prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))


def mesh_of(sizes):
    sizes = tuple(map(int, sizes.split(",")))
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes)), devices=jax.devices()[: prod(sizes)])


def main(file):
    """FILE.npz: what each mesh computes of each case; FILE.json: what the program of eight devices holds and sends."""
    arrays, programs = {}, {}
    for mesh in map(mesh_of, MESHES):
        name = ",".join(str(mesh.shape[axis]) for axis in sharding.AXES)
        for kind in KINDS:
            run = step(kind, mesh)
            for case in CASES:
                got = jax.block_until_ready(run(*draw(case), SCALE, BIAS))
                arrays |= {f"{name} {kind} {case} {i}": np.asarray(x) for i, x in enumerate(got)}
    for kind in KINDS:
        text = compiled(kind, mesh_of("8,1,1"), 1024, 32).as_text()
        by_kind = {k: count for k, (_, count, _) in hlo.by_kind(hlo.collectives(text)).items()}
        permuted = by_kind.pop("collective-permute")
        programs[kind] = dict(endless=hlo.endless(text), largest=largest(text), flops=hlo.flops(text))
        programs[kind] |= dict(permuted=permuted, other=sum(by_kind.values()))
    np.savez(f"{file}.npz", **arrays)
    Path(f"{file}.json").write_text(json.dumps(programs))


if __name__ == "__main__":
    main(sys.argv[1])
