"""CPU time an image of the whole input pipeline, against bare decode loops and timm's NaFlex loader; and its scaling.

    python -m benchmarks.input_pipeline [--json FILE] [--quick] [--sets 500x400 ...] [--lengths 256 1024] [--no-scaling]

Generated JPEGs; sides U(64, 256), patch 16, beta dropping with mean 0.36, steps of 2048 tokens. CPU time is user and
system time of the process and of its workers, whole epochs, in turn; other load hardly changes it. Peers:

- libraries: read, simplejpeg at the scale of 1/2^k that we use, OpenCV's area resize; no headers, rows or labels.
- functions: read, `decode.decode`, `patches.resize` at the same targets: what all else in the pipeline costs.
- timm: `create_naflex_loader` with two workers, no augmentation, as many images at each of eight sequence lengths
  (the middles of eighths of our sides, so the same token budgets before dropping), at most 2048 tokens a batch.

Scaling is images/s of two threads or processes against one of them: it needs quiet cores.
"""

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from ml_collections import ConfigDict

from benchmarks import common
from benchmarks.jpeg_folder import jpeg_folder
from configs import base
from input_pipeline import decode, stream
from input_pipeline.patches import resize

PATCH, TOKENS = 16, 2048
SETS = {"500x400": (256, 400, 500), "2000x1500": (64, 1500, 2000)}  # images, height, width
SEQUENCES = tuple(round((64 + 192 * (i + 0.5) / 8) ** 2 / PATCH**2) for i in range(8))


def make_config(folder: Path, length: int, threads: int = 1, workers: int = 0) -> ConfigDict:
    config = base.get_config()
    config.data.update(source=f"folder={folder}", eval_source=f"folder={folder}")
    config.data.update(num_threads=threads, num_workers=workers)
    config.model.update(variant="Ti/16", posemb_beyond="interpolate")
    config.drop.update(kind="beta", mean_rate=0.36)
    config.packing.update(row_length=length, rows_per_step=TOKENS // length)
    return config


def cpu_seconds() -> float:
    """User and system time of this process, of its living descendants and of those that have ended."""
    total, tick = sum(os.times()[:4]), os.sysconf("SC_CLK_TCK")
    todo = [os.getpid()]
    while todo:
        for children in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            for pid in children.read_text().split():
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                total += sum(map(int, fields[11:15])) / tick
                todo.append(int(pid))
    return total


class Cost:
    """`cost()`: CPU-milliseconds an image of a run that returns its number of images."""

    def __init__(self, run: Callable[[], int]):
        self.run = run

    def __call__(self) -> float:
        start = cpu_seconds()
        images = self.run()
        return 1e3 * (cpu_seconds() - start) / images


class Ours:
    """The loader of a config over about `images` images; `paths` and what to decode them to, for the bare loops."""

    def __init__(self, config: ConfigDict, images: int):
        self.images = stream.open_images(config, "train")
        self.stream = stream.train_stream(config, self.images)
        per_row = self.stream.report.images / self.stream.report.rows
        self.steps = max(2, round(images / per_row / self.stream.rows))

    def run(self) -> int:
        return sum(int((batch.index >= 0).sum()) for batch, _ in self.stream.loader(self.steps))

    def rate(self, skip: int = 2) -> float:
        """Images a second behind the first `skip` steps, in which threads and processes start."""
        batches = iter(self.stream.loader(self.steps + skip))
        for _ in range(skip):
            next(batches)
        start = time.perf_counter()
        images = sum(int((batch.index >= 0).sum()) for batch, _ in batches)
        return images / (time.perf_counter() - start)

    def targets(self) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
        """(path, stored sides, target sides in pixels) of the images of a run."""
        drawn = self.stream.sampler(np.arange(self.run()))
        names, sizes = map(self.images.source.describe, drawn.index.tolist()), self.images.sizes[drawn.index]
        sides = (map(tuple, pair.tolist()) for pair in (sizes, drawn.grid * PATCH))
        return list(zip(names, *sides, strict=True))


def libraries(path: str, size: tuple[int, int], target: tuple[int, int]) -> None:
    shrink = min(side // (2 * wanted) for side, wanted in zip(size, target, strict=True))
    scale = max(s for s in (1, 2, 4, 8) if s <= max(shrink, 1))
    with open(path, "rb") as file:
        data = file.read()
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=-(-size[0] // scale), min_width=-(-size[1] // scale))
    cv2.resize(pixels, target[::-1], interpolation=cv2.INTER_AREA)


def functions(path: str, size: tuple[int, int], target: tuple[int, int]) -> None:
    with open(path, "rb") as file:
        data = file.read()
    resize(decode.decode(data, at_least=target), *target)


def bare(each: Callable, targets: list) -> Callable[[], int]:
    def run() -> int:
        for target in targets:
            each(*target)
        return len(targets)

    return run


def timm_loaders(folder: Path, workers: int = 2) -> Iterator:
    """One loader for each sequence length, over an eighth of the images each."""
    import torch

    from benchmarks import torchvision_ops

    torchvision_ops.allow()
    from timm.data import ImageDataset
    from timm.data.naflex_loader import create_naflex_loader

    torch.set_num_threads(1)
    plain = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, color_jitter=0.0, interpolation="bilinear")
    options = dict(
        is_training=True, patch_size=PATCH, num_workers=workers, pin_memory=False, device=torch.device("cpu")
    )
    dataset = ImageDataset(str(folder))
    for i, tokens in enumerate(SEQUENCES):
        part = torch.utils.data.Subset(dataset, range(i, len(dataset), len(SEQUENCES)))
        batch = dict(train_seq_lens=(tokens,), max_seq_len=tokens, batch_size=TOKENS // tokens)
        yield create_naflex_loader(part, **batch, **options, **plain)


def timm(folder: Path, epochs: int) -> Callable[[], int]:
    loaders = list(timm_loaders(folder))

    def run() -> int:
        return sum(len(target) for loader in loaders * epochs for _, target in loader)

    run()  # its workers are forked now, before other threads exist
    return run


def compare(name: str, folder: Path, length: int, images: int, repeats: int, peer: Callable | None) -> list[dict]:
    """Rows of `--json`, each after a run that does not count; peer: timm's run, if it is there."""
    ours = Ours(make_config(folder, length), images)
    targets = ours.targets()
    peers = {each.__name__: Cost(bare(each, targets)) for each in (libraries, functions)}
    peers |= {"timm": Cost(peer)} if peer else {}
    costs = {peer: [] for peer in peers}
    for repeat in range(repeats + 1):
        for peer, cost in peers.items():
            turn = Cost(ours.run)(), cost()
            if repeat:
                costs[peer].append(turn)
    found = {peer: common.pair_of(turns) for peer, turns in costs.items()}
    return [common.row(f"{peer} {name} L{length}", "cpu-ms/image", *pair) for peer, pair in found.items()]


def scaling(name: str, folder: Path, images: int, repeats: int) -> list[dict]:
    """Two against one, in turn. ours: images/s of two; peer: of one."""
    rows = []
    for kind, field in (("threads", "threads"), ("processes", "workers")):
        one, two = (Ours(make_config(folder, 256, **{field: n}), images) for n in (1, 2))
        turns = [(1 / two.rate(), 1 / one.rate()) for _ in range(repeats)]
        pair = common.pair_of(turns)
        rows.append(common.row(f"two {kind} to one {name}", "images/s", 1 / pair.ours, 1 / pair.peer, pair.ratio))
    return rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--lengths", type=int, nargs="+", default=(256, 1024), help="tokens a row")
    parser.add_argument("--no-scaling", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=256, help="in a turn")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.disable(logging.WARNING)  # grain names its source at each start
    warnings.filterwarnings("ignore")
    sets = {name: (16 if args.quick else SETS[name][0], *SETS[name][1:]) for name in args.sets}
    folders = {name: jpeg_folder(*numbers) for name, numbers in sets.items()}
    images, repeats, rows, peers = 32 if args.quick else args.images, 1 if args.quick else args.repeats, [], {}
    if common.installed("timm"):
        peers = {name: timm(folder, max(1, images // sets[name][0])) for name, folder in folders.items()}
    for name, folder in folders.items():
        for length in args.lengths:
            rows += compare(name, folder, length, images, repeats, peers.get(name))
        if not args.no_scaling:
            rows += scaling(name, folder, 3 * images, max(1, repeats // 2))
    lines = [[row["name"], row["unit"], *(f"{row[k]:.2f}" for k in ("ours", "peer", "ratio"))] for row in rows]
    # Last, as it starts jax, and timm forks its workers.
    print(common.header("grain", "simplejpeg", "opencv-python-headless", "numpy", "pillow", "timm", "torch"))
    print(common.markdown(["peer", "unit", "ours", "peer", "ratio"], lines))
    common.write_rows(args.json, rows)


if __name__ == "__main__":
    main()
