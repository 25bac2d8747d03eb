"""For the tests of timm's format: small models of ours that its NaFlexVit can be, and what a model of timm's makes."""

import jax
import numpy as np
import parity

from navit_jax import navit, weights

PATCH = 8
MEAN, STD = (0.4, 0.45, 0.6), (0.2, 0.25, 0.3)
OURS = [
    dict(),
    dict(posemb="table", posemb_square=True, posemb_grid=(5, 7), pool="mean", norm_tokens=False, norm_pooled=True),
    dict(posemb="learned", posemb_coords="resized", posemb_resize="linear", posemb_max=9, pool="first", registers=3),
    dict(posemb="rope", mlp="swiglu", registers=2, layer_scale=0.1, mlp_dim=101, mean=(0.5,), std=(0.5,)),
    dict(posemb="rope", posemb_coords="centred", rope_base=100.0, qk_norm=False, norm="rms", mlp="quick_gelu"),
    dict(posemb="rope", posemb_coords="fractional", posemb_max=7, embed_norm="after", pool="mean"),
]
WITHOUT_BIAS = dict(posemb="none", embed_norm="entry", num_classes=0, norm_tokens=False, registers=1, pool="first")


def ours(**fields):
    """Random weights of a small model that timm has, too."""
    sizes = dict(width=64, depth=2, heads=4, mlp_dim=96, patch_size=PATCH, num_classes=5, bias=True)
    kinds = dict(posemb="table", posemb_resize="bicubic_antialias", mean=MEAN, std=STD)
    cfg, rng = navit.NaViTConfig(**{**sizes, **kinds, **fields}), np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * x.shape[-2 if x.ndim > 2 else 0] ** -0.5).astype(np.float32),
        navit.abstract(cfg)[1],
    )
    return weights.Weights(cfg, params, classes=tuple("abcde") if cfg.num_classes else ())


def theirs(model, images, mean=MEAN, std=STD):
    """(tokens of patches, pooled, logits) of images, each on its own."""
    torch = parity.library("torch")
    tokens, pooled, logits = [], [], []
    with torch.no_grad():
        for image in images:
            features = model.forward_features(parity.as_torch(image, mean, std))
            rows, columns = (side // PATCH for side in image.shape[:2])
            tokens.append(features[0, model.num_prefix_tokens :].reshape(rows, columns, -1))
            pooled.append(model.forward_head(features, pre_logits=True)[0])
            logits.append(model.forward_head(features)[0])
    return tokens, pooled, logits
