"""big_vision's models, written with flax.linen from its published architecture, whose own modules give the same names.

big_vision itself is on no package index. Attention, Dense, LayerNorm and Embed are linen's, a table of positions is
resized by `jax.image.resize`, and there is no mask: an image is encoded by itself.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import fast_jit

WIDTH, DEPTH, HEADS, MLP, PATCH, SIDE = 64, 2, 4, 160, 8, 6
TEXT = dict(width=48, depth=2, heads=3, mlp=96)
VOCABULARY, TOKENS, EMBED = 90, 12, 64


class MlpBlock(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.hidden)(x))
        return nn.Dense(x.shape[-1])(y)


class Block(nn.Module):
    heads: int
    mlp: int
    first_paper: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        names = ("MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3") if self.first_paper else (None,) * 3
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name=names[0])(y, y)
        return x + MlpBlock(self.mlp, name=names[2])(nn.LayerNorm(name=names[1])(x)), None


class Encoder(nn.Module):
    depth: int
    heads: int
    mlp: int
    scan: bool = False
    first_paper: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scan:
            scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
            x, _ = scanned(self.heads, self.mlp, name="encoderblock")(x, None)
        for i in range(0 if self.scan else self.depth):
            x, _ = Block(self.heads, self.mlp, self.first_paper, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class MAPHead(nn.Module):
    heads: int
    mlp: int

    @nn.compact
    def __call__(self, x):
        probe = self.param("probe", nn.initializers.normal(1.0), (1, 1, x.shape[-1]))
        x = nn.MultiHeadDotProductAttention(self.heads)(jnp.tile(probe, [len(x), 1, 1]), x)
        y = nn.LayerNorm()(x)
        return (x + MlpBlock(self.mlp)(y))[:, 0]


class Vit(nn.Module):
    """kind: naflex (patches, a table [n, n, D]), plain (pixels, [1, n * n, D]), sincos, or first_paper (a class token
    that has a row of the table)."""

    kind: str = "naflex"
    pool: str = "map"
    scan: bool = False
    patch_norms: tuple = ()
    pre_logits: int = 0
    classes: int = 0

    @nn.compact
    def __call__(self, image):
        h, w = image.shape[1] // PATCH, image.shape[2] // PATCH
        if self.kind == "naflex":
            x = image.reshape(1, h, PATCH, w, PATCH, 3).swapaxes(2, 3).reshape(1, h * w, -1)
            x = nn.LayerNorm(name="patchln_pre")(x) if "pre" in self.patch_norms else x
            x = nn.Dense(WIDTH, name="embedding")(x)
            x = nn.LayerNorm(name="patchln_post")(x) if "post" in self.patch_norms else x
        else:
            x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", name="embedding")(image)
            x = x.reshape(1, h * w, WIDTH)
        cls = self.param("cls", nn.initializers.normal(1.0), (1, 1, WIDTH)) if self.pool == "tok" else None
        x, cls = self.positions(x, h, w, cls)
        x = x if cls is None else jnp.concatenate([cls, x], axis=1)
        first = self.kind == "first_paper"
        x = Encoder(DEPTH, HEADS, MLP, self.scan, first, name="Transformer")(x)
        tokens = x if cls is None else x[:, 1:]
        pooled = x[:, 0] if self.pool == "tok" else x.mean(1) if self.pool == "gap" else MAPHead(HEADS, MLP)(x)
        y = nn.tanh(nn.Dense(self.pre_logits, name="pre_logits")(pooled)) if self.pre_logits else pooled
        y = nn.Dense(self.classes, name="head")(y) if self.classes else y
        return tokens[0].reshape(h, w, WIDTH), pooled[0], y[0]

    def positions(self, x, h, w, cls):
        if self.kind == "sincos":
            y, x_ = (a.reshape(-1, 1) for a in jnp.mgrid[:h, :w])
            omega = 10_000.0 ** -jnp.linspace(0, 1, WIDTH // 4)
            parts = [jnp.sin(x_ * omega), jnp.cos(x_ * omega), jnp.sin(y * omega), jnp.cos(y * omega)]
            return x + jnp.concatenate(parts, axis=1), cls
        own = int(self.kind == "first_paper")
        shape = (SIDE, SIDE, WIDTH) if self.kind == "naflex" else (1, SIDE * SIDE + own, WIDTH)
        table = self.param("pos_embedding", nn.initializers.normal(0.5), shape).reshape(-1, WIDTH)
        grid = jax.image.resize(table[own:].reshape(SIDE, SIDE, WIDTH), (h, w, WIDTH), "bilinear", antialias=True)
        return x + grid.reshape(1, h * w, WIDTH), cls + table[0] if own else cls


class Text(nn.Module):
    scan: bool = False
    pool: str = "last"

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, TEXT["width"], embedding_init=nn.initializers.normal(1.0))(ids)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.5), (1, TOKENS, TEXT["width"]))
        x = Encoder(TEXT["depth"], TEXT["heads"], TEXT["mlp"], self.scan)(x)
        x = MAPHead(TEXT["heads"], TEXT["mlp"])(x) if self.pool == "map" else x[:, -1]
        return nn.Dense(EMBED, name="head")(x)


class TwoTowers(NamedTuple):
    """Two models under img and txt, beside a scale and a bias."""

    image: Vit
    text: Text


def saved(model, path, *inputs, prefix="", dtype=np.float32):
    """Random parameters for the model, which are saved flat, too; no bias is 0 and no scale is 1."""
    rng, flat = np.random.default_rng(3), names_of(model, *inputs)
    spread = {"kernel": 0.15, "bias": 0.2, "scale": 0.2, "pos_embedding": 0.5}
    for name, x in flat.items():
        draw = rng.normal(0, spread.get(name.split("/")[-1], 1.0), x.shape) + name.endswith("scale")
        flat[name] = draw.astype(np.float32).astype(dtype)
    np.savez(path, **{prefix + name: x for name, x in flat.items()})
    return unflatten_dict({name: jnp.asarray(x, jnp.float32) for name, x in flat.items()}, sep="/")


def names_of(model, *inputs):
    """The arrays of a model, zeros all."""
    if isinstance(model, TwoTowers):
        towers = {
            f"{name}/{n}": x for name, m, i in zip(("img", "txt"), model, inputs) for n, x in names_of(m, i).items()
        }
        return towers | {name: np.zeros(1, np.float32) for name in "tb"}
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return {name: np.zeros(x.shape, np.float32) for name, x in flatten_dict(shapes, sep="/").items()}


def alone(model, params, inputs):
    """What the model makes of each input by itself."""
    run = fast_jit(lambda x: model.apply({"params": params}, x))
    return [run(x) for x in inputs]


def pixels(image):
    return jnp.asarray(image, jnp.float32)[None] / 127.5 - 1
