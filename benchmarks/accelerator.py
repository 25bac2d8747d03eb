"""Tokens a second and MFU of a training step on an accelerator, each attention backend, and the peers on the same card.

    python -m benchmarks.accelerator [--variants B/16 L/16] [--lengths 256 1024 4096] [--tokens 65536] [--json FILE]
    python -m benchmarks.accelerator --quick                  # a smoke test, on a CPU too

bfloat16 with float32 parameters, Adam, images of 16 to 256 tokens, rows as planned and already on the device. MFU
counts useful FLOPs only (`navit.flops_forward` times three: no padding, no masked logits, nothing recomputed) against
the card's peak. Peers run before, in processes of their own, on the same card under torch's autocast; no step waits
for the host. vit-pytorch packs in its model, as part of its step; timm's batch is padded before, as ours is packed.
"""

import argparse
import os
import statistics
import time

import numpy as np

from benchmarks import common
from benchmarks.images import draw_grids, plan_step
from benchmarks.train_step import IMAGES, SEED, TOKENS
from benchmarks.worker import Worker

BACKENDS = ("dense", "slabs", "tiles", "splash", "flash", "cudnn")
PEERS = ("vit-pytorch", "timm")
UPDATES = 5  # between two looks at the clock, so that the host's share overlaps as it does in a run


def spec_of(variant: str, length: int, tokens: int, args: argparse.Namespace) -> dict:
    """Of a step of about so many tokens."""
    from navit_jax import navit

    sizes = navit.variant(variant)
    del sizes["patch_size"]
    if args.quick:
        sizes = dict(width=64, depth=1, heads=1, mlp_dim=64)
    copies = -(-tokens // TOKENS)
    grids = np.tile(draw_grids(IMAGES, TOKENS, first=SEED), (copies, 1))
    rows = max(1, tokens // length // 8) * 8 if tokens >= 8 * length else 1
    model = dict(remat=args.remat, dtype="bfloat16")
    return plan_step(grids, length, rows).spec() | dict(sizes=sizes, model=model, updates=1 if args.quick else UPDATES)


def ours(spec: dict, backend: str, repeats: int) -> tuple[float, float]:
    """(seconds a step, GFLOP) of our step on rows that lie on the device."""
    import jax

    from benchmarks.ours import Ours

    side = Ours(spec | dict(model=spec["model"] | dict(attention=backend)))
    batch = side.batch()
    step = side.run.lower(side.state, batch, side.host).compile()
    times, state = [], side.state
    for _ in range(2 + repeats):
        start = time.perf_counter()
        for _ in range(spec["updates"]):
            state, _ = step(state, batch, side.host)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / spec["updates"])
    return statistics.median(times[2:]), side.info["gflop"]


def peer(name: str, spec: dict, repeats: int) -> float:
    """Seconds a step of a peer under torch's autocast, on the device that ours runs on."""
    import jax

    how = dict(device="cpu" if jax.default_backend() == "cpu" else "cuda", threads=common.cores())
    with Worker(spec | how | dict(side=name, autocast=True, collated=True)) as side:
        times = [side.seconds() / spec["updates"] for _ in range(2 + repeats)]
    return statistics.median(times[2:])


def runnable_peers(names: list[str]) -> list[str]:
    """Those that are installed, if torch has the device that ours runs on; says why not."""
    import jax

    names, platform = [name for name in names if common.installed(name)], jax.default_backend()
    if names and platform != "cpu":
        import torch

        if platform != "gpu" or not torch.cuda.is_available():
            print(f"peers left out: torch {torch.__version__} cannot use {jax.devices()[0].device_kind}")
            return []
    return names


def measure(variant: str, length: int, args: argparse.Namespace) -> tuple[list[list[str]], list[dict]]:
    """Cells and rows of one model at one length."""
    import jax
    import jax.numpy as jnp

    from benchmarks.attention import runnable
    from navit_jax import metrics

    spec = spec_of(variant, length, args.tokens, args)
    tokens, name = int(np.prod(spec["grids"], axis=1).sum()), f"{variant} L{length}"
    peak, _ = metrics.peak_flops(jax.local_devices()[0], jnp.dtype("bfloat16"))
    others = {other: peer(other, spec, args.repeats) for other in args.peers}  # before ours fills the memory
    found, cells, rows = {}, [], []
    for backend in runnable(args.backends, spec):
        seconds, gflop = ours(spec, backend, args.repeats)
        found[backend], mfu = seconds, gflop * 1e9 / seconds / peak
        cells.append([name, backend, f"{tokens / seconds:,.0f}", f"{100 * mfu:.1f} %"])
        print(" | ".join(cells[-1]), flush=True)
        rows.append(common.row(f"{name} {backend} MFU", "%", 100 * mfu, 40.0, mfu / 0.4))
    best = min(found.values())
    for other, seconds in others.items():
        cells.append([name, other, f"{tokens / seconds:,.0f}", ""])
        rows.append(common.row(f"{other} {name}", "tokens/s", tokens / best, tokens / seconds, seconds / best))
    return cells, rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--variants", nargs="+", default=("B/16", "L/16"))
    parser.add_argument("--lengths", type=int, nargs="+", default=(256, 1024, 4096))
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--peers", nargs="*", default=PEERS, help="those of benchmarks.peers_torch")
    parser.add_argument("--tokens", type=int, default=65_536, help="of a step")
    parser.add_argument("--remat", default="light", help="config.model.remat")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.repeats, args.variants, args.lengths = 2048, 1, ("B/16",), args.lengths[:1]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a card's memory, which peers need too
    args.peers = runnable_peers(args.peers)
    print(common.header("jax", "jaxlib", "torch", *args.peers))
    cells, rows = [], []
    for variant in args.variants:
        for length in args.lengths:
            more = measure(variant, length, args)
            cells, rows = cells + more[0], rows + more[1]
    print("\n" + common.markdown(["model", "attention or peer", "tokens/s", "MFU"], cells))
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
