"""What folders of Hugging Face's transformers have in common: activations, the pixels' mean, class names, a tokenizer.

A saved config lists only what differs from the defaults of its class in some versions of transformers, so whoever reads
one must know those defaults.
"""

from typing import Any

from input_pipeline.errors import UserError
from navit_jax.weights.reader import Tensors, folder_of, read_json

ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}  # theirs: ours
SIGLIP = "spiece.model"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", SIGLIP, "tokenizer.model")


def activation(config: dict, where: str) -> str:
    """`NaViTConfig.mlp` of a config's hidden_act. Raises UserError for one that is not implemented."""
    name = config["hidden_act"]
    if name not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {name!r}; implemented are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def patch_size(config: dict, where: str) -> int:
    """The side of a patch. Raises UserError for one that is not square."""
    size = config["patch_size"]
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) > 1:
        raise UserError(f"{where}: patch_size is {size}; expected a square patch")
    return int(sides.pop())


def normalisation(tensors: Tensors, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
    """Fields mean and std by the processor's file beside the weights, or those given; a number if all equal.

    Raises UserError for a processor that does not bring bytes to [0, 1].
    """
    said = [_processor(tensors, name) for name in PROCESSORS]
    config = next((x for x in said if {"image_mean", "do_normalize"} & set(x)), {})
    found = dict(mean=config.get("image_mean") or mean, std=config.get("image_std") or std)
    if config.get("do_normalize") is False:
        found = dict(mean=(0.0,), std=(1.0,))
    factor = (config.get("rescale_factor") or 1 / 255) if config.get("do_rescale", True) else 1.0
    if abs(factor * 255 - 1) > 1e-3:
        raise UserError(f"{tensors.path}: the image processor multiplies pixels by {factor:g}; implemented is 1/255")
    return {k: tuple(map(float, x if len(set(x)) > 1 else x[:1])) for k, x in found.items()}


def _processor(tensors: Tensors, name: str) -> dict:
    said = tensors.beside(name)
    return said.get("image_processor", said)  # of transformers 5, which writes one file for texts and images


def classes(config: dict) -> tuple[str, ...]:
    """Names in the order of the head's outputs; () where the config has none."""
    names = config.get("id2label") or {}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def tokenizer(tensors: Tensors) -> str:
    """Path of the tokenizer's file beside the weights, "" where there is none.

    SigLIP's own is its SentencePiece model: what people converted to a tokenizer.json may keep the punctuation.
    """
    own = tensors.beside("tokenizer_config.json").get("tokenizer_class") == "SiglipTokenizer"
    found = [folder_of(tensors.path) / name for name in sorted(TOKENIZERS, key=lambda name: own and name != SIGLIP)]
    return next((str(path) for path in found if path.exists()), "")


def pad_id(tensors: Tensors) -> int | None:
    """The id of the tokenizer's own padding token; None where its files are not there or do not say."""
    settings = tensors.beside("tokenizer_config.json")
    name = _content(settings.get("pad_token"))
    if name is None:
        return None
    added = {_content(token): int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    if name in added:
        return added[name]
    model = read_json(folder_of(tensors.path) / "tokenizer.json")
    added = {token["content"]: token["id"] for token in model.get("added_tokens", [])}
    return added.get(name)


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
