"""The vision towers of Qwen2-VL and Qwen2.5-VL: our merged tokens against transformers'."""

import json

import jax
import numpy as np
import parity
import pytest
from helpers import fast_jit
from safetensors.numpy import load_file, save_file

from input_pipeline.errors import UserError
from navit_jax import navit, weights
from navit_jax.weights import vlm

pytestmark = pytest.mark.slow

PATCH, OUT = 4, 48
SHARED = dict(num_heads=4, patch_size=PATCH)
QWEN2 = dict(SHARED, depth=2, embed_dim=64, hidden_size=OUT, mlp_ratio=2)
QWEN2_5 = dict(SHARED, depth=4, hidden_size=64, out_hidden_size=OUT, intermediate_size=96)
TEXT = dict(
    vocab_size=50,
    hidden_size=OUT,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 4, 4]),
)
WINDOWS = [  # pixels of a window, 4 or 6 patches, which divide few sides; and the blocks that see whole images
    dict(window_size=16, fullatt_block_indexes=[1, 3]),
    dict(window_size=26, fullatt_block_indexes=[2]),
    dict(window_size=16, fullatt_block_indexes=[7, 15]),
]


def make(version, **changes):
    """The vision tower of a version, with random weights."""
    folder = "qwen2_vl" if version == 2 else "qwen2_5_vl"
    config = parity.library(f"transformers.models.{folder}.configuration_{folder}")
    model = parity.library(f"transformers.models.{folder}.modeling_{folder}")
    if version == 2:
        return parity.randomise(
            model.Qwen2VisionTransformerPretrainedModel(config.Qwen2VLVisionConfig(**QWEN2 | changes))
        )
    tower = model.Qwen2_5_VisionTransformerPretrainedModel(config.Qwen2_5_VLVisionConfig(**QWEN2_5 | changes))
    return parity.randomise(tower)


@pytest.fixture(scope="module")
def images():
    return parity.five_images(np.random.default_rng(0), PATCH, multiple=2)


def theirs(tower, images, mean=vlm.CLIP_MEAN, std=vlm.CLIP_STD):
    """Merged tokens [rows / 2, columns / 2, OUT] of each image, cut into patches by their own processor."""
    torch = parity.library("torch")
    processing = parity.library("transformers.models.qwen2_vl.image_processing_qwen2_vl")
    processor = processing.Qwen2VLImageProcessor(
        patch_size=PATCH, do_resize=False, image_mean=list(mean), image_std=list(std)
    )
    found = []
    for image in images:
        cut = processor(images=[torch.from_numpy(image.transpose(2, 0, 1))], return_tensors="pt")
        _, rows, columns = cut["image_grid_thw"][0].tolist()
        assert (rows * PATCH, columns * PATCH) == image.shape[:2]
        with torch.no_grad():
            merged = tower(cut["pixel_values"], grid_thw=cut["image_grid_thw"]).pooler_output
        found.append(merged.reshape(rows // 2, columns // 2, -1))
    return found


def check(path, expected, images):
    """Tokens where the model says that they are, at a quarter of the patches' places, and their mean."""
    read, row = weights.read(path), parity.packed(images, PATCH)
    graph, shapes = navit.abstract(read.cfg)
    jax.tree.map(lambda s, x: np.testing.assert_equal(x.shape, s.shape), shapes, read.params)

    @fast_jit
    def run(params, row):
        model = navit.merge(graph, params)
        return model.tokens(row), model(row)[1]["pooled"]

    tokens_BMD, pooled_BKD = map(np.asarray, run(read.params, row))
    found, start = [], 0
    for _, rows, columns in row.grids[0][: len(images)] // [1, 2, 2]:
        found.append(tokens_BMD[0, start : start + rows * columns].reshape(rows, columns, OUT))
        start += rows * columns
    parity.assert_close(found, expected)
    parity.assert_close(list(pooled_BKD[0, : len(images)]), [x.mean((0, 1)) for x in expected])
    assert not pooled_BKD[0, len(images) :].any()
    return read


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_qwen2(activation, images, tmp_path):
    tower = make(2, hidden_act=activation)
    tower.save_pretrained(tmp_path)
    read = check(tmp_path, theirs(tower, images), images)
    assert (read.cfg.grid_multiple, read.cfg.window, read.cfg.merge) == (2, 0, OUT)


@pytest.mark.parametrize("windows", WINDOWS, ids=lambda w: f"{w['window_size']}-{w['fullatt_block_indexes']}")
def test_qwen2_5(windows, images, tmp_path):
    tower = make(2.5, **windows)
    tower.save_pretrained(tmp_path)
    check(tmp_path, theirs(tower, images), images)


def test_windows_matter(images):
    """A control: other windows make other tokens, by far more than the tolerance."""
    towers = [make(2.5, **windows) for windows in WINDOWS]
    tokens = [theirs(tower, images[4:])[0].numpy() for tower in towers]
    assert min(np.abs(tokens[0] - x).max() for x in tokens[1:]) > 0.1


@pytest.mark.parametrize("version, prefix", [(2, "visual."), (2.5, "model.visual.")])
def test_inside_its_whole_model(version, prefix, images, tmp_path):
    """The language model is left alone; base of the frequencies and pixels are not the usual ones."""
    transformers = parity.library("transformers")
    rope = dict(rope_parameters=dict(rope_type="axial", rope_theta=700.0))
    vision = (QWEN2 if version == 2 else QWEN2_5 | WINDOWS[0]) | rope
    name = "Qwen2VL" if version == 2 else "Qwen2_5_VL"
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=TEXT)
    model = parity.randomise(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    model.save_pretrained(tmp_path)
    tensors = {name.replace("visual.", prefix): x for name, x in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    pixels = dict(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(image_processor=pixels)))
    check(tmp_path, theirs(model.model.visual, images, *pixels.values()), images)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(hidden_act="relu"), "hidden_act is 'relu'"),
        (dict(spatial_merge_size=4), "spatial_merge_size is 4"),
        (dict(rope_parameters=dict(rope_type="dynamic")), "rope_type is 'dynamic'"),
        (None, "num_heads"),
    ],
)
def test_what_cannot_be_imported_is_said(change, words, tmp_path):
    make(2).save_pretrained(tmp_path)
    parity.assert_refused(tmp_path, change, words)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_every_tensor_is_accounted_for(change, tmp_path):
    make(2.5, **WINDOWS[0]).save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "blocks.1.attn.qkv.bias"
    if change == "missing":
        tensors.pop(name)
    elif change == "extra":
        tensors[name := "blocks.1.attn.rope"] = np.zeros(3, np.float32)
    else:
        tensors[name] = tensors[name][:-1].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name):
        weights.read(tmp_path)
