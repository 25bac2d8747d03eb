"""Draw the first training rows of a config: what the model will see, before a step is spent on it.

    python -m navit_jax show --config configs/navit_b16.py:photos --rows 2 --out rows.png

Each row shows its images on their own grids with the dropped patches dark, and below them the tokens as they lie in the
row, one square a patch. Dropped patches are no part of a row: their pixels come from building its images once more
without dropping, which is exact because every random choice depends on nothing but the image's place in the stream.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from input_pipeline import packing, stream
from input_pipeline.errors import UserError
from input_pipeline.packing import RowPlan
from input_pipeline.rows import RowBuilder
from navit_jax import like, row_picture
from navit_jax.row_picture import Picture, Shown

OUT = flags.DEFINE_string("out", "rows.png", "The picture: .png, .jpg, .webp, .svg or .pdf.")
ROWS = flags.DEFINE_integer("rows", 4, "How many rows to draw.", lower_bound=1)


def main(config: ConfigDict) -> None:
    """Draw `--rows` rows of the config's training data to `--out`."""
    out = Path(OUT.value)
    like.resolve(config)
    rows, slots = packed_rows(config, ROWS.value)
    title = f"{config.name} on {config.data.source}"
    figure = row_picture.draw(rows, slots, title)
    if out.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--out={out}: expected a picture's name, such as rows.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=100 * row_picture.SCALE)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}. Give another place with --out.") from None
    print(f"{out}: {row_picture.summary(rows, slots)}")


def packed_rows(config: ConfigDict, count: int) -> tuple[list[Shown], int]:
    """(the first `count` training rows to look at, K)."""
    images = stream.open_images(config, "train")
    train = stream.train_stream(config, images)
    planner, names = packing.Planner(train.sampler, **train.plan), images.source.class_names
    return [_shown(train, next(planner), names) for _ in range(count)], train.plan["slots"]


def _shown(train: stream.TrainStream, plan: RowPlan, names: tuple[str, ...]) -> Shown:
    builder, patch = train.builder, train.sampler.patch
    row = builder(plan)
    tokens = train.sampler(plan.positions).grid.prod(axis=1)
    undropped = RowBuilder(
        builder.source,
        builder.sampler,
        builder.config,
        length=int(tokens.sum()),
        slots=builder.slots,
        classes=builder.classes,
    )
    full = undropped(RowPlan(plan.positions, tokens)).images
    colour = _colour(full.values)
    whole, pictures = colour(full.values, patch), {}
    for slot in np.flatnonzero(row.index >= 0):
        grid = tuple(row.images.grids[slot, 1:])
        kept = np.zeros(grid, bool)
        kept[tuple(row.images.coords[row.images.segment_ids == slot + 1, 1:].T)] = True
        label = row.labels[slot]
        label = int(label) if label.ndim == 0 else int(label.argmax()) if label.any() else -1
        name = names[label] if label >= 0 else ""
        pictures[int(slot)] = Picture(whole[full.segment_ids == slot + 1].reshape(*grid, patch, patch, 3), kept, name)
    return Shown(colour(row.images.values, patch), row.images.segment_ids, pictures)


def _colour(values: np.ndarray) -> Callable[[np.ndarray, int], np.ndarray]:
    """A function (values [n, P], patch) -> [n, p, p, 3] uint8; 16-bit pixels are stretched to what `values` holds."""
    low, high = (0, 255) if values.dtype == np.uint8 else np.percentile(values, [0.5, 99.5])

    def to_rgb(values: np.ndarray, patch: int) -> np.ndarray:
        x = values.reshape(len(values), patch, patch, -1)
        x = np.pad(x, [(0, 0)] * 3 + [(0, 1)]) if x.shape[3] == 2 else x
        x = x[..., :3] if x.shape[3] > 1 else np.repeat(x, 3, axis=3)
        return np.rint(255 * ((x - low) / max(high - low, 1)).clip(0, 1)).astype(np.uint8)

    return to_rgb
