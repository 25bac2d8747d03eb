"""Does native resolution pay? The same small model at the same compute, and images for the same compute.

    python -m benchmarks.native_vs_square [--seconds 120] [--json FILE] [--out docs/native_vs_square]

First, three models train on `shapes`, whose class is an aspect that a square resize removes: NaViT on native and on
squashed images, and the fixed-square ViT, which is the same code with one image a row. Native NaViT trains for
`--seconds`, the others for the same useful training FLOPs, so their seconds may differ. Each has the learning rate that
suits it best; `--lr` tries another on all. Second, without training, how many images a B/16 sees for the same compute.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import common, images_for_compute, native_figure
from benchmarks.equal_compute import LEARNING_RATES, NATIVE, SQUASHED, SUBSET, TOKENS, Result, ceiling, compare, recipe
from input_pipeline import stream
from input_pipeline.errors import UserError


def table(results: Sequence[Result]) -> str:
    """The three models in markdown."""
    header = ["on `shapes`", "top-1", "images seen", "tokens an image", "training TFLOP", "seconds", "steps", "lr"]
    rows = [
        [
            *(f"**{r.name}**" if r.name == NATIVE else r.name, f"{100 * r.top1:.1f} %", f"{r.images:,}"),
            *(f"{r.tokens / r.images:.1f}", f"{r.flops / 1e12:.2f}", f"{r.seconds:.0f}", r.steps, f"{r.lr:g}"),
        ]
        for r in results
    ]
    return common.markdown(header, rows)


def report(results: Sequence[Result], costs: Sequence[images_for_compute.Cost], command: str, picture: str) -> str:
    """The page: both tables, what they mean, and how to make them again."""
    where = f"{common.machine()}; {common.versions('jax', 'flax')}"
    return f"""# Does native resolution pay?

Made by `{command}` on {where}.

## The same model at the same compute

{table(results)}

![Native and squashed images, and accuracy over training compute]({picture})

Six classes: ellipse or rectangle, round, wide or tall, on images of any aspect from 0.45 to 2.2. Squashed to a square,
no model can be right more often than {100 * ceiling():.1f} % of the time: the image's own aspect is gone.

All three are a ViT of width 128 and depth 4 at patch 16, trained with AdamW at a constant rate with a warm-up and a
cool-down, about 512 tokens a step: NaViT on 9 to 25 tokens an image in rows of 64, the fixed square on one image of
{TOKENS} tokens a row. Equal compute is equal useful training FLOPs, fixed before training; seconds are of training
alone. Top-1 is on all 2000 held-out images at no more than {TOKENS} tokens each. The curve is on {SUBSET} of them and
jumps where the cool-down begins. One seed.

Learning rates were chosen at a quarter of the compute on half of these held-out images, so the accuracies are a little
optimistic; there is no third set. Native was tuned further: learning rate, cool-down and b2 at about full compute, four
runs of 95.7 to 96.4 %; weight decay, positions and loss at a quarter. The two squares had their learning rate tuned
alone. Both end within 2 points of their ceiling, so more tuning of them could not close the gap.

## Images for the same compute

B/16, sides U(64, 256), rows of 256 tokens, planned on the 100,000 sizes of `tests/data/sizes_100k.npz`; dropped tokens
are restored where a row has room.

{common.markdown(*images_for_compute.table(costs))}

FLOPs are of training, three forward passes, useful ones only: real tokens, attention within each image. The last two
columns add what dense attention over whole rows and padding cost.

{images_for_compute.conclusion(costs)}
"""


def json_rows(results: Sequence[Result], costs: Sequence[images_for_compute.Cost]) -> list[dict]:
    """Ours against each peer, with everything measured beside it."""
    ours, *peers = results
    where = dict(machine=common.machine(), versions=common.versions("jax", "flax"))
    rows = [
        dict(name=f"top-1 on shapes at equal compute against {peer.name}", unit="%", ours=100 * ours.top1)
        | dict(peer=100 * peer.top1, ratio=ours.top1 / peer.top1, details=[ours._asdict(), peer._asdict()])
        for peer in peers
    ]
    return [where | row for row in rows + images_for_compute.json_rows(costs)]


def pictures() -> list[tuple[str, list[np.ndarray]]]:
    """The same six images as native NaViT and as the others see them."""
    lines = []
    for caption, name in (("native", NATIVE), ("squashed", SQUASHED)):
        config = recipe(name)
        images = stream.open_images(config, "eval")
        lines.append((caption, native_figure.shown(config, images, native_figure.alike(images), TOKENS)))
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rates = ", ".join(f"{name}: {lr:g}" for name, lr in LEARNING_RATES.items())
    parser.add_argument("--seconds", type=float, default=120.0, help="of training native NaViT; this sets the compute")
    parser.add_argument("--steps", type=int, default=0, help="of native NaViT, instead of seconds: repeats a run")
    parser.add_argument("--lr", type=float, default=0.0, help=f"one learning rate for all three, instead of {rates}")
    parser.add_argument("--json", type=Path, help="where to write the rows as JSON")
    parser.add_argument("--out", type=Path, default=Path("docs/native_vs_square"), help="of the .md and .webp")
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    page, image = (args.out.with_name(args.out.name + suffix) for suffix in (".md", ".webp"))
    page.parent.mkdir(parents=True, exist_ok=True)
    try:
        results = compare(args.seconds, args.steps, args.lr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    costs = images_for_compute.costs()
    text = report(results, costs, " ".join(["python -m benchmarks.native_vs_square", *given]), image.name)
    page.write_text(text)
    native_figure.draw(results, pictures(), stream.patch_size(recipe(NATIVE)), ceiling(), image)
    if args.json:
        args.json.write_text(json.dumps(json_rows(results, costs), indent=1))
    print(text)


if __name__ == "__main__":
    main()
