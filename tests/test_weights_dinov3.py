"""DINOv3: our numbers against transformers', with and without gate, biases and registers."""

import json

import numpy as np
import parity
import pytest
from safetensors.numpy import load_file, save_file

from navit_jax import weights
from navit_jax.weights import dinov3

pytestmark = pytest.mark.slow

PATCH = 8
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, patch_size=PATCH)
KINDS = {
    "small": dict(num_register_tokens=4),
    "gated, no biases": dict(
        use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False, proj_bias=False, mlp_bias=False
    ),
    "other options": dict(
        num_register_tokens=1, key_bias=True, layer_norm_eps=1e-3, rope_theta=30.0, hidden_act="gelu_pytorch_tanh"
    ),
}


def build(**options):
    transformers = parity.library("transformers")
    return parity.randomise(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES | options)))


def theirs(model, images, mean=dinov3.MEAN, std=dinov3.STD):
    """(tokens [rows, columns, D], class tokens [D]) of each image."""
    torch, prefix = parity.library("torch"), 1 + model.config.num_register_tokens
    with torch.no_grad():
        found = [model(parity.as_torch(image, mean, std)) for image in images]
    grids = [(image.shape[0] // PATCH, image.shape[1] // PATCH) for image in images]
    return (
        [x.last_hidden_state[0, prefix:].reshape(*grid, -1) for x, grid in zip(found, grids)],
        [x.pooler_output[0] for x in found],
    )


def check(path, expected, images):
    found = parity.outputs(weights.read(path), parity.packed(images, PATCH))
    parity.assert_close(found.tokens, expected[0])
    parity.assert_close(found.pooled, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_class_token(kind, tmp_path):
    model, images = build(**KINDS[kind]), parity.five_images(np.random.default_rng(0), PATCH)
    model.save_pretrained(tmp_path)
    check(tmp_path, theirs(model, images), images)


def test_longer_names_and_own_pixels(tmp_path):
    """As some versions write the layers, and with the mean and deviation of satellite images."""
    model, images = build(num_register_tokens=2), parity.five_images(np.random.default_rng(1), PATCH)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {f"model.{name}" if name.startswith("layer.") else name: x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    pixels = dict(image_mean=[0.43, 0.411, 0.296], image_std=[0.213, 0.156, 0.143])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    check(tmp_path, theirs(model, images, *pixels.values()), images)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden_act="relu"), "hidden_act is 'relu'"),
        (dict(use_gated_mlp=True), "hidden_act is 'gelu' with use_gated_mlp"),
        (dict(patch_size=[8, 4]), "patch_size is .8, 4."),
        (dict(num_register_tokens=3), r"embeddings.register_tokens is \[1, 4, 64\]; expected \[1, 3, 64\]"),
        (dict(num_hidden_layers=2), "layer.2.norm1.weight"),
        (dict(num_hidden_layers=4), "lacks the tensor layer.3.norm1.weight"),
        (None, "num_attention_heads"),
    ],
)
def test_what_cannot_be_imported_is_said(change, words, tmp_path):
    build(num_register_tokens=4).save_pretrained(tmp_path)
    parity.assert_refused(tmp_path, change, words)
