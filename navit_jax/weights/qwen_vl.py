"""The vision towers of Qwen2-VL and Qwen2.5-VL, alone or inside their whole model, with the 2x2 patch merger.

Tokens are the merged ones, which the language model is given, in rows and columns of the merged grid; `pooled` is their
mean, as the towers have no pooling of their own. They see an image as two equal frames, so the kernel's sum over its
frames is exact. Grids must have even sides (`cfg.grid_multiple`).
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from input_pipeline.errors import UserError
from navit_jax import navit
from navit_jax.weights import Weights, hugging_face, mapping, orders, vlm
from navit_jax.weights.mapping import Rule, expect, linear, norm, qkv, zeros
from navit_jax.weights.reader import Tensors

NAME = "Qwen2-VL or Qwen2.5-VL vision tower"
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
HEADS, WINDOW, FULL_BLOCKS = 16, 112, (7, 15, 23, 31)  # where a config is silent; the window in pixels


def recognises(names: Mapping[str, tuple], config: dict) -> bool:
    """Whether there is one tower with a merger and a patch embedding over time."""
    prefix = vlm.prefix_of(names, "merger.ln_q.weight")
    return prefix is not None and len(names.get(f"{prefix}patch_embed.proj.weight", ())) == 5


def read(tensors: Tensors) -> Weights:
    """Raises UserError for options that are not implemented, and where there is no config.json."""
    prefix = vlm.prefix_of(tensors.names, "merger.ln_q.weight")
    cfg = _config(tensors, prefix)
    params = mapping.load(_rules(tensors, prefix, cfg), tensors, navit.abstract(cfg)[1])
    vlm.ignore_outside(tensors, prefix)
    version = "2.5" if cfg.window else "2"
    return Weights(cfg, params, source=f"Qwen{version}-VL vision tower, {tensors.path}")


def _config(tensors: Tensors, prefix: str) -> navit.NaViTConfig:
    options = tensors.config.get("vision_config", tensors.config)
    if not options:
        raise UserError(
            f"{tensors.path}: sizes alone do not tell heads and windows of a {NAME}; put its config.json beside it, or "
            f'one with {{"num_heads": {HEADS}}}, of Qwen2.5-VL also "window_size": {WINDOW} (pixels) and '
            f'"fullatt_block_indexes": {[*FULL_BLOCKS]}, and your numbers'
        )
    width, channels, _, patch, across = vlm.shape_of(tensors, f"{prefix}patch_embed.proj.weight", 5)
    where, depth = tensors.path, vlm.count_layers(tensors.names, f"{prefix}blocks.")
    vlm.require(where, "patch_size", (patch, across), (patch, patch))
    vlm.require(where, "spatial_merge_size", options.get("spatial_merge_size", 2), 2)
    gated = f"{prefix}blocks.0.mlp.gate_proj.weight" in tensors.names
    up = f"{prefix}blocks.0.mlp.{'up_proj' if gated else 'fc1'}.weight"
    return navit.NaViTConfig(
        width=width,
        depth=depth,
        heads=options.get("num_heads", HEADS),
        mlp_dim=vlm.shape_of(tensors, up, 2)[0],
        patch_size=patch,
        channels=channels,
        bias=True,
        qk_norm=False,
        posemb="rope",
        rope_base=vlm.rope_base(where, options),
        pool="mean",
        merge=vlm.shape_of(tensors, f"{prefix}merger.mlp.2.weight", 2)[0],
        **(_version_2_5 if gated else _version_2)(where, options, depth, patch),
        **hugging_face.normalisation(tensors, vlm.CLIP_MEAN, vlm.CLIP_STD),
    )


def _version_2(where: Path, options: dict, depth: int, patch: int) -> dict:
    activation = options.get("hidden_act", "quick_gelu")
    vlm.require(where, "hidden_act", activation, *ACTIVATIONS)
    return dict(mlp=ACTIVATIONS[activation])


def _version_2_5(where: Path, options: dict, depth: int, patch: int) -> dict:
    """RMS norms, and windows of a whole number of 2x2 units a side."""
    vlm.require(where, "hidden_act", options.get("hidden_act", "silu"), "silu")
    pixels = options.get("window_size", WINDOW)
    if pixels < 2 * patch:
        raise UserError(f"{where}: window_size is {pixels} pixels; expected at least two patches, {2 * patch}")
    full = tuple(i for i in options.get("fullatt_block_indexes", FULL_BLOCKS) if i < depth)
    return dict(norm="rms", mlp="swiglu", window=pixels // 2 // patch * 2, full_blocks=full)


def _rules(tensors: Tensors, prefix: str, cfg: navit.NaViTConfig) -> list[Rule]:
    layer, layered = f"{prefix}blocks.{{i}}", cfg.norm == "layer"
    frames = tensors.names[f"{prefix}patch_embed.proj.weight"][2]

    def kernel(x: np.ndarray, shape: tuple) -> np.ndarray:
        x = expect(x, cfg.width, cfg.channels, frames, cfg.patch_size, cfg.patch_size)
        return x.sum(2).transpose(2, 3, 1, 0).reshape(shape)

    rules = [Rule("embed/kernel", f"{prefix}patch_embed.proj.weight", kernel), *zeros("embed/bias")]
    for ours, theirs in (("blocks/attn_norm", f"{layer}.norm1"), ("blocks/mlp_norm", f"{layer}.norm2")):
        rules += norm(ours, theirs, bias=layered)
    rules += qkv("blocks/attn", f"{layer}.attn.qkv", **orders.rope_pairs(cfg.head_dim, half=True))
    rules += linear("blocks/attn/out", f"{layer}.attn.proj", ins=2)
    gated = dict(gate="gate_proj", up="up_proj", down="down_proj")
    for ours, theirs in (gated if cfg.mlp == "swiglu" else dict(up="fc1", down="fc2")).items():
        rules += linear(f"blocks/mlp/{ours}", f"{layer}.mlp.{theirs}")
    rules += norm("norm", f"{prefix}merger.ln_q", bias=layered)
    return rules + linear("merger/up", f"{prefix}merger.mlp.0") + linear("merger/down", f"{prefix}merger.mlp.2")
