"""Pixtral's vision tower: our numbers against transformers', in every file that people have it in."""

import json

import numpy as np
import parity
import pytest
from safetensors.numpy import load_file, save_file

from input_pipeline.errors import UserError
from navit_jax import weights
from navit_jax.weights import vlm

pytestmark = pytest.mark.slow

PATCH = 4
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, patch_size=PATCH)


@pytest.fixture(scope="module")
def tower():
    transformers = parity.library("transformers")
    config = transformers.PixtralVisionConfig(**SIZES, hidden_act="silu", image_size=64)
    return parity.randomise(transformers.PixtralVisionModel(config))


@pytest.fixture(scope="module")
def images():
    return parity.five_images(np.random.default_rng(0), PATCH)


def theirs(tower, images, mean=vlm.CLIP_MEAN, std=vlm.CLIP_STD):
    torch = parity.library("torch")
    with torch.no_grad():
        found = [tower(parity.as_torch(image, mean, std)).last_hidden_state[0] for image in images]
    return [x.reshape(image.shape[0] // PATCH, image.shape[1] // PATCH, -1) for x, image in zip(found, images)]


def check(path, expected, images):
    found = parity.outputs(weights.read(path), parity.packed(images, PATCH))
    parity.assert_close(found.tokens, expected)
    parity.assert_close(found.pooled, [x.mean((0, 1)) for x in expected])


def test_tower_alone(tower, images, tmp_path):
    tower.save_pretrained(tmp_path)
    check(tmp_path, theirs(tower, images), images)


@pytest.mark.parametrize("whole", ["Llava", "Mistral3"])
def test_tower_in_its_whole_model(whole, tower, images, tmp_path):
    """Also with a base of the frequencies and with pixels that are not the usual ones."""
    transformers = parity.library("transformers")
    text = transformers.MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    rope = dict(rope_type="axial", rope_theta=700.0)
    vision = transformers.PixtralVisionConfig(**SIZES, hidden_act="silu", image_size=64, rope_parameters=rope)
    config = getattr(transformers, f"{whole}Config")(vision_config=vision, text_config=text)
    model = parity.randomise(getattr(transformers, f"{whole}ForConditionalGeneration")(config), seed=1)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    pixels = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4], rescale_factor=1 / 255)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    check(tmp_path, theirs(model.model.vision_tower, images, pixels["image_mean"], pixels["image_std"]), images)


def mistral_names(tensors, heads):
    """The tower as Mistral writes it: short names, and neighbours in a head turn together, not halves."""
    short = dict(q_proj="wq", k_proj="wk", v_proj="wv", o_proj="wo", gate_proj="w1", down_proj="w2", up_proj="w3")
    out = {"tok_embeddings.weight": np.zeros((3, 2), np.float32)}
    for name, x in tensors.items():
        parts = name.split(".")
        if parts[-2] in ("q_proj", "k_proj"):
            x = np.ascontiguousarray(x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape))
        out["vision_encoder." + ".".join(short.get(part, part) for part in parts)] = x
    return out


def test_mistral_naming(tower, images, tmp_path):
    tower.save_pretrained(tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    save_file(mistral_names(tensors, SIZES["num_attention_heads"]), tmp_path / "consolidated.safetensors")
    options = dict(dim=32, vision_encoder=dict(SIZES, num_channels=3, rope_theta=10000.0, image_size=64))
    (tmp_path / "params.json").write_text(json.dumps(options))
    check(tmp_path / "consolidated.safetensors", theirs(tower, images), images)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'.*'silu'"),
        (dict(rope_parameters=dict(rope_type="dynamic")), "rope_type is 'dynamic'"),
        (None, "num_attention_heads"),
    ],
)
def test_what_cannot_be_imported_is_said(change, words, tower, tmp_path):
    tower.save_pretrained(tmp_path)
    parity.assert_refused(tmp_path, change, words)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_every_tensor_is_accounted_for(change, tower, tmp_path):
    tower.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "transformer.layers.1.attention.v_proj.weight"
    if change == "missing":
        tensors.pop(name)
    elif change == "extra":
        tensors[name := "transformer.layers.1.attention.v_proj.bias"] = np.zeros(64, np.float32)
    else:
        tensors[name] = tensors[name][:32].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name):
        weights.read(tmp_path)
