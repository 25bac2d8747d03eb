"""big_vision's .npz: two towers with NaFlex or a plain ViT, and a plain ViT alone, back to those of the first paper.

Arrays lie flat under their flax paths, and most have our shapes already. Images are in [-1, 1], what we do by default.
A plain ViT knows one size; here its positions are resized as NaFlex's are, which leaves them as they were at that size.
What no array tells is told by a config.json beside the file: "tokenizer", a path, and "pad", the id that texts were
filled up with; without it pad is 0 for Gemma's vocabulary, SigLIP 2's, and 1, the end of a text, for others.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np

from input_pipeline.errors import UserError
from navit_jax import contrastive, navit, text_tower
from navit_jax.weights import Weights
from navit_jax.weights.mapping import Rule, copy, expect, load
from navit_jax.weights.reader import Tensors
from navit_jax.weights.siglip_names import SCALES

NAME = "big_vision (.npz: NaFlex or plain ViT, with or without a text tower)"
GEMMA = 256_000  # tokens
FIRST_PAPER = dict(attn="MultiHeadDotProductAttention_1", mlp_norm="LayerNorm_2", mlp="MlpBlock_3")  # and AugReg
PARTS = dict(attn="MultiHeadDotProductAttention_0", mlp_norm="LayerNorm_1", mlp="MlpBlock_0")
SINCOS_SIDE = 128  # patches a side, as far as a table of fixed positions is written out


def recognises(names: Mapping[str, tuple], config: dict) -> bool:
    """Whether these are flax paths of big_vision's encoder."""
    return any(re.fullmatch(r"(params/)?((img|txt)/)?(Transformer|Encoder_0)/encoder_norm/scale", n) for n in names)


def read(tensors: Tensors) -> Weights:
    """One tower or two, by the names. Raises UserError for positions that are no square grid."""
    root = "params/" if any(name.startswith("params/") for name in tensors.names) else ""
    if root:
        tensors.ignore(r"(opt|chrono)/.*")  # of a training state
    tensors.ignore(r".*MAPHead_0/MultiHeadDotProductAttention_0/key/bias")  # the softmax cancels it
    towers = [tower for tower in ("img", "txt") if any(name.startswith(f"{root}{tower}/") for name in tensors.names)]
    if len(towers) == 1:
        raise UserError(f"{tensors.path} holds {towers[0]}/ alone; expected img/ and txt/, or a ViT without a prefix")
    if not towers:
        cfg, rules = _image(tensors, root, "")
        head = f"{root}head/kernel"
        cfg["num_classes"] = tensors.names[head][-1] if head in tensors.names else 0
        rules += _dense("head", f"{root}head") if cfg["num_classes"] else []
        cfg = navit.NaViTConfig(**cfg)
        return Weights(cfg, load(rules, tensors, navit.abstract(cfg)[1]), (), "", f"big_vision's {tensors.path}")
    return _two_towers(tensors, root)


def _two_towers(tensors: Tensors, root: str) -> Weights:
    names, tokenizer = tensors.names, str(tensors.config.get("tokenizer", ""))
    image, rules = _image(tensors, f"{root}img/", "image/")
    text, more = _text(tensors, f"{root}txt/")
    projected, biased = f"{root}img/head/kernel" in names, f"{root}b" in names
    rules += more + _dense("text_projection", f"{root}txt/head")
    rules += _dense("image_projection", f"{root}img/head") if projected else []
    rules += _scalar("logit_scale", f"{root}t") + (_scalar("logit_bias", f"{root}b") if biased else [])
    tensors.check(f"{root}txt/head/kernel")
    cfg = contrastive.TwoTowersConfig(
        image=navit.NaViTConfig(**image),
        text=text,
        embed_dim=names[f"{root}txt/head/kernel"][-1],
        project_image=projected,
        project_bias=True,
        **SCALES | ({} if biased else dict(init_bias=None)),
    )
    params = load(rules, tensors, contrastive.abstract(cfg)[1])
    return Weights(cfg, params, (), tokenizer, f"big_vision's {tensors.path}")


def _image(tensors: Tensors, theirs: str, ours: str) -> tuple[dict, list[Rule]]:
    """Fields of an image tower without its head, and the rules for it."""
    names = tensors.names
    cfg, rules = _encoder(tensors, f"{theirs}Transformer", ours)
    embedding = f"{theirs}embedding/kernel"
    tensors.check(embedding)
    *patch, _ = names[embedding]  # [p, p, C], or [p * p * C] of NaFlex
    cfg["channels"] = patch[2] if len(patch) == 3 else 3
    cfg["patch_size"] = patch[0] if len(patch) == 3 else round((patch[0] / 3) ** 0.5)
    rules += [Rule(f"{ours}embed/kernel", embedding, lambda x, shape: expect(x, *patch, shape[1]).reshape(shape))]
    rules += copy(f"{ours}embed/bias", f"{theirs}embedding/bias")
    norms = [n for n in ("pre", "post") if f"{theirs}patchln_{n}/scale" in names]
    if norms == ["pre"]:
        raise UserError(
            f"{tensors.path}: patchln_pre without patchln_post is not implemented; both, or the latter, are"
        )
    cfg["embed_norm"] = ("none", "after", "both")[len(norms)]
    for name, norm in (("pre", "norm_in"), ("post", "norm_out")):
        rules += _norm(f"{ours}embed/{norm}", f"{theirs}patchln_{name}") if name in norms else []
    positions, more = _positions(tensors, theirs, ours)
    cfg["pool"] = "map" if f"{theirs}MAPHead_0/probe" in names else "first" if positions["registers"] else "mean"
    rules += more + (_map(f"{ours}pool", f"{theirs}MAPHead_0") if cfg["pool"] == "map" else [])
    if f"{theirs}pre_logits/kernel" in names and not ours:
        cfg["pre_logits"] = names[f"{theirs}pre_logits/kernel"][-1]
        rules += _dense("pre_logits", f"{theirs}pre_logits")
    return cfg | positions, rules


def _positions(tensors: Tensors, theirs: str, ours: str) -> tuple[dict, list[Rule]]:
    """Fields and rules of the position embedding and the class token, which earlier files keep in one table."""
    names, cls = tensors.names, f"{theirs}cls"
    registers = int(cls in names)
    places = ("", "Transformer/", "Transformer/posembed_input/")  # it has moved twice
    theirs = next((n for place in places if (n := f"{theirs}{place}pos_embedding") in names), "")
    if not theirs:  # fixed ones have no array
        rules = [Rule(f"{ours}posemb/{axis}", (), _sincos(axis)) for axis in "yx"]
        cfg = dict(posemb="learned", posemb_max=SINCOS_SIDE)
        return cfg | dict(registers=registers), rules + _class_token(ours, cls, registers)
    *lead, width = names[theirs]
    cells = int(np.prod(lead))
    side = int(cells**0.5)
    own = int(len(lead) == 2 and lead[0] == 1 and cells == side**2 + 1)  # a row for the class token, also without one
    if lead not in ([side, side], [1, side**2 + own]):
        raise UserError(
            f"{tensors.path}: {theirs} is {[*lead, width]}; expected [1, n, D] of a square grid, or [n, n, D]"
        )
    table = Rule(f"{ours}posemb/table", theirs, lambda x, shape: x.reshape(-1, width)[own:].reshape(shape))
    rules = _class_token(ours, (cls, theirs) if own else cls, registers)
    return dict(posemb="table", posemb_grid=(side, side), registers=registers), [table, *rules]


def _class_token(ours: str, theirs: str | tuple[str, str], registers: int) -> list[Rule]:
    """[1, 1, D], and where its position is the first row of the table, that added."""

    def token(x: np.ndarray, table: np.ndarray | None = None, *, shape: tuple) -> np.ndarray:
        x = expect(x, 1, *shape)[0]
        return x if table is None else x + table[0, :1]

    return [Rule(f"{ours}registers", theirs, token)] if registers else []


def _sincos(axis: str) -> Callable:
    """The part of MoCo v3's fixed positions that an axis makes: sin x, cos x, sin y, cos y, a quarter each."""

    def table(shape: tuple[int, int]) -> np.ndarray:
        rows, quarter = shape[0], shape[1] // 4
        angles = np.arange(rows)[:, None] / 10_000.0 ** (np.arange(quarter) / (quarter - 1))
        own, other = np.concatenate([np.sin(angles), np.cos(angles)], axis=1), np.zeros((rows, 2 * quarter))
        return np.concatenate([own, other] if axis == "x" else [other, own], axis=1)

    return table


def _text(tensors: Tensors, theirs: str) -> tuple[text_tower.TextConfig, list[Rule]]:
    fields, rules = _encoder(tensors, f"{theirs}Encoder_0", "text/")
    tensors.check(f"{theirs}Embed_0/embedding")
    vocabulary, pooled = tensors.names[f"{theirs}Embed_0/embedding"][0], f"{theirs}MAPHead_0/probe" in tensors.names
    cfg = text_tower.TextConfig(
        **fields,
        vocab_size=vocabulary,
        max_tokens=tensors.names[f"{theirs}pos_embedding"][1],
        pool="map" if pooled else "last",
        pad=tensors.config.get("pad", 0 if vocabulary == GEMMA else 1),
    )
    rules += copy("text/table", f"{theirs}Embed_0/embedding")
    rules += [Rule("text/positions", f"{theirs}pos_embedding", lambda x, shape: expect(x, 1, *shape)[0])]
    return cfg, rules + (_map("text/pool", f"{theirs}MAPHead_0") if pooled else [])


def _encoder(tensors: Tensors, theirs: str, ours: str) -> tuple[dict, list[Rule]]:
    """Fields and rules of the blocks and of the norm behind them; a scanned encoder has stacked its layers as we do."""
    names = tensors.names
    numbers = {int(m[1]) for n in names if (m := re.match(rf"{re.escape(theirs)}/encoderblock_(\d+)/", n))}
    layer, first = (
        f"{theirs}/encoderblock" + ("_{i}" if numbers else ""),
        f"{theirs}/encoderblock" + "_0" * bool(numbers),
    )
    parts = FIRST_PAPER if f"{first}/{FIRST_PAPER['mlp']}/Dense_0/kernel" in names else PARTS
    query, up = f"{first}/{parts['attn']}/query/kernel", f"{first}/{parts['mlp']}/Dense_0/kernel"
    tensors.check(query)
    tensors.check(up)
    width, heads, head = names[query][-3:]
    cfg = dict(width=width, depth=len(numbers) or names[query][0], heads=heads, mlp_dim=names[up][-1])
    cfg |= dict(head_size=0 if heads * head == width else head, qk_norm=False, bias=True)
    rules = _norm(f"{ours}blocks/attn_norm", f"{layer}/LayerNorm_0")
    rules += _norm(f"{ours}blocks/mlp_norm", f"{layer}/{parts['mlp_norm']}")
    rules += _attention(f"{ours}blocks/attn", f"{layer}/{parts['attn']}") + _mlp(
        f"{ours}blocks/mlp", f"{layer}/{parts['mlp']}"
    )
    return cfg, rules + _norm(f"{ours}norm", f"{theirs}/encoder_norm")


def _attention(ours: str, theirs: str, key_bias: bool = True) -> list[Rule]:
    names = dict(q="query", k="key", v="value", out="out")
    rules = [rule for name, path in names.items() for rule in _dense(f"{ours}/{name}", f"{theirs}/{path}")]
    return [rule for rule in rules if key_bias or rule.ours != f"{ours}/k/bias"]


def _mlp(ours: str, theirs: str) -> list[Rule]:
    return _dense(f"{ours}/up", f"{theirs}/Dense_0") + _dense(f"{ours}/down", f"{theirs}/Dense_1")


def _map(ours: str, theirs: str) -> list[Rule]:
    probe = Rule(f"{ours}/probe", f"{theirs}/probe", lambda x, shape: expect(x, 1, *shape)[0])
    attention = _attention(ours, f"{theirs}/MultiHeadDotProductAttention_0", key_bias=False)
    return [
        probe,
        *attention,
        *_norm(f"{ours}/norm", f"{theirs}/LayerNorm_0"),
        *_mlp(f"{ours}/mlp", f"{theirs}/MlpBlock_0"),
    ]


def _dense(ours: str, theirs: str) -> list[Rule]:
    return copy(f"{ours}/kernel", f"{theirs}/kernel") + copy(f"{ours}/bias", f"{theirs}/bias")


def _norm(ours: str, theirs: str) -> list[Rule]:
    return copy(f"{ours}/scale", f"{theirs}/scale") + copy(f"{ours}/bias", f"{theirs}/bias")


def _scalar(ours: str, theirs: str) -> list[Rule]:
    """[1] of one learned number, [] in some versions."""
    return [Rule(ours, theirs, lambda x, shape: x.reshape(shape))]
