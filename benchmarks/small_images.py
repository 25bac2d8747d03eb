"""Many small images, where packed PyTorch versions are slower than padding: ours against padding and against them.

    python -m benchmarks.small_images [--peers ...] [--json FILE] [--quick]

128 images with sides of 32 to 160 pixels, 2 to 10 patches each way; otherwise as `benchmarks.train_step`. "padded,
ours" is our model with one image a row, padded to the longest. vit-pytorch and MONAI pack rows of 2048 unless told.
"""

import argparse

import numpy as np

from benchmarks import common, train_step

IMAGES, LENGTH = 128, 256
PADDED = "padded, ours"
PEERS = {  # side, tokens of the peer's rows
    PADDED: ("ours padded", LENGTH),
    "vit-pytorch L256": ("vit-pytorch", 256),
    "vit-pytorch L2048": ("vit-pytorch", 2048),
    "vit-pytorch nested": ("vit-pytorch nested", LENGTH),
    "monai L2048": ("monai", 2048),
    "timm": ("timm", LENGTH),
}


def draw(images: int) -> np.ndarray:
    """[images, 2] rows and columns of patches, each side uniform."""
    return np.random.default_rng(0).integers(2, 11, (images, 2))


def arguments() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of our rows")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    sizes, repeats, grids = train_step.SIZES, args.repeats, draw(IMAGES)
    if args.quick:
        sizes, repeats, grids = train_step.TINY, 1, draw(32)
    count = max(1, round(grids.prod(1).sum() / args.length / 4) * 4)  # rows, whole groups of 4
    ours = train_step.plan_step(grids, args.length, count).spec() | dict(side="ours", sizes=sizes, threads=args.threads)
    print(common.header("jax", "torch", "vit-pytorch", "monai", "timm", threads=args.threads))
    images, tokens = len(ours["grids"]), int(np.prod(ours["grids"], axis=1).sum())
    print(f"{images} images, {tokens} tokens, {count} rows of {args.length}\n")
    rows, cells = [], []
    for name in args.peers:
        side, length = PEERS[name]
        if not train_step.available([side]):
            continue
        peer = ours | dict(side=side, peer_length=length)
        found = train_step.Comparison(name, ours, peer, repeats)
        print(found.describe(), flush=True)
        cells.append(found.cells())
        rows += found.rows()
    print("\n" + common.markdown(train_step.HEADER, cells))
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
