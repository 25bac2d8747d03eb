"""Images a second and memory of one Adam step, ours against the packed and padded PyTorch models, at the same images.

    python -m benchmarks.train_step [--peers vit-pytorch monai ...] [--lengths 256 1024 2048] [--json FILE] [--quick]
    python -m benchmarks.train_step --lengths 1024 --ours-only

About 64 images of 6064 tokens, 16 to 256 each: what the run's planner puts into rows of 6144 tokens in all. Width 192,
depth 12, 3 heads, MLP 768, patch 16, 1000 classes, float32, two threads. A step starts from images in memory and ends
with new parameters. Memory is the most that steps take beside model and optimizer.
Peers without rows of their own are compared with ours at L=256, our default. The square ViT is our model, one image a
row, all squashed to 10 x 10 patches.
"""

import argparse
import statistics

import numpy as np

from benchmarks import common
from benchmarks.images import draw_grids, plan_step
from benchmarks.worker import Worker

IMAGES, TOKENS, SEED = 64, 6064, 94_202
ROW_TOKENS = 6144
SIZES = dict(width=192, depth=12, heads=3, mlp_dim=768)
TINY = dict(width=64, depth=1, heads=1, mlp_dim=64)
LENGTHS = (256, 1024, 2048)
PACKED = ("vit-pytorch", "monai")  # peers with rows of a given length
SQUARE = "square ViT, ours"
PEERS = (*PACKED, "vit-pytorch nested", "timm", SQUARE)
PACKAGES = {"vit-pytorch": "vit-pytorch", "vit-pytorch nested": "vit-pytorch", "monai": "monai", "timm": "timm"}


class Comparison:
    """Steps of ours and of a peer in turn; peer None: ours alone.

    Medians over `repeats` steps after two that compile and warm up. memory: MiB over the base, of ours and the peer.
    """

    def __init__(self, name: str, ours: dict, peer: dict | None, repeats: int):
        self.name, self.images = name, len(ours["grids"])
        with Worker(ours) as mine:
            if peer is None:
                self._measure([mine], repeats)
            else:
                with Worker(peer) as other:
                    self._measure([mine, other], repeats)
            self.info = mine.info | mine.ask("peak") | mine.ask("temporaries")

    def _measure(self, sides: list[Worker], repeats: int) -> None:
        for _ in range(2):
            for side in sides:
                side.step()
        for side in sides:
            side.memory()
        turns = [[side.step() for side in sides] for _ in range(repeats)]
        self.memory = [side.memory() for side in sides]
        self.ours = statistics.median(turn[0]["seconds"] for turn in turns)
        self.best = min(turn[0]["seconds"] for turn in turns)
        self.pack = [statistics.median(turn[i]["pack"] for turn in turns) for i in range(len(sides))]
        self.pair = common.pair_of([[x["seconds"] for x in turn] for turn in turns]) if len(sides) > 1 else None

    def cells(self) -> list[str]:
        """Of the table; see `HEADER`."""
        pair, (mine, theirs) = self.pair, self.memory
        speeds = f"{self.images / pair.ours:.1f}", f"{self.images / pair.peer:.1f}", f"**{pair.ratio:.2f}**"
        memory = f"{mine:.0f}", f"{theirs:.0f}", f"{mine / theirs:.2f}"
        return [self.name, *speeds, *memory, f"{100 * self.pack[1] / pair.peer:.1f} %"]

    def rows(self) -> list[dict]:
        """Of `--json`."""
        pair, (mine, theirs) = self.pair, self.memory
        speed = common.row(self.name, "images/s", self.images / pair.ours, self.images / pair.peer, pair.ratio)
        return [speed, common.row(f"{self.name} memory", "MiB", mine, theirs, theirs / max(mine, 1))]

    def describe(self) -> str:
        """What our step is made of."""
        info, needed = self.info, self.info["gflop"] / self.info["model"]
        return (
            f"{self.name}: ours {self.images / self.ours:.1f} images/s (best {self.images / self.best:.1f}), "
            f"{1e3 * self.ours:.0f} ms, {1e3 * self.pack[0]:.0f} of them packing; {info['rows']} rows, "
            f"{100 * info['fill']:.1f} % full; {self.memory[0]:.0f} MiB over the base, {info['temporaries']:.0f} of "
            f"XLA's temporaries; {info['gflop']:.0f} GFLOP of products at {info['gflop'] / self.ours:.0f} GFLOP/s, "
            f"{100 * needed / self.ours:.0f} % of the step at the {info['model']:.0f} that [6144, 192] x [192, 768] "
            f"alone reaches ({info['square']:.0f}: 2048 square)"
        )


HEADER = [
    "peer",
    "ours, images/s",
    "peer, images/s",
    "ratio",
    "ours, MiB",
    "peer, MiB",
    "ours / peer",
    "peer's packing",
]


def available(peers: list[str]) -> list[str]:
    """Those whose package is installed; says which are not."""
    missing = [name for name in peers if name in PACKAGES and not common.installed(PACKAGES[name])]
    if missing:
        print(f"not installed, so left out: {', '.join(missing)} (pip install -r requirements-parity.txt)")
    return [name for name in peers if name not in missing]


def cases(peers: list[str], lengths: list[int], grids: np.ndarray, shared: dict) -> list[tuple[str, dict, dict]]:
    """(name, our spec, the peer's spec)."""
    found = []
    for peer in peers:
        for length in lengths if peer in PACKED else lengths[:1]:
            step = plan_step(grids, length, max(1, ROW_TOKENS // length))
            ours = shared | step.spec() | dict(side="ours")
            other = ours | dict(side=peer)
            if peer == SQUARE:
                side = round(step.grids.prod(1).mean() ** 0.5)
                other = ours | dict(side="ours padded", grids=[[side, side]] * len(step.grids))
            found.append((f"{peer} L{length}" if peer in PACKED else peer, ours, other))
    return found


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens a row")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--attention", default="auto", help="our backend")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    grids, sizes, repeats = draw_grids(IMAGES, TOKENS, first=SEED), SIZES, args.repeats
    if args.quick:
        sizes, repeats = TINY, 1
    lengths = args.lengths[:1] if args.quick else args.lengths
    shared = dict(sizes=sizes, threads=args.threads, model=dict(attention=args.attention))
    if args.ours_only:
        for name, ours, _ in cases(["vit-pytorch"], lengths, grids, shared):
            print(Comparison(name.replace("vit-pytorch ", ""), ours, None, repeats).describe(), flush=True)
        return
    packages = ["jax", "torch", "vit-pytorch", "monai", "timm"]
    print(common.header(*packages, threads=args.threads))
    rows, cells = [], []
    for case in cases(available(args.peers), lengths, grids, shared):
        found = Comparison(*case, repeats)
        print(found.describe(), flush=True)
        cells.append(found.cells())
        rows += found.rows()
    print("\n" + common.markdown(HEADER, cells))
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
