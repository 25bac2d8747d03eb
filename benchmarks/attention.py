"""Attention alone, forward and backward: each backend of this platform against `jax.nn` with a mask and torch's SDPA.

    python -m benchmarks.attention [--lengths 256 1024 4096] [--heads 3 12] [--backends dense slabs ...] [--json FILE]

About 4096 tokens of images of 16 to 256, as planned rows; head size 64, float32, the gradients of q, k and v. Both
peers get a dense boolean mask, made once outside the timed call; ours derives what it needs of the ids in it. Each side
has a process of its own. A backend that cannot run here is left out, with its reason.
"""

import argparse
import time
from functools import partial

import numpy as np

from benchmarks import common
from benchmarks.images import draw_grids, plan_step
from benchmarks.train_step import IMAGES, SEED, TOKENS
from benchmarks.worker import Worker

BACKENDS = ("dense", "slabs", "tiles", "splash", "flash", "cudnn")
PEERS = {"jax.nn": "jax.nn attention", "torch SDPA": "torch attention"}
HEAD, ROW_TOKENS = 64, 4096


def ids_of(spec: dict) -> np.ndarray:
    """[B, L] int32 segment ids of a step's rows."""
    tokens = np.prod(spec["grids"], axis=1)
    ids = np.zeros((len(spec["rows"]), spec["length"]), np.int32)
    for b, members in enumerate(spec["rows"]):
        found = np.repeat(np.arange(1, len(members) + 1), tokens[members])
        ids[b, : len(found)] = found
    return ids


def random_qkv(spec: dict, shape: tuple[int, ...]) -> list[np.ndarray]:
    return list(np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32))


class JaxAttention:
    """Value and gradients of sum(attention * weights), compiled. spec: a step's, `heads`, and `backend` of ours."""

    def __init__(self, spec: dict):
        import jax
        import jax.numpy as jnp

        from input_pipeline.capacity import Capacity

        ids_BL = ids_of(spec)
        shape = (*ids_BL.shape, spec["heads"], HEAD)
        rows, slabs = spec["capacity"]
        capacity = Capacity(rows, tuple(map(tuple, slabs)))
        attend = self.ours(spec, capacity) if spec.get("backend") else self.plain()
        same_B1LM = (ids_BL[:, None, :, None] == ids_BL[:, None, None, :]) & (ids_BL > 0)[:, None, None, :]

        def loss(q, k, v, w, ids, mask):
            return (attend(q, k, v, ids, mask) * w).sum()

        args = jax.device_put(
            (*random_qkv(spec, shape), ids_BL, None if spec.get("backend") else jnp.asarray(same_B1LM))
        )
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
        self.call, self.info = lambda: jax.block_until_ready(step(*args)), {}

    @staticmethod
    def plain():
        import jax

        return lambda q, k, v, ids, mask: jax.nn.dot_product_attention(q, k, v, mask=mask)

    @staticmethod
    def ours(spec: dict, capacity):
        from navit_jax import attention

        def attend(q, k, v, ids, mask):
            groups = attention.make_groups(
                ids, capacity=capacity, backend=spec["backend"], head_dim=HEAD, dtype=q.dtype
            )
            return attention.attend(q, k, v, groups)

        return attend

    def step(self) -> dict:
        start = time.perf_counter()
        self.call()
        return dict(inner=time.perf_counter() - start)


class TorchAttention:
    """The same with torch's scaled_dot_product_attention, head-major as it wants it."""

    def __init__(self, spec: dict):
        import torch
        import torch.nn.functional as F

        torch.set_num_threads(spec["threads"])
        ids = torch.from_numpy(ids_of(spec))
        mask = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids > 0)[:, None, None, :]
        mask |= (ids == 0)[:, None, :, None]  # no row of logits is masked whole
        q, k, v, w = (torch.from_numpy(x) for x in random_qkv(spec, (len(ids), spec["heads"], ids.shape[1], HEAD)))
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def call() -> None:
            out = F.scaled_dot_product_attention(*leaves, attn_mask=mask)
            torch.autograd.grad((out * w).sum(), leaves)

        self.call, self.info = call, {}

    def step(self) -> dict:
        self.call()
        return {}


SIDES = {"attention": JaxAttention, "jax.nn attention": JaxAttention, "torch attention": TorchAttention}


def runnable(backends: list[str], spec: dict) -> list[str]:
    """Those that can run here; says why the others cannot."""
    import jax
    import jax.numpy as jnp

    from input_pipeline.capacity import Capacity
    from input_pipeline.errors import UserError
    from navit_jax import attention

    (rows, slabs), ids_BL = spec["capacity"], jnp.asarray(ids_of(spec))
    make, found = partial(attention.make_groups, capacity=Capacity(rows, slabs), head_dim=HEAD), []
    for name in backends:
        try:
            jax.eval_shape(partial(make, backend=name), ids_BL)
            found.append(name)
        except (UserError, ImportError) as error:
            print(f"{name}: left out at L={ids_BL.shape[1]}: {error}")
    return found


def compare(spec: dict, backend: str, peer: str, repeats: int) -> common.Pair:
    """Seconds of a backend and of a peer, in turn."""
    with Worker(spec | dict(side="attention", backend=backend)) as mine, Worker(spec | dict(side=peer)) as other:
        return common.paired(mine.seconds, other.seconds, repeats, warmup=2)


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=(256, 1024, 4096))
    parser.add_argument("--heads", type=int, nargs="+", default=(3, 12))
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    print(common.header("jax", "torch", threads=args.threads))
    if args.quick:
        args.lengths, args.heads, args.repeats = args.lengths[:1], args.heads[:1], 1
    peers = [name for name in args.peers if name == "jax.nn" or common.installed("torch")]
    rows, cells, grids = [], [], draw_grids(IMAGES, TOKENS, first=SEED)
    for length in args.lengths:
        step = plan_step(grids, length, max(1, (512 if args.quick else ROW_TOKENS) // length)).spec()
        for heads, backend in ((h, b) for h in args.heads for b in runnable(args.backends, step)):
            spec = step | dict(heads=heads, threads=args.threads)
            pairs = {peer: compare(spec, backend, PEERS[peer], args.repeats) for peer in peers}
            for peer, pair in pairs.items():
                name = f"{backend} over {peer} L{length} {heads} heads"
                rows.append(common.row(name, "ms", 1e3 * pair.ours, 1e3 * pair.peer, pair.ratio))
            times = [x for pair in pairs.values() for x in (f"{1e3 * pair.peer:.1f}", f"**{pair.ratio:.2f}**")]
            cells.append([f"{backend}, L={length}, {heads} heads", f"{1e3 * pairs[peers[0]].ours:.1f}", *times])
            print(" | ".join(cells[-1]), flush=True)
    columns = ["backend", "ours, ms", *(x for peer in peers for x in (f"{peer}, ms", "ratio"))]
    print("\n" + common.markdown(columns, cells))
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
