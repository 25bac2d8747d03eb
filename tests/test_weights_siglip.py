"""SigLIP and SigLIP 2, image towers and classifiers, against transformers: our numbers on its files, its on ours."""

import json

import parity
import pytest
from safetensors.numpy import load_file, save_file
from siglip_models import PATCH, build, check_tower, load, run, same, some_images

from navit_jax import weights
from navit_jax.weights import dinov3, siglip, siglip_names

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["Siglip2VisionModel", "SiglipVisionModel"])
@pytest.mark.parametrize(
    "options", [{}, dict(vision_use_head=False, hidden_act="gelu", layer_norm_eps=1e-3), dict(num_channels=1)]
)
def test_an_image_tower_in_and_out(name, options, tmp_path):
    model = build(name, vision=options)
    images = [image[..., : model.config.num_channels] for image in some_images()]
    model.save_pretrained(tmp_path / "theirs")
    ours = weights.read(tmp_path / "theirs")
    found = parity.outputs(ours, parity.packed(images, PATCH))
    siglip.write(ours, tmp_path / "ours")
    for theirs in (model, load(tmp_path / "ours", name)):
        check_tower(found, theirs, images)
    same(weights.read(tmp_path / "ours"), ours)
    assert weights.config_of(tmp_path / "ours") == ours.cfg


def test_names_without_the_towers_prefix_and_other_pixels(tmp_path):
    model = build("Siglip2VisionModel")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefixed = any(name.startswith("vision_model.") for name in tensors)
    tensors = {
        name.removeprefix("vision_model.") if prefixed else f"vision_model.{name}": x for name, x in tensors.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    images = some_images()
    check_tower(parity.outputs(weights.read(tmp_path), parity.packed(images, PATCH)), model, images)
    pixels = dict(image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    cfg = weights.read(tmp_path).cfg
    assert (cfg.mean, cfg.std) == ((0.5,), (0.25,))


@pytest.mark.parametrize("name", ["Siglip2ForImageClassification", "SiglipForImageClassification"])
def test_a_classifier_in_and_out(name, tmp_path):
    labels = {i: f"class {i}" for i in range(12)}
    model = build(name, id2label=labels, label2id={v: k for k, v in labels.items()})
    model.save_pretrained(tmp_path / "theirs")
    ours, images = weights.read(tmp_path / "theirs"), some_images()
    assert ours.classes == tuple(labels.values()) and ours.cfg.num_classes == 12
    siglip.write(ours, tmp_path / "ours")
    found, again = parity.outputs(ours, parity.packed(images, PATCH)), load(tmp_path / "ours", name)
    for theirs in (model, again):
        parity.assert_close(found.logits, [x.logits[0] for x in run(theirs, images)])
    assert again.config.id2label == labels
    same(weights.read(tmp_path / "ours"), ours)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden_act="relu"), "hidden_act is 'relu'"),
        (dict(num_patches=36), r"position_embedding.weight is \[25, 64\]; expected \[36, 64\]"),
        (dict(num_hidden_layers=1), "encoder.layers.1.layer_norm1.weight"),
        (dict(num_hidden_layers=3), "lacks the tensor .*encoder.layers.2.layer_norm1.weight"),
        (dict(vision_use_head=False), "head.attention.in_proj_weight"),
        (None, "num_attention_heads"),
    ],
)
def test_what_cannot_be_imported_is_said(change, words, tmp_path):
    build("Siglip2VisionModel").save_pretrained(tmp_path)
    parity.assert_refused(tmp_path, change, words)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (siglip_names.VISION, "Siglip2VisionConfig"),
        (siglip_names.VISION, "SiglipVisionConfig"),
        (siglip_names.TEXT, "Siglip2TextConfig"),
        (siglip_names.TEXT, "SiglipTextConfig"),
        (dinov3.DEFAULTS, "DINOv3ViTConfig"),
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_takes(ours, theirs):
    """Configs on the hub hold what differs from these."""
    theirs = getattr(parity.library("transformers"), theirs)().to_dict()
    missing = {name for name in ours if name not in theirs}
    assert missing <= {"num_patches", "image_size", "vision_use_head"}  # of one of the two
    wanted = {name: theirs[name] for name in ours if name in theirs}
    assert {name: ours[name] for name in wanted} | {"projection_size": 768} == wanted | {"projection_size": 768}
