"""The tensors of timm's vision transformers and our parameters, one list of rules for import and export."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from navit_jax.navit import NaViTConfig
from navit_jax.weights import orders
from navit_jax.weights.mapping import Change, Rule, conv_patch, copy, expect, linear, norm, qkv, zeros

BLOCK = "blocks.{i}."
OPTIONAL = {  # biases that timm leaves out under an option
    **{f"{BLOCK}attn.{name}.bias": "qkv_bias" for name in ("qkv", "q_proj", "k_proj", "v_proj")},
    **{f"{BLOCK}{name}.bias": "proj_bias" for name in ("attn.proj", "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")},
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a file lays out what we keep in one way; as NaFlexVit does by default, and as we write it.

    flexible: NaFlexVit. conv: patches by a convolution. channels_first: else, flat patches in (channel, row, column)
    order. attention: 'fused', 'split' or 'eva' (no bias for keys). gamma: names of EvaBlock's layer scale. gate:
    'packed' with the MLP's first map or 'split' from it, where there is one. class_token, registers: how many. places:
    how many of those have a row in the table of positions. turn: `then` and `back` for queries and keys under rope.
    lacks: biases that the file is without.
    """

    flexible: bool = True
    conv: bool = False
    channels_first: bool = False
    attention: str = "fused"
    gamma: bool = False
    gate: str = "packed"
    class_token: int = 0
    registers: int = 0
    places: int = 0
    turn: Mapping[str, Change] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()

    @property
    def tokens(self) -> str:
        """What the names of positions and registers start with."""
        return "embeds." if self.flexible else ""


def rules(cfg: NaViTConfig, form: Form) -> list[Rule]:
    """Between a model of ours, bias=True, and a file of this form."""
    made = [*_embed(cfg, form), *_positions(cfg, form), *_blocks(cfg, form), *_top(cfg)]
    return [zeros(rule.ours)[0] if rule.theirs in form.lacks else rule for rule in made]


def _norm(cfg: NaViTConfig, ours: str, theirs: str, **turn: Change) -> list[Rule]:
    return norm(ours, theirs, bias=cfg.norm == "layer", **turn)


def _embed(cfg: NaViTConfig, form: Form) -> list[Rule]:
    theirs = "embeds" if form.flexible else "patch_embed"
    if form.conv:
        made = conv_patch("embed", f"{theirs}.proj", patch=cfg.patch_size, channels=cfg.channels)
    else:
        order = orders.channels_last(cfg.patch_size, cfg.channels) if form.channels_first else {}
        made = linear("embed", f"{theirs}.proj", bias=False, **order) + copy("embed/bias", f"{theirs}.proj.bias")
    made += _norm(cfg, "embed/norm_out", f"{theirs}.norm") if cfg.embed_norm == "after" else []
    return made + (_norm(cfg, "entry_norm", "norm_pre") if cfg.embed_norm == "entry" else [])


def _positions(cfg: NaViTConfig, form: Form) -> list[Rule]:
    start = form.tokens
    made = [_registers(form)] if cfg.registers else []
    if cfg.posemb == "learned":
        return made + [_unsqueezed(f"posemb/{a}", f"{start}pos_embed_{a}") for a in "yx"]
    if cfg.posemb != "table":
        return made
    if form.flexible:
        return made + [_unsqueezed("posemb/table", f"{start}pos_embed")]

    def load(x: np.ndarray, shape: tuple) -> np.ndarray:
        return expect(x, 1, form.places + shape[0] * shape[1], shape[2])[0, form.places :].reshape(shape)

    return [*made, Rule("posemb/table", f"{start}pos_embed", load)]


def _registers(form: Form) -> Rule:
    """The class token, then registers, each with its position where it has one: it is added to it in every image."""
    parts = {"cls_token": form.class_token, "reg_token": form.registers}
    names = tuple(form.tokens + name for name, number in parts.items() if number)

    def load(*theirs: np.ndarray, shape: tuple) -> np.ndarray:
        tokens = np.concatenate([expect(x, 1, n, shape[1])[0] for x, n in zip(theirs, filter(None, parts.values()))])
        return tokens + theirs[-1][0, : form.places] if form.places else tokens

    def save(y: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(x[None] for x in np.split(y, [form.class_token]) if len(x))

    if form.places:
        return Rule("registers", (*names, f"{form.tokens}pos_embed"), load)
    return Rule("registers", names, load, save)


def _unsqueezed(ours: str, theirs: str) -> Rule:
    """An array with a first axis of 1 there."""
    return Rule(ours, theirs, lambda x, shape: expect(x, 1, *shape)[0], lambda y: y[None])


def _blocks(cfg: NaViTConfig, form: Form) -> list[Rule]:
    made = _norm(cfg, "blocks/attn_norm", f"{BLOCK}norm1") + _norm(cfg, "blocks/mlp_norm", f"{BLOCK}norm2")
    made += _attention(form)
    if cfg.qk_norm:
        made += [r for x in "qk" for r in _norm(cfg, f"blocks/attn/{x}_norm", f"{BLOCK}attn.{x}_norm", **form.turn)]
    made += linear("blocks/attn/out", f"{BLOCK}attn.proj", ins=2)
    if cfg.layer_scale:
        names = ("gamma_1", "gamma_2") if form.gamma else ("ls1.gamma", "ls2.gamma")
        made += copy("blocks/attn_scale", BLOCK + names[0]) + copy("blocks/mlp_scale", BLOCK + names[1])
    if cfg.mlp != "swiglu":
        made += linear("blocks/mlp/up", f"{BLOCK}mlp.fc1")
    elif form.gate == "packed":
        made += linear("blocks/mlp/gate", f"{BLOCK}mlp.fc1", part=(0, 2))
        made += linear("blocks/mlp/up", f"{BLOCK}mlp.fc1", part=(1, 2))
    else:
        made += linear("blocks/mlp/gate", f"{BLOCK}mlp.fc1_g") + linear("blocks/mlp/up", f"{BLOCK}mlp.fc1_x")
    return made + linear("blocks/mlp/down", f"{BLOCK}mlp.fc2")


def _attention(form: Form) -> list[Rule]:
    turns = {"q": form.turn, "k": form.turn, "v": {}}
    if form.attention == "fused":
        return qkv("blocks/attn", f"{BLOCK}attn.qkv", **form.turn)
    if form.attention == "split":
        return [r for x in "qkv" for r in linear(f"blocks/attn/{x}", f"{BLOCK}attn.{x}_proj", **turns[x])]
    made = qkv("blocks/attn", f"{BLOCK}attn.qkv", bias=False, **form.turn) + zeros("blocks/attn/k/bias")
    return made + [_heads(f"blocks/attn/{x}/bias", f"{BLOCK}attn.{x}_bias", turns[x]) for x in "qv"]


def _heads(ours: str, theirs: str, turn: Mapping[str, Change]) -> Rule:
    """A flat vector over heads and their numbers; one way, we write no such file."""

    def load(x: np.ndarray, shape: tuple) -> np.ndarray:
        value = expect(x, int(np.prod(shape))).reshape(shape)
        return turn["then"](value) if turn else value

    return Rule(ours, theirs, load)


def _top(cfg: NaViTConfig) -> list[Rule]:
    made = _norm(cfg, "norm", "norm") if cfg.norm_tokens else []
    made += _norm(cfg, "pool_norm", "fc_norm") if cfg.norm_pooled else []
    made += linear("head", "head") if cfg.num_classes else []
    if cfg.pool != "map":
        return made

    def values_bias(x: np.ndarray, shape: tuple) -> np.ndarray:
        return expect(x, 2 * int(np.prod(shape))).reshape(2, *shape)[1]  # that of the keys cancels in the softmax

    made += [_unsqueezed("pool/probe", "attn_pool.latent"), *linear("pool/q", "attn_pool.q")]
    made += linear("pool/k", "attn_pool.kv", bias=False, part=(0, 2))
    made += linear("pool/v", "attn_pool.kv", bias=False, part=(1, 2))
    made += [Rule("pool/v/bias", "attn_pool.kv.bias", values_bias, lambda y: np.stack([0 * y, y]).reshape(-1))]
    made += linear("pool/out", "attn_pool.proj", ins=2) + _norm(cfg, "pool/norm", "attn_pool.norm")
    return made + linear("pool/mlp/up", "attn_pool.mlp.fc1") + linear("pool/mlp/down", "attn_pool.mlp.fc2")
