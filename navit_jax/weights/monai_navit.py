"""NaViT of MONAI (monai.networks.nets.NaViT) for images, as safetensors of its `state_dict()`.

It follows vit-pytorch's, with three differences: norms have biases, attention divides its logits by sqrt(head size),
and queries, keys and values may have biases (qkv_bias). Its channels are "in_channels" in a config.json. Volumes
(spatial_dims=3) are refused: an image is a clip of one frame here, and their patches have a depth.
"""

from collections.abc import Mapping

from input_pipeline.errors import UserError
from navit_jax import navit
from navit_jax.weights import Weights, mapping, vit_pytorch
from navit_jax.weights.mapping import copy, linear, norm, zeros
from navit_jax.weights.reader import Tensors

NAME = "MONAI (NaViT)"
BLOCK = "blocks.{i}."


def recognises(names: Mapping[str, tuple], config: Mapping) -> bool:
    """Whether these are tensors of MONAI's NaViT."""
    return {"attn_pool_query", "pos_embed_axes.0", "blocks.0.attn.q_norm.gamma"} <= set(names)


def read(tensors: Tensors) -> Weights:
    """The model. Raises UserError for one of volumes."""
    axes = [name for name in tensors.names if name.startswith("pos_embed_axes.")]
    if len(axes) != 2:
        raise UserError(f"{tensors.path} is a NaViT with spatial_dims={len(axes)}; only 2, images, is implemented")
    hidden = tensors.names.get("blocks.0.mlp.linear1.weight", (0,))[0]
    gamma, rows = tensors.names["blocks.0.attn.q_norm.gamma"], max(tensors.names[name][0] for name in axes)
    cfg = vit_pytorch.config(tensors, BLOCK, gamma=gamma, hidden=hidden, rows=rows, channels_name="in_channels")
    biased = "blocks.0.attn.to_q.bias" in tensors.names
    made = vit_pytorch.ends(cfg, norm)
    made += [vit_pytorch.padded(f"posemb/{axis}", f"pos_embed_axes.{i}") for i, axis in enumerate("yx")]
    made += copy("pool/query", "attn_pool_query") + norm("norm", "norm")
    made += norm("blocks/attn_norm", f"{BLOCK}attn.norm") + norm("pool/norm", "attn_pool.norm")
    for ours, theirs in (("blocks/attn", f"{BLOCK}attn"), ("pool", "attn_pool")):
        for name in "qk":
            made += [vit_pytorch.head_norm(f"{ours}/{name}_norm", f"{theirs}.{name}_norm")]
        for name in "qkv":
            made += linear(f"{ours}/{name}", f"{theirs}.to_{name}", bias=biased)
            made += [] if biased else zeros(f"{ours}/{name}/bias")
        made += linear(f"{ours}/out", f"{theirs}.out_proj", ins=2, bias=False) + zeros(f"{ours}/out/bias")
    made += norm("blocks/mlp_norm", f"{BLOCK}norm")
    made += linear("blocks/mlp/up", f"{BLOCK}mlp.linear1") + linear("blocks/mlp/down", f"{BLOCK}mlp.linear2")
    return Weights(cfg, mapping.load(made, tensors, navit.abstract(cfg)[1]))
