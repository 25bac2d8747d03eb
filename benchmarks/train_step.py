"""Images a second and memory of one Adam step, ours against the packed and padded PyTorch models, at the same images.

    python -m benchmarks.train_step [--peers vit-pytorch timm ...] [--lengths 256 1024 2048] [--json FILE] [--quick]
    python -m benchmarks.train_step --lengths 1024 --ours-only

64 images of 6064 tokens, 16 to 256 each; width 192, depth 12, 3 heads, MLP 768, patch 16, 1000 classes, float32.
"""

import statistics

import numpy as np

from benchmarks import common
from benchmarks.images import draw_grids
from benchmarks.worker import Worker

IMAGES, TOKENS, SEED = 64, 6064, 94_202
LENGTHS = (256, 1024, 2048)


def spec(side: str, grids: np.ndarray, **options: object) -> dict:
    return dict(side=side, grids=grids.tolist(), **options)


def measure(ours: dict, peer: dict | None, repeats: int, warmup: int = 2) -> dict:
    """Steps of both in turn; peer None: ours alone. Medians, and the peak of memory over the counted steps."""
    with Worker(ours) as mine:
        if peer is None:
            return summary(mine, None, repeats, warmup)
        with Worker(peer) as other:
            return summary(mine, other, repeats, warmup)


def summary(mine: Worker, other: Worker | None, repeats: int, warmup: int) -> dict:
    sides = [mine] if other is None else [mine, other]
    for _ in range(warmup):
        for side in sides:
            side.step()
    for side in sides:
        side.memory()
    steps = [[side.step() for side in sides] for _ in range(repeats)]
    memory = [side.memory() for side in sides]
    seconds = [[x["seconds"] for x in turn] for turn in steps]
    found = dict(ours=statistics.median(t[0] for t in seconds), memory=memory[0], info=mine.info)
    found["pack"] = statistics.median(turn[0]["pack"] for turn in steps)
    found["best"] = min(t[0] for t in seconds)
    found["peak"] = mine.ask("peak")
    found["temporaries"] = mine.ask("compiled")["temporaries"]
    if other:
        found |= dict(pair=common.pair_of(seconds), peer_memory=memory[1], peer_info=other.info)
    return found


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--peers", nargs="+", default=["vit-pytorch"])
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    grids = draw_grids(IMAGES, TOKENS, first=SEED)
    for length in args.lengths:
        ours = spec("ours", grids, length=length, threads=args.threads)
        for peer in [None] if args.ours_only else args.peers:
            other = peer and spec(peer, grids, length=length, threads=args.threads)
            found = measure(ours, other, args.repeats)
            info, peak = found["info"], found["peak"]
            print(
                f"ours L{length}: {IMAGES / found['ours']:.1f} images/s (best {IMAGES / found['best']:.1f}), "
                f"{1000 * found['ours']:.0f} ms a step, {1000 * found['pack']:.0f} of them packing; {info['rows']} rows, "
                f"fill {100 * info['fill']:.1f} %; {found['memory']:.0f} MiB over the base (XLA: "
                f"{found['temporaries']:.0f} of temporaries); {info['gflop']:.0f} GFLOP at "
                f"{info['gflop'] / found['ours']:.0f} GFLOP/s, products alone reach {peak['square']:.0f} (square), "
                f"{peak['model']:.0f} (192 x 768)",
                flush=True,
            )
            if peer:
                pair = found["pair"]
                print(
                    f"  {peer} L{length}: {IMAGES / pair.peer:.1f} images/s, {found['peer_memory']:.0f} MiB; ours is "
                    f"{pair.ratio:.2f}x as fast with {found['memory'] / found['peer_memory']:.2f} of its memory",
                    flush=True,
                )


if __name__ == "__main__":
    main()
