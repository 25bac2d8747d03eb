"""A model of ours as Hugging Face's SigLIP 2: transformers computes the same, or what forbids it is named."""

import json
import logging

import parity
import pytest
from helpers import random_params
from siglip_models import PATCH, check_tower, load, run, some_images

from input_pipeline.errors import UserError
from navit_jax import navit, weights
from navit_jax.weights import siglip

pytestmark = pytest.mark.slow

OURS = dict(width=64, depth=2, heads=4, mlp_dim=96, qk_norm=False)
TABLE = dict(posemb="table", posemb_grid=(6, 6), patch_size=PATCH)


def own(cfg, seed=3):
    return weights.Weights(cfg, random_params(navit.abstract(cfg)[1], seed))


@pytest.mark.parametrize("pool, classes", [("map", 0), ("mean", 0), ("map", 10), ("mean", 10)])
def test_a_model_of_ours_without_biases(pool, classes, tmp_path, caplog):
    """Also one of classes: those on a mean have a place there, of those behind attention pooling only the tower has."""
    ours = own(navit.NaViTConfig(**OURS, **TABLE, pool=pool, num_classes=classes))
    with caplog.at_level(logging.WARNING):
        siglip.write(ours, tmp_path)
    assert ("left out" in caplog.text) == (pool == "map" and classes > 0)
    images = some_images()
    found = parity.outputs(ours, parity.packed(images, PATCH))
    if pool == "mean" and classes:
        model = load(tmp_path, "Siglip2ForImageClassification")
        parity.assert_close(found.logits, [x.logits[0] for x in run(model, images)])
    else:
        check_tower(found, load(tmp_path, "Siglip2VisionModel"), images)
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5] * 3 and processor["patch_size"] == PATCH


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(qk_norm=True), ["model.qk_norm is True"]),
        (
            dict(posemb="learned", registers=2),
            ["model.posemb is 'learned', there it is 'table'", "model.registers is 2"],
        ),
        (dict(posemb_grid=(4, 9)), ["model.posemb_grid is .4, 9."]),
        (dict(posemb_grid=(4, 8)), ["model.posemb_grid is .4, 8."]),
        (dict(posemb_resize="bicubic_antialias"), ["model.posemb_resize is 'bicubic_antialias'"]),
        (dict(mlp="swiglu", norm="rms"), ["model.mlp is 'swiglu'", "model.norm is 'rms'"]),
        (dict(layer_scale=0.1), ["model.layer_scale is 0.1"]),
        (dict(stored_patch_size=16), ["model.stored_patch_size is 16"]),
        (dict(head_size=32), ["model.head_size is 32"]),
        (dict(pool="first", registers=1), ["model.pool is 'first'"]),
        (dict(embed_norm="after"), ["model.embed_norm is 'after'"]),
    ],
)
def test_a_model_without_a_counterpart_is_refused_by_its_fields(fields, words, tmp_path):
    with pytest.raises(UserError) as caught:
        siglip.write(own(navit.NaViTConfig(**OURS | TABLE | fields)), tmp_path)
    for line in words:
        assert caught.match(line)
    assert not list(tmp_path.iterdir())
