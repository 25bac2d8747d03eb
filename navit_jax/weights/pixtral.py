"""Pixtral's vision tower, alone or inside a Llava, Mistral 3 or Mistral checkpoint: RMS norms, SwiGLU, 2-D rope.

Its tokens are those behind the last block, which no norm follows; `pooled` is their mean, as it has no pooling of its
own. Two namings of the same tensors exist: Hugging Face's, and Mistral's own (consolidated.safetensors with a
params.json), in which rope turns neighbouring values of a head, not those half a head apart.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from input_pipeline.errors import UserError
from navit_jax import navit
from navit_jax.weights import Weights, hugging_face, mapping, orders, vlm
from navit_jax.weights.mapping import Rule, conv_patch, linear, norm
from navit_jax.weights.reader import Tensors

NAME = "Pixtral vision tower"
NORM_EPS = 1e-5  # said by no config


class Naming(NamedTuple):
    """What one family of files calls our parts of a block; half: as in `orders.rope_pairs`."""

    parts: Mapping[str, str]
    half: bool


HUGGING_FACE = Naming(
    dict(q="q_proj", k="k_proj", v="v_proj", out="o_proj", gate="gate_proj", up="up_proj", down="down_proj"), half=True
)
MISTRAL = Naming(dict(q="wq", k="wk", v="wv", out="wo", gate="w1", up="w3", down="w2"), half=False)


def recognises(names: Mapping[str, tuple], config: dict) -> bool:
    """Whether there is one tower with a patch convolution and an RMS norm behind it."""
    prefix = vlm.prefix_of(names, "patch_conv.weight")
    return prefix is not None and f"{prefix}ln_pre.weight" in names


def read(tensors: Tensors) -> Weights:
    """Raises UserError for options that are not implemented, and where the number of heads is not known."""
    prefix = vlm.prefix_of(tensors.names, "patch_conv.weight")
    layer = f"{prefix}transformer.layers."
    naming = MISTRAL if f"{layer}0.attention.wq.weight" in tensors.names else HUGGING_FACE
    cfg = _config(tensors, prefix, naming)
    params = mapping.load(_rules(prefix, naming, cfg), tensors, navit.abstract(cfg)[1])
    vlm.ignore_outside(tensors, prefix)
    return Weights(cfg, params, source=f"{NAME}, {tensors.path}")


def _config(tensors: Tensors, prefix: str, naming: Naming) -> navit.NaViTConfig:
    said, options = _options(tensors, naming)
    width, channels, patch, across = vlm.shape_of(tensors, f"{prefix}patch_conv.weight", 4)
    vlm.require(tensors.path, "patch_size", (patch, across), (patch, patch))
    layer = f"{prefix}transformer.layers."
    mlp_dim, _ = vlm.shape_of(tensors, f"{layer}0.feed_forward.{naming.parts['gate']}.weight", 2)
    if naming is HUGGING_FACE:  # Mistral's own files know no other
        vlm.require(said, "hidden_act", options.get("hidden_act", "gelu"), "silu")
    return navit.NaViTConfig(
        width=width,
        depth=vlm.count_layers(tensors.names, layer),
        heads=_heads(options, width),
        mlp_dim=mlp_dim,
        patch_size=patch,
        channels=channels,
        norm="rms",
        norm_eps=NORM_EPS,
        mlp="swiglu",
        qk_norm=False,
        embed_norm="after",
        posemb="rope",
        rope_base=vlm.rope_base(said, options),
        rope_axes="alternate",
        pool="mean",
        norm_tokens=False,
        **hugging_face.normalisation(tensors, vlm.CLIP_MEAN, vlm.CLIP_STD),
    )


def _options(tensors: Tensors, naming: Naming) -> tuple[Any, dict]:
    """(the file that says them, for messages; the tower's options). Raises UserError where there are none."""
    file, part = ("params.json", "vision_encoder") if naming is MISTRAL else ("config.json", "vision_config")
    said = tensors.beside(file)
    options = said.get(part, said)
    if not options:
        raise UserError(
            f"{tensors.path}: sizes alone do not tell the heads of a {NAME}; put its {file} beside it, or one with "
            '{"num_attention_heads": 16, "hidden_act": "silu", "rope_theta": 10000.0} and your numbers'
        )
    return f"{file} of {tensors.path}", options


def _heads(options: dict, width: int) -> int:
    """Said, or from the size of a head, or what Hugging Face takes where neither is."""
    return options.get("num_attention_heads") or width // options.get("head_dim", width // 16)


def _rules(prefix: str, naming: Naming, cfg: navit.NaViTConfig) -> list[Rule]:
    layer, turn = f"{prefix}transformer.layers.{{i}}", orders.rope_pairs(cfg.head_dim, half=naming.half)
    rules = conv_patch("embed", f"{prefix}patch_conv", patch=cfg.patch_size, channels=cfg.channels, bias=False) + norm(
        "embed/norm_out", f"{prefix}ln_pre", bias=False
    )
    for ours, theirs in (("attn_norm", "attention_norm"), ("mlp_norm", "ffn_norm")):
        rules += norm(f"blocks/{ours}", f"{layer}.{theirs}", bias=False)
    for name in ("q", "k", "v", "out"):
        theirs, ins = f"{layer}.attention.{naming.parts[name]}", 2 if name == "out" else 1
        rules += linear(f"blocks/attn/{name}", theirs, ins=ins, bias=False, **(turn if name in "qk" else {}))
    for name in ("gate", "up", "down"):
        rules += linear(f"blocks/mlp/{name}", f"{layer}.feed_forward.{naming.parts[name]}", bias=False)
    return rules
