"""big_vision's .npz against models of flax.linen, whose own modules give the arrays their names: an image at a time.

big_vision itself is on no package index. The oracles here are written from its published architecture, with linen's
attention, Dense, LayerNorm and Embed, and a table of positions resized by `jax.image.resize`; an image is encoded by
itself, without a mask, where ours has five of different sizes in a row.
"""

import json
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import parity
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import fast_jit

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from navit_jax import contrastive, navit, weights

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


def five():
    images = parity.five_images(np.random.default_rng(0), PATCH)
    return images, parity.packed(images, PATCH)


FIRST = jnp.zeros((1, SIDE * PATCH, SIDE * PATCH, 3))
VITS = {
    "naflex, stacked, gap": (
        Vit(scan=True, patch_norms=("pre", "post"), pool="gap", classes=5),
        dict(prefix="params/", dtype=ml_dtypes.bfloat16),
    ),
    "plain, map": (Vit("plain", pre_logits=24, classes=5), dict(prefix="params/")),
    "plain, tok": (Vit("plain", "tok", scan=True), {}),
    "first paper": (Vit("first_paper", "tok", pre_logits=WIDTH, classes=5), {}),
    "sincos, gap": (Vit("sincos", "gap", scan=True, classes=5), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", VITS)
def test_an_image_tower_gives_the_tokens_vectors_and_logits_of_each_image_alone(case, tmp_path):
    model, how = VITS[case]
    params = saved(model, tmp_path / "vit.npz", FIRST, **how)
    images, row = five()
    found = weights.read(tmp_path / "vit.npz")
    theirs = zip(*alone(model, params, map(pixels, images)))
    for mine, other in zip(parity.outputs(found, row), theirs, strict=True):
        parity.assert_close(mine, other)
    assert weights.config_of(tmp_path / "vit.npz") == found.cfg
    assert "big_vision" in found.source


TOWERS = {
    "a file a layer": (TwoTowers(Vit(patch_norms=("post",)), Text()), {}),
    "stacked": (
        TwoTowers(Vit(scan=True, classes=EMBED), Text(True, "map")),
        dict(prefix="params/", dtype=ml_dtypes.bfloat16),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TOWERS)
def test_two_towers_give_the_vectors_of_images_and_texts_and_their_scale(case, tmp_path):
    model, how = TOWERS[case]
    images, row = five()
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (3, 1, TOKENS)).astype(np.int32)
    params = saved(model, tmp_path / "towers.npz", FIRST, ids[0], **how)
    (tmp_path / "config.json").write_text(json.dumps({"tokenizer": "bytes", "pad": 3}))
    found = weights.read(tmp_path / "towers.npz")
    assert (found.tokenizer, found.cfg.text.pad, found.cfg.project_image) == ("bytes", 3, model.image.classes > 0)
    tokens, pooled, vectors = zip(*alone(model.image, params["img"], map(pixels, images)))
    graph = contrastive.abstract(found.cfg)[0]
    texts = texts_in_a_row(ids)

    @fast_jit
    def both(params):
        towers = navit.merge(graph, params)
        encoded = towers.encode_images(row), towers.encode_texts(texts), towers.scale(), towers.bias()
        return towers.image.tokens(row), towers.image(row)[1]["pooled"][0], *encoded

    tokens_BLD, pooled_KD, images_BKE, texts_BME, scale, bias = map(np.asarray, both(found.params))
    parity.assert_close(parity.tokens_of(tokens_BLD, row), tokens)
    parity.assert_close(pooled_KD[: len(images)], pooled)
    np.testing.assert_allclose(images_BKE[0, : len(images)], [unit(z) for z in vectors], atol=1e-4)
    theirs = [unit(z[0]) for z in alone(model.text, params["txt"], ids)]
    np.testing.assert_allclose(texts_BME[0], theirs, atol=1e-4)
    np.testing.assert_allclose((scale, bias), (np.exp(params["t"][0]), params["b"][0]), rtol=1e-6)


def unit(z):
    return np.asarray(z) / np.linalg.norm(z)


def texts_in_a_row(ids):
    """One row with each of the texts [n, 1, TOKENS]."""
    n = len(ids)
    place = np.tile(np.arange(TOKENS, dtype=np.int32), n)
    coords, numbers = np.stack([0 * place, 0 * place, place], axis=1), np.repeat(np.arange(1, n + 1), TOKENS)
    grids = np.full((1, n, 3), (1, 1, TOKENS), np.int32)
    return Packed(ids.reshape(1, -1), numbers[None].astype(np.int32), coords[None], grids)


def test_heads_patches_grid_and_pooling_are_seen_from_the_shapes(tmp_path):
    np.savez(tmp_path / "vit.npz", **names_of(Vit("plain", "tok", scan=True, pre_logits=24, classes=5), FIRST))
    expected = navit.NaViTConfig(
        width=WIDTH, depth=DEPTH, heads=HEADS, mlp_dim=MLP, patch_size=PATCH, num_classes=5, qk_norm=False, bias=True,
        pool="first", registers=1, pre_logits=24, posemb="table", posemb_grid=(SIDE, SIDE),
    )  # fmt: skip
    assert weights.config_of(tmp_path / "vit.npz") == expected


def test_texts_are_filled_up_as_the_vocabulary_says(tmp_path):
    arrays = names_of(TwoTowers(Vit(), Text()), FIRST, jnp.zeros((1, TOKENS), int))
    np.savez(tmp_path / "towers.npz", **arrays)
    assert weights.config_of(tmp_path / "towers.npz").text.pad == 1
    arrays["txt/Embed_0/embedding"] = np.broadcast_to(np.float32(0), (256_000, TEXT["width"]))
    np.savez_compressed(tmp_path / "towers.npz", **arrays)
    assert weights.config_of(tmp_path / "towers.npz").text.pad == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda a: a.pop("Transformer/encoderblock_1/MlpBlock_0/Dense_1/bias"),
            "lacks the tensor Transformer/encoderb",
        ),
        (lambda a: a.update({"opt/mu": np.zeros(3)}), "opt/mu [3]"),
        (
            lambda a: a.update(pos_embedding=np.zeros((1, 35, WIDTH))),
            "pos_embedding is [1, 35, 64]; expected [1, n, D]",
        ),
        (lambda a: a.update(head=np.zeros(3)), "head [3]"),
        (lambda a: a.update({"embedding/bias": np.zeros(3)}), "embedding/bias is [3]; expected [64]"),
        (lambda a: a.update({"patchln_pre/scale": np.zeros(192)}), "patchln_pre without patchln_post"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, said, tmp_path):
    arrays = names_of(Vit("plain"), FIRST)
    change(arrays)
    np.savez(tmp_path / "vit.npz", **arrays)
    with pytest.raises(UserError) as error:
        weights.read(tmp_path / "vit.npz")
    assert said in str(error.value)
