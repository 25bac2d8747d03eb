"""Two towers into one space: an image tower, a text tower, their projections, and the scale and bias of the logits.

The image tower is a whole NaViT without a head, kept under `image/`, so weights pass between a supervised and a
contrastive run by that prefix alone. The scale is learned as its logarithm and held below a maximum after each update,
not by a clamp in the forward pass, whose gradient would be 0 beyond it.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from input_pipeline.text import table_size
from navit_jax import attention, layers, navit, sharding, text_tower

SIZES = ("width", "depth", "heads", "mlp_dim")
SHARED_FIELDS = (  # of configs.base.model, the same in both towers
    *("qk_norm", "bias", "dropout", "stochastic_depth", "remat", "dtype", "norm", "norm_eps", "mlp", "layer_scale"),
)


@dataclass(frozen=True, kw_only=True)
class TwoTowersConfig:
    """Everything that shapes the two towers; UserError for sizes that cannot work.

    image: without classes. init_scale, max_scale: of the logits, not of their logarithm. init_bias: None: no bias.
    project_image: False: an image's vector is the pooled one, as in SigLIP. project_bias: of both projections.
    """

    image: navit.NaViTConfig
    text: text_tower.TextConfig
    embed_dim: int
    init_scale: float
    max_scale: float
    init_bias: float | None = None
    project_image: bool = True
    project_bias: bool = False

    def __post_init__(self):
        if self.embed_dim < 1:
            raise UserError(f"contrastive.embed_dim is {self.embed_dim}; it must be at least 1")
        if not self.project_image and self.embed_dim != self.image.token_width:
            raise UserError(
                f"contrastive.embed_dim is {self.embed_dim}, but without contrastive.project_image it is the image "
                f"tower's width: set it to {self.image.token_width}"
            )
        if not 0 < self.init_scale <= self.max_scale:
            raise UserError(
                f"contrastive.init_scale is {self.init_scale}; it must be above 0, and at most contrastive.max_scale, "
                f"which is {self.max_scale}"
            )


def from_config(config: ConfigDict, *, vocab_size: int) -> TwoTowersConfig:
    """The two towers of a run's whole config; vocab_size: of its tokenizer.

    Sizes of `config.text` that are 0 are the image tower's. A bias of the logits exists for the sigmoid loss only: to
    a softmax it is no parameter. Raises UserError for a token table smaller than the vocabulary, and for unknown names
    and sizes that do not fit together.
    """
    text, contrastive = config.text, config.contrastive
    image = navit.from_config(config.model, channels=config.data.channels, num_classes=0)
    text_config = text_tower.TextConfig(
        **{name: text[name] or getattr(image, name) for name in SIZES},
        **{name: config.model[name] for name in SHARED_FIELDS},
        attention="auto" if config.model.attention in attention.PLANNED else config.model.attention,
        vocab_size=table_size(text, vocab_size),
        max_tokens=text.max_tokens,
        pool=text.pool,
        pad=text.pad,
    )
    return TwoTowersConfig(
        image=image,
        text=text_config,
        embed_dim=contrastive.embed_dim,
        init_scale=contrastive.init_scale,
        max_scale=contrastive.max_scale,
        init_bias=contrastive.init_bias if contrastive.loss == "sigmoid" else None,
        project_image=contrastive.project_image,
        project_bias=contrastive.project_bias,
    )


class TwoTowers(nnx.Module):
    """Images and texts as unit vectors of one space. Sources: Radford et al. 2021 (2103.00020), Zhai et al. 2023
    (SigLIP, 2303.15343) for the bias."""

    def __init__(self, cfg: TwoTowersConfig, *, rngs: nnx.Rngs):
        self.image = navit.NaViT(cfg.image, rngs=rngs)
        self.text = text_tower.TextTower(cfg.text, rngs=rngs)
        dense = partial(layers.Dense, outs=(cfg.embed_dim,), bias=cfg.project_bias, dtype=jnp.float32, rngs=rngs)
        self.image_projection = dense((cfg.image.token_width,)) if cfg.project_image else None
        self.text_projection = dense((cfg.text.width,))
        self.logit_scale = nnx.Param(jnp.asarray(np.log(cfg.init_scale), jnp.float32))
        if cfg.init_bias is not None:
            self.logit_bias = nnx.Param(jnp.asarray(cfg.init_bias, jnp.float32))
        self.biased = cfg.init_bias is not None

    def encode_images(self, images: Packed, key: jax.Array | None = None) -> jax.Array:
        """[B, K, E] float32 of length 1, an empty slot exactly 0; key: for dropout and stochastic depth."""
        return sharding.constrain(_vectors(self.image(images, key=key)[1]["pooled"], self.image_projection), "BKE")

    def encode_texts(self, texts: Packed, key: jax.Array | None = None) -> jax.Array:
        """[B, M, E] float32 of length 1, an empty slot exactly 0; key: for dropout and stochastic depth."""
        return sharding.constrain(_vectors(self.text(texts, key=key), self.text_projection), "BME")

    def scale(self) -> jax.Array:
        """What products of vectors are multiplied by, float32 scalar."""
        return jnp.exp(self.logit_scale[...])

    def bias(self) -> jax.Array:
        """What is added to the logits, float32 scalar; 0 in a model without one."""
        return self.logit_bias[...] if self.biased else jnp.zeros((), jnp.float32)


def _vectors(pooled: jax.Array, projection: layers.Dense | None) -> jax.Array:
    """Projected, at length 1; what is 0, an empty slot, stays 0: a bias alone is no vector."""
    if projection is None:
        return _unit(pooled)
    z = projection(pooled)
    return _unit(z if projection.bias is None else jnp.where(pooled.any(-1, keepdims=True), z, 0))


def _unit(z: jax.Array) -> jax.Array:
    """Vectors of length 1 over the last axis; 0 stays 0, with finite gradients."""
    square = jnp.square(z).sum(-1, keepdims=True)
    return z / jnp.sqrt(jnp.where(square > 0, square, 1))


def limit_scale(params: dict, max_scale: float) -> dict:
    """Parameters whose scale of the logits is at most `max_scale`: what follows each update."""
    return params | dict(logit_scale=jnp.minimum(params["logit_scale"], float(np.log(max_scale))))


def abstract(cfg: TwoTowersConfig) -> tuple[nnx.GraphDef, dict]:
    """`navit.split` of two towers whose parameters are shapes only: nothing is computed or stored."""
    return navit.split(nnx.eval_shape(lambda: TwoTowers(cfg, rngs=nnx.Rngs(0))))


def init_params(cfg: TwoTowersConfig, seed: int) -> dict:
    """Fresh parameters as a plain nested dict, made in one compiled call."""
    return _init(cfg, jax.random.key(seed))


@partial(jax.jit, static_argnums=0)
def _init(cfg: TwoTowersConfig, key: jax.Array) -> dict:
    return navit.split(TwoTowers(cfg, rngs=nnx.Rngs(key)))[1]


def flops_forward(cfg: TwoTowersConfig, image_lengths: np.ndarray, text_lengths: np.ndarray) -> float:
    """Useful matrix FLOPs of one forward pass of both towers over images and texts with these token counts.

    The products of images with texts are left out: at 32 k pairs they are 0.1 % of a B/16 on 256 tokens an image.
    """
    images = len(image_lengths) if cfg.project_image else 0
    projected = 2 * cfg.embed_dim * (cfg.image.token_width * images + cfg.text.width * len(text_lengths))
    towers = navit.flops_forward(cfg.image, image_lengths) + text_tower.flops_forward(cfg.text, text_lengths)
    return float(towers + projected)
