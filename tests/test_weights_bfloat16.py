"""In bfloat16 imported models stay about as near to float32 as their own library does in bfloat16."""

import numpy as np
import parity
import pytest
import siglip_models
import test_weights_dinov3

from navit_jax import weights

pytestmark = pytest.mark.slow


def siglip2():
    model = siglip_models.build("Siglip2VisionModel")

    def run(images, dtype):
        torch, found = parity.library("torch"), []
        for image in images:
            given = siglip_models.inputs(model, image)
            with torch.no_grad():
                found.append(model.to(dtype)(**given | dict(pixel_values=given["pixel_values"].to(dtype))))
        return [x.last_hidden_state[0] for x in found], [x.pooler_output[0] for x in found]

    return model, siglip_models.PATCH, run


def dinov3():
    model = test_weights_dinov3.build(num_register_tokens=4)

    def run(images, dtype):
        return test_weights_dinov3.theirs(model.to(dtype), images)

    return model, test_weights_dinov3.PATCH, run


def error(found, exact):
    """Root mean square of the difference, over that of the values."""
    x, y = (np.concatenate([np.asarray(x, np.float32).ravel() for x in arrays]) for arrays in (found, exact))
    return np.sqrt(np.square(x - y).mean() / np.square(y).mean())


@pytest.mark.parametrize("make", [siglip2, dinov3])
def test_bfloat16_is_as_near_as_theirs(make, tmp_path):
    model, patch, run = make()
    torch, images = parity.library("torch"), parity.five_images(np.random.default_rng(0), patch)
    model.save_pretrained(tmp_path)
    exact, rounded = ([[x.float() for x in kind] for kind in run(images, d)] for d in (torch.float32, torch.bfloat16))
    found = parity.outputs(weights.read(tmp_path), parity.packed(images, patch), "bfloat16")
    for ours, theirs, true in zip((found.tokens, found.pooled), rounded, exact, strict=True):
        print(f"{make.__name__}: {error(ours, true):.1e} ours, {error(theirs, true):.1e} theirs")
        assert 1e-4 < error(ours, true) < 1.5 * error(theirs, true) < 0.1
