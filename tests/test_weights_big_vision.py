"""big_vision's .npz against models of flax.linen, an image at a time there, five sizes in a row here."""

import json

import ml_dtypes
import numpy as np
import parity
import pytest
import siglip_models
from big_vision_models import (
    DEPTH,
    EMBED,
    HEADS,
    MLP,
    PATCH,
    SIDE,
    TEXT,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Text,
    TwoTowers,
    Vit,
    alone,
    names_of,
    pixels,
    saved,
)
from helpers import fast_jit

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from navit_jax import contrastive, navit, weights
from navit_jax.weights import siglip


def five():
    images = parity.five_images(np.random.default_rng(0), PATCH)
    return images, parity.packed(images, PATCH)


FIRST = np.zeros((1, SIDE * PATCH, SIDE * PATCH, 3))
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


@pytest.mark.slow
def test_two_towers_leave_for_transformers_as_the_same_model(tmp_path):
    """The one other implementation of these towers, reached by way of both formats' names."""
    torch = parity.library("torch")
    images, ids = parity.five_images(np.random.default_rng(0), PATCH), np.arange(TOKENS, dtype=np.int32)[None]
    model = TwoTowers(Vit(), Text())
    params = saved(model, tmp_path / "towers.npz", FIRST, ids)
    siglip.write(weights.read(tmp_path / "towers.npz"), tmp_path / "theirs")
    theirs = siglip_models.load(tmp_path / "theirs", "Siglip2Model")
    out = siglip_models.run(theirs, images, input_ids=torch.from_numpy(ids).long())
    vectors = [unit(z) for _, _, z in alone(model.image, params["img"], map(pixels, images))]
    np.testing.assert_allclose([x.image_embeds[0] for x in out], vectors, atol=1e-4)
    np.testing.assert_allclose(out[0].text_embeds[0], unit(alone(model.text, params["txt"], [ids])[0][0]), atol=1e-4)
    logits = np.exp(params["t"]) * np.asarray(out[0].text_embeds @ out[0].image_embeds.T) + params["b"]
    np.testing.assert_allclose(out[0].logits_per_text, logits, rtol=1e-4)


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
    arrays = names_of(TwoTowers(Vit(), Text()), FIRST, np.zeros((1, TOKENS), int))
    np.savez(tmp_path / "towers.npz", **arrays)
    assert weights.config_of(tmp_path / "towers.npz").text.pad == 1
    arrays["txt/Embed_0/embedding"] = np.zeros((256_000, TEXT["width"]), bool)  # 12 MB
    np.savez(tmp_path / "towers.npz", **arrays)
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
        (lambda a: a.update({"img/head/bias": np.zeros(3)}), "holds img/ alone"),
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
