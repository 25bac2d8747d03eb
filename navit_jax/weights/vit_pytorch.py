"""NaViT of vit-pytorch (vit_pytorch.na_vit), as safetensors of its `state_dict()`.

Shapes tell all of it but the channels: a patch is taken as one of 3, else of 1, unless a config.json beside the file
gives "channels", as the constructor takes them. That library normalises no pixels, so [0, 1] is what the model gets;
"mean" and "std" in config.json say otherwise.
"""

import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from input_pipeline.errors import UserError
from navit_jax import navit
from navit_jax.navit import NaViTConfig
from navit_jax.weights import Weights, mapping, orders
from navit_jax.weights.mapping import Change, Rule, copy, expect, linear, zeros
from navit_jax.weights.reader import Tensors

NAME = "vit-pytorch (NaViT)"
LAYER = "transformer.layers.{i}."
Norm = Callable[..., list[Rule]]  # (ours, theirs, **then and back) -> rules of a LayerNorm


def recognises(names: Mapping[str, tuple], config: Mapping) -> bool:
    """Whether these are tensors of one of vit-pytorch's NaViTs."""
    return {"attn_pool_queries", "pos_embed_height", "pos_embed_width"} <= set(names)


def read(tensors: Tensors) -> Weights:
    """The model. Raises UserError for its relatives, whose attention is another one."""
    if "transformer.layers.0.0.q_norm.gamma" not in tensors.names:
        raise UserError(
            f"{tensors.path} is of another NaViT of vit-pytorch (na_vit_nested_tensor?): it has no "
            "transformer.layers.0.0.q_norm.gamma; only vit_pytorch.na_vit.NaViT is implemented"
        )
    hidden = tensors.names.get(LAYER.replace("{i}", "0") + "1.1.weight", (0,))[0]
    gamma = tensors.names["transformer.layers.0.0.q_norm.gamma"]
    rows = [tensors.names[f"pos_embed_{axis}"][0] for axis in ("height", "width")]
    cfg = config(tensors, LAYER, gamma=gamma, hidden=hidden, rows=max(rows), channels_name="channels")
    scale = cfg.head_dim**0.5  # it does not divide logits by it; folded into the queries' norm, exactly
    made = ends(cfg, _norm)
    for axis, name in (("y", "height"), ("x", "width")):
        made += [padded(f"posemb/{axis}", f"pos_embed_{name}")]
    made += copy("pool/query", "attn_pool_queries") + _norm("norm", "transformer.norm")
    made += _norm("blocks/attn_norm", f"{LAYER}0.norm") + _norm("pool/norm", "attn_pool.norm")
    for ours, theirs in (("blocks/attn", f"{LAYER}0"), ("pool", "attn_pool")):
        made += [
            head_norm(f"{ours}/q_norm", f"{theirs}.q_norm", scale),
            head_norm(f"{ours}/k_norm", f"{theirs}.k_norm"),
        ]
        made += linear(f"{ours}/q", f"{theirs}.to_q", bias=False)
        made += linear(f"{ours}/k", f"{theirs}.to_kv", bias=False, part=(0, 2))
        made += linear(f"{ours}/v", f"{theirs}.to_kv", bias=False, part=(1, 2))
        made += linear(f"{ours}/out", f"{theirs}.to_out.0", ins=2, bias=False)
        made += [zero for name in ("q", "k", "v", "out") for zero in zeros(f"{ours}/{name}/bias")]
    made += _norm("blocks/mlp_norm", f"{LAYER}1.0")
    made += linear("blocks/mlp/up", f"{LAYER}1.1") + linear("blocks/mlp/down", f"{LAYER}1.4")
    return Weights(cfg, mapping.load(made, tensors, navit.abstract(cfg)[1]))


def _norm(ours: str, theirs: str, **order: Change) -> list[Rule]:
    """Their LayerNorm: beta is a buffer of zeros, kept in the file; taken over as the bias that it is."""
    return copy(f"{ours}/scale", f"{theirs}.gamma", **order) + copy(f"{ours}/bias", f"{theirs}.beta", **order)


def config(
    tensors: Tensors, layer: str, *, gamma: tuple[int, ...], hidden: int, rows: int, channels_name: str
) -> NaViTConfig:
    """The configuration of a NaViT as vit-pytorch and MONAI build it.

    layer: what the names of layer {i} start with. gamma: shape of the queries' norm, (heads, 1, head size). hidden:
    width of the MLPs. rows: of the longer table of positions. channels_name: of the constructor's option.
    """
    names, said = tensors.names, tensors.config
    needed = {"to_patch_embedding.1.weight", "mlp_head.1.weight"}
    for name in sorted(needed):
        tensors.check(name)
    width, values = names["to_patch_embedding.1.weight"]
    channels = said.get(channels_name) or next((c for c in (3, 1) if _square(values, c)), 0)
    if not channels or not _square(values, channels):
        raise UserError(
            f"{tensors.path}: a patch has {values} values, no square of {channels or '3 or 1'} channels; write the "
            f'right {{"{channels_name}": ...}} into a config.json beside it'
        )
    pattern = re.escape(layer).replace(re.escape("{i}"), r"(\d+)")
    layers = {found[1] for name in names if (found := re.match(pattern, name))}
    return NaViTConfig(
        **dict(patch_size=math.isqrt(values // channels), channels=channels, embed_norm="both", bias=True),
        **dict(mean=_numbers(said.get("mean", 0.0)), std=_numbers(said.get("std", 1.0))),
        **dict(width=width, depth=len(layers), heads=gamma[0], head_size=gamma[-1], mlp_dim=hidden, mlp="gelu"),
        **dict(norm_eps=1e-5, qk_norm=True, qk_rms=True, posemb="learned", posemb_max=rows),
        **dict(pool="query", norm_pooled=True, num_classes=names["mlp_head.1.weight"][0]),
    )


def _square(values: int, channels: int) -> bool:
    return values % channels == 0 and math.isqrt(values // channels) ** 2 == values // channels


def _numbers(said: float | list) -> tuple[float, ...]:
    return tuple(map(float, said)) if isinstance(said, (list, tuple)) else (float(said),)


def ends(cfg: NaViTConfig, norm: Norm) -> list[Rule]:
    """Rules of the patch embedding, whose patches are in (channel, row, column) order, and of the head."""
    order = orders.channels_last(cfg.patch_size, cfg.channels)
    made = norm("embed/norm_in", "to_patch_embedding.0", **order) + norm("embed/norm_out", "to_patch_embedding.2")
    made += linear("embed", "to_patch_embedding.1", bias=False, **order)
    made += copy("embed/bias", "to_patch_embedding.1.bias") + norm("pool_norm", "mlp_head.0")
    return made + linear("head", "mlp_head.1", bias=False) + zeros("head/bias")


def padded(ours: str, theirs: str) -> Rule:
    """A table of positions; the shorter of two repeats its last row, as MONAI reads it for what lies beyond."""

    def load(x: np.ndarray, shape: tuple) -> np.ndarray:
        expect(x[:1], 1, shape[1])
        return np.pad(x, ((0, shape[0] - len(x)), (0, 0)), mode="edge")

    return Rule(ours, theirs, load)


def head_norm(ours: str, theirs: str, times: float = 1.0) -> Rule:
    """The norm of queries or keys: gamma [N, 1, H], a scale for each head."""
    return Rule(f"{ours}/scale", f"{theirs}.gamma", lambda x, shape: expect(x, shape[0], 1, shape[1])[:, 0] * times)
