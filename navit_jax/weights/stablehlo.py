"""A model as one StableHLO file (`jax.export`) for serving: its parameters inside, rows of a static shape in.

Who loads it needs jax and numpy, neither flax nor this project. Attention is the dense one, which every platform has;
a server packs images into rows itself, by the description in the JSON beside the file.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from navit_jax import contrastive, navit

PLATFORMS = ("cpu", "cuda", "tpu")
DTYPES = ("float32", "bfloat16")
LARGEST = 2**31 - 1  # bytes that the file's format (flatbuffers) can hold
MEANING = {
    "values": "a patch a token, its pixels 0..255 in (row, column, channel) order; padding may hold anything",
    "segment_ids": "1..slots: the image that a token belongs to, each image's tokens side by side, ids ascending along "
    "the row; 0: padding, last",
    "coords": "(0, row, column) of the patch in its own image, patches row by row",
    "grids": "(1, rows, columns) of patches of the image in each slot; (0, 0, 0): an empty slot",
    "logits": "of each slot's image over the classes",
    "pooled": "one vector a slot, before the head; 0 in an empty slot",
    "embedding": "one vector a slot of length 1 in the space that images and texts share; 0 in an empty slot",
}
CALL = (
    "from jax import export; "
    "model = export.deserialize(bytearray(open(FILE, 'rb').read())); "
    "outputs = model.call(values, segment_ids, coords, grids)"
)


def write(
    weights: Any,
    path: str | Path,
    *,
    rows: int = 1,
    length: int = 1024,
    slots: int = 64,
    platforms: Sequence[str] = PLATFORMS,
    dtype: str = "float32",
) -> Path:
    """Write `path` (.stablehlo is added where it lacks one) and a description beside it, .json; returns the path.

    weights: `navit_jax.weights.Weights`; of two towers the image tower is written. rows, length, slots: B, L and K of
    every call. platforms: that can run it. dtype: that it computes in; parameters are float32. The function in the file
    takes uint8 values [B, L, P] and int32 segment_ids [B, L], coords [B, L, 3], grids [B, K, 3] and returns float32
    {"logits" [B, K, C], "pooled" [B, K, D], "embedding" [B, K, E]}, those that the model has. Raises UserError.
    """
    _check(rows, length, slots, platforms, dtype)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights.params))
    if size > LARGEST - 2**24:
        raise UserError(f"the parameters take {size / 1e9:.1f} GB; one StableHLO file holds at most 2.1 GB")
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".stablehlo")
    call, image = _call(weights, dtype)
    inputs = [
        jax.ShapeDtypeStruct((rows, length, image.patch_size**2 * image.channels), jnp.uint8),
        *(jax.ShapeDtypeStruct((rows, *shape), jnp.int32) for shape in ((length,), (length, 3), (slots, 3))),
    ]
    exported = export.export(jax.jit(call), platforms=tuple(platforms))(*inputs)
    outputs = jax.eval_shape(call, *inputs)
    about = _describe(weights, image, dict(zip(Packed._fields, inputs, strict=False)), outputs)
    about |= dict(file=path.name, platforms=list(platforms), dtype=dtype, jax=jax.__version__)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(exported.serialize())
        path.with_suffix(".json").write_text(json.dumps(about, indent=1, ensure_ascii=False))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Name another place.") from None
    return path


def _check(rows: int, length: int, slots: int, platforms: Sequence[str], dtype: str) -> None:
    for name, value in dict(rows=rows, length=length, slots=slots).items():
        if value < 1:
            raise UserError(f"{name} is {value}; expected 1 or more")
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise UserError(f"platforms {', '.join(unknown) or 'are none'}; expected one or more of {', '.join(PLATFORMS)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")


def _call(weights: Any, dtype: str) -> tuple[Callable[..., dict], navit.NaViTConfig]:
    """(the function of four arrays to export, the image tower's config), deterministic, with dense attention."""
    serving, cfg, params = dict(dtype=dtype, attention="dense", remat="none"), weights.cfg, weights.params
    if isinstance(cfg, contrastive.TwoTowersConfig):
        image = replace(cfg.image, **serving)
        graph = contrastive.abstract(replace(cfg, image=image))[0]

        def call(*arrays: jax.Array) -> dict[str, jax.Array]:
            towers, images = navit.merge(graph, params), Packed(*arrays)
            return dict(pooled=towers.image(images)[1]["pooled"], embedding=towers.encode_images(images))

        return call, image
    image = replace(cfg, **serving)
    graph = navit.abstract(image)[0]

    def call(*arrays: jax.Array) -> dict[str, jax.Array]:
        logits_BKC, extra = navit.merge(graph, params)(Packed(*arrays))
        return dict(pooled=extra["pooled"]) | (dict(logits=logits_BKC) if image.num_classes else {})

    return call, image


def _describe(weights: Any, image: navit.NaViTConfig, inputs: dict, outputs: dict) -> dict:
    """What a server must know, as JSON."""

    def arrays(found: dict) -> dict:
        return {name: dict(shape=list(x.shape), dtype=str(x.dtype), meaning=MEANING[name]) for name, x in found.items()}

    patch = image.patch_size
    about = dict(
        what="a vision transformer that takes several images a row, each at its own aspect ratio",
        source=weights.source,
        patch_size=patch,
        channels=image.channels,
        resize=f"each image to (rows * {patch}, columns * {patch}) pixels, antialiased: the largest grid with "
        f"ceil(r * height / {patch}) * ceil(r * width / {patch}) tokens within your budget, at most {{length}}",
        pixels="uint8 RGB as decoded; the model subtracts the mean and divides by the deviation itself",
        inputs=arrays(inputs),
        outputs=arrays(outputs),
        classes=list(weights.classes),
        call=CALL,
    )
    about["resize"] = about["resize"].format(length=inputs["segment_ids"].shape[1])
    if image.grid_multiple > 1:
        about["sides"] = f"rows and columns of every grid are multiples of {image.grid_multiple}"
    if image.posemb == "learned" and image.posemb_coords == "absolute" and image.posemb_beyond == "error":
        about["largest_side"] = image.posemb_max
    return about
