"""Rules over parameter paths: a regular expression and a value, the first that matches decides.

A rule's value reaches single layers of the stacked `blocks` (first axis: layer), so layer-wise learning rates and
freezing need no parameter of their own.
"""

import difflib
import re
from collections.abc import Iterable
from numbers import Real
from typing import Any

import jax
import numpy as np

from input_pipeline.errors import UserError

Params = Any  # a nested dict of arrays
Value = float | np.ndarray  # of one parameter: a number, or [depth, 1, ...] for stacked layers
INPUTS = ("embed", "posemb", "registers", "entry_norm", "table", "positions")  # what the first block reads


def name_of(path: tuple) -> str:
    """A key path of jax as rules see it, such as `blocks/mlp/up/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def paths(params: Params) -> set[str]:
    """All parameters as rules see them."""
    return {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}


def rule_values(name: str, rules: Iterable[tuple[str, Any]], params: Params, default: float) -> dict[str, Value]:
    """The value of every parameter path under the first rule whose regular expression is found in it.

    name: of the field of `config.optim`, for messages. A value is a number, a tuple with a number a layer, or a
    callable (layer, depth) -> number. Raises UserError for a rule that decides no parameter, naming the nearest paths,
    and for values by layer that do not fit.
    """
    rules = list(rules)
    if any(isinstance(rule, str) or len(rule) != 2 for rule in rules):
        raise UserError(f"optim.{name} is {rules}; expected (regular expression, value) pairs: (('^head/', 0.1),).")
    leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    values, left = dict.fromkeys(leaves, default), set(leaves)
    for regex, value in rules:
        try:
            matches = [path for path in leaves if re.search(regex, path)]
        except re.error as error:
            raise UserError(f"optim.{name}: {regex!r} is not a regular expression: {error}.") from error
        if not left.intersection(matches):
            raise UserError(f"optim.{name}: the rule {regex!r} {_why_unused(regex, matches, list(leaves))}")
        for path in left.intersection(matches):
            values[path] = _by_layer(f"optim.{name}: the rule {regex!r}", value, path, leaves[path].shape)
        left.difference_update(matches)
    return values


def layer_scales(decay: float, params: Params) -> dict[str, Value]:
    """Layer-wise learning rates: the factor of every path, `decay` to the power of how far it is from the head.

    Of n blocks, block i has the power n - i, what the first one reads (patch embedding, positions, registers, token
    table) n + 1, and all behind the last one 0; each of two towers counts its own. Source: Bao et al. 2022 (BEiT).
    """
    shapes = {name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    depths = {path.partition("blocks/")[0]: shape[0] for path, shape in shapes.items() if is_stacked(path)}

    def one(path: str) -> Value:
        tower = max((tower for tower in depths if path.startswith(tower)), key=len, default=None)
        first = path.removeprefix(tower or "").partition("/")[0]
        if decay == 1 or tower is None or first not in ("blocks", *INPUTS):
            return 1.0
        power = (lambda layer, depth: decay ** (depth - layer)) if first == "blocks" else decay ** (depths[tower] + 1)
        return _by_layer("optim.layer_decay:", power, path, shapes[path])

    return {path: one(path) for path in shapes}


def _why_unused(regex: str, matches: list[str], paths: list[str]) -> str:
    if matches:
        return f"decides nothing: earlier rules take all it matches ({', '.join(matches[:3])}). Put it before them."
    plain = re.sub(r"[\^$.*+?()\[\]{}|\\]", "", regex)
    nearest = difflib.get_close_matches(plain, paths, n=3, cutoff=0.0)
    return f"matches no parameter. Nearest: {', '.join(nearest)}. Correct it or remove it."


def _by_layer(rule: str, value: Any, path: str, shape: tuple[int, ...]) -> Value:
    """A number, or numbers of the layers shaped to broadcast over the stacked parameter."""
    if isinstance(value, Real):
        return float(value)
    if not is_stacked(path):
        raise UserError(f"{rule} has a value for each layer, but {path} has no layers: give it a number of its own.")
    depth = shape[0]
    numbers = [value(layer, depth) for layer in range(depth)] if callable(value) else list(value)
    if len(numbers) != depth:
        raise UserError(f"{rule} has {len(numbers)} values, but {path} has {depth} layers: give one a layer.")
    return np.asarray(numbers, np.float32).reshape(depth, *[1] * (len(shape) - 1))


def is_stacked(path: str) -> bool:
    """Whether the first axis of this parameter is the layer."""
    return "blocks" in path.split("/")
