"""Images a second of inference over mixed sizes, ours packed against the original libraries' own padded batches.

    python -m benchmarks.packed_inference [--peers siglip2 timm] [--images 32] [--variant S] [--json FILE] [--quick]

Images of 64 to 1024 tokens (sides U(8, 32) patches of 16 pixels, aspects up to 1.5), the same ones and the same random
weights on both sides: the peer saves its model, `navit_jax.load` reads the file, and the vectors are compared. Width
384, depth 12, 6 heads, MLP 1536, float32, two threads each. From images in memory to one vector each. A peer's batches
of 8 come in the images' order, padded to 1024 tokens or to the longest of the batch, or sorted by size first, which
needs all images at hand.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import common
from benchmarks.images import draw_grids
from benchmarks.worker import Worker

SIZES = {
    "Ti": dict(width=192, depth=12, heads=3, mlp_dim=768),
    "S": dict(width=384, depth=12, heads=6, mlp_dim=1536),
    "B": dict(width=768, depth=12, heads=12, mlp_dim=3072),
}
TINY = dict(width=64, depth=2, heads=2, mlp_dim=64)
MOST, MEAN, BATCH, SEED = 1024, 441, 8, 0
PEERS = {"siglip2": "transformers", "timm": "timm"}  # and the package of each
NAMES = {"siglip2": "transformers Siglip2VisionModel", "timm": "timm NaFlexVit"}
PADDINGS = {  # how batches are padded, and which peers do so
    "to 1024": (dict(pad=MOST, sorted=False), ("siglip2",)),
    "to the longest": (dict(pad=0, sorted=False), ("siglip2", "timm")),
    "sorted, to the longest": (dict(pad=0, sorted=True), ("siglip2", "timm")),
}
HEADER = ["peer", "its batches", "padding", "ours, images/s", "peer, images/s", "ratio", "ours, MiB", "peer, MiB"]


def measure(ours: dict, peer: dict, repeats: int) -> dict:
    """pair: seconds of both; memory: MiB over the base of both; apart: the vectors' largest difference."""
    with Worker(peer) as other, Worker(ours) as mine:  # the peer first: it writes the weights
        sides = (mine, other)
        a, b = (side.ask("vectors") for side in sides)  # compiles, too
        apart = np.abs(np.array(a["vectors"]) - np.array(b["vectors"])).max() / np.std(b["vectors"])
        if apart > 1e-3:
            raise RuntimeError(f"the vectors of both sides differ by {apart:.1e} of their spread: no comparison")
        for side in sides:
            side.memory()
        turns = [[side.seconds() for side in sides] for _ in range(repeats)]
        memory = [side.memory() for side in sides]
        padding = 1 - mine.info["tokens"] / other.info["padded"]
        return dict(pair=common.pair_of(turns), memory=memory, apart=apart, padding=padding, programs=a["programs"])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--paddings", nargs="+", default=list(PADDINGS), choices=list(PADDINGS))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--variant", default="S", choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    count, sizes, repeats = args.images, SIZES[args.variant], args.repeats
    if args.quick:
        count, sizes, repeats = 6, TINY, 1
    missing = [peer for peer in args.peers if not common.installed(PEERS[peer])]
    if missing:
        print(f"not installed, so left out: {', '.join(missing)} (pip install -r requirements-parity.txt)")
    print(common.header("jax", "torch", "transformers", "timm", threads=args.threads))
    grids = draw_grids(count, count * MEAN, sides=(8, 32), first=SEED)
    tokens = grids.prod(1)
    print(f"{count} images of {tokens.min()} to {tokens.max()} tokens, {tokens.mean():.0f} on average; {sizes}\n")
    rows, cells = [], []
    with tempfile.TemporaryDirectory() as folder:
        for peer in args.peers:
            shared = dict(grids=grids.tolist(), threads=args.threads, weights=str(Path(folder) / peer), most=MOST)
            for name in args.paddings:
                padding, peers = PADDINGS[name]
                if peer in missing or peer not in peers:
                    continue
                other = shared | padding | dict(side=f"inference {peer}", sizes=sizes, batch=BATCH)
                found = measure(shared | dict(side="ours inference"), other, repeats)
                pair, (mine, theirs) = found["pair"], found["memory"]
                speeds = f"{count / pair.ours:.2f}", f"{count / pair.peer:.2f}", f"**{pair.ratio:.2f}**"
                share = f"{100 * found['padding']:.0f} %"
                cells.append([NAMES[peer], name, share, *speeds, f"{mine:.0f}", f"{theirs:.0f}"])
                label = f"{peer} {name}"
                rows.append(common.row(label, "images/s", count / pair.ours, count / pair.peer, pair.ratio))
                rows.append(common.row(f"{label} memory", "MiB", mine, theirs, theirs / max(mine, 1)))
                print(
                    f"{label}: ratio {pair.ratio:.2f}; vectors apart by {found['apart']:.1e} of their spread at most; "
                    f"{found['programs']} programs of ours",
                    flush=True,
                )
    print("\n" + common.markdown(HEADER, cells))
    print(f"\nMedian ratio {statistics.median(row['ratio'] for row in rows[::2]):.2f}.")
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
