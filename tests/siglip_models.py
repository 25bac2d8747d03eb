"""Random SigLIP models of transformers, and what both sides make of the same images."""

import jax
import numpy as np
import parity

from input_pipeline.patches import patchify

PATCH, SIDE = 8, 5
ENCODER = dict(intermediate_size=96, num_hidden_layers=2)
VISION = ENCODER | dict(hidden_size=64, num_attention_heads=4, patch_size=PATCH)
TEXT = ENCODER | dict(hidden_size=48, num_attention_heads=3, vocab_size=60, max_position_embeddings=16)


def build(name, seed=0, vision=(), **options):
    """A random `transformers` model, such as Siglip2Model."""
    transformers = parity.library("transformers")
    vision = VISION | (dict(num_patches=SIDE**2) if "2" in name else dict(image_size=SIDE * PATCH)) | dict(vision)
    if name.endswith("VisionModel"):
        config = getattr(transformers, name.replace("Model", "Config"))(**vision)
    else:
        config = getattr(transformers, f"{name.split('ForI')[0].removesuffix('Model')}Config")(
            text_config=TEXT | dict(projection_size=64), vision_config=vision, **options
        )
    return parity.randomise(getattr(transformers, name)(config), seed)


def some_images():
    return parity.five_images(np.random.default_rng(0), PATCH)


def inputs(model, image):
    """What the model is called with for one image."""
    torch = parity.library("torch")
    if model.config.model_type in ("siglip", "siglip_vision_model"):
        return dict(pixel_values=parity.as_torch(image), interpolate_pos_encoding=True)
    patches = torch.from_numpy(patchify(image, PATCH).astype(np.float32))[None] / 127.5 - 1
    shape = torch.tensor([[side // PATCH for side in image.shape[:2]]])
    return dict(pixel_values=patches, spatial_shapes=shape, pixel_attention_mask=torch.ones(patches.shape[:2]).long())


def run(model, images, **more):
    torch = parity.library("torch")
    with torch.no_grad():
        return [model(**inputs(model, image), **more) for image in images]


def check_tower(found, model, images):
    """Tokens of each image, and the pooled ones where the model has a head for them."""
    theirs = run(model, images)
    grids = [(image.shape[0] // PATCH, image.shape[1] // PATCH) for image in images]
    parity.assert_close(found.tokens, [x.last_hidden_state[0].reshape(*g, -1) for x, g in zip(theirs, grids)])
    pooled = [x.last_hidden_state[0].mean(0) if x.pooler_output is None else x.pooler_output[0] for x in theirs]
    parity.assert_close(found.pooled, pooled)


def load(folder, name):
    """The model that transformers makes of a folder, from which it must have taken all and missed nothing."""
    model, notes = getattr(parity.library("transformers"), name).from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values()), notes
    return model.eval()


def same(a, b):
    """Two Weights are the same model, bit for bit."""
    assert (a.cfg, a.classes) == (b.cfg, b.classes)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
