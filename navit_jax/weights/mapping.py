"""A foreign format as a list of rules between its tensors and our parameters, for import and export.

One list, read both ways, keeps them from drifting apart, and makes completeness a property of the list: `load` fills
every parameter exactly once, and what of the file no rule used is refused by `Tensors.finish`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from input_pipeline.errors import UserError
from navit_jax.compatibility import named_leaves, nested
from navit_jax.weights.reader import Tensors

Change = Callable[[np.ndarray], np.ndarray]


class Misfit(ValueError):
    """Raised by `Rule.load`: the tensor has not the shape that it must have; `load` adds the names."""


@dataclass(frozen=True)
class Rule:
    """One parameter of ours and the tensor, or tensors, that it comes from.

    ours: path such as blocks/attn/q/kernel. theirs: name or names; with {i}, one tensor a layer, stacked on our first
    axis. load: (*their arrays of one layer, shape=our shape of one layer) -> ours, raises Misfit (see `expect`). save:
    ours (one layer) -> theirs, as many as `theirs`; None: not exported. part: (number, of how many) equal parts of a
    fused tensor along its first axis: `load` is given and `save` returns that part.
    """

    ours: str
    theirs: str | tuple[str, ...]
    load: Callable[..., np.ndarray]
    save: Callable[[np.ndarray], Any] | None = None
    part: tuple[int, int] = (0, 1)

    def names(self, layer: int) -> tuple[str, ...]:
        """Their names in a layer."""
        theirs = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        return tuple(name.replace("{i}", str(layer)) for name in theirs)

    @property
    def layered(self) -> bool:
        return any("{i}" in name for name in self.names("{i}"))


def expect(x: np.ndarray, *shape: int) -> np.ndarray:
    """x, if it has this shape. Raises Misfit: a reshape alone would accept a transposed tensor."""
    if x.shape != shape:
        raise Misfit(f"expected {[*shape]}")
    return x


def load(rules: list[Rule], tensors: Tensors, shapes: dict) -> dict:
    """Nested parameters, float32: every leaf of `shapes` (`navit.abstract(cfg)[1]`) filled exactly once.

    Raises UserError that names the tensor which is missing or misshapen, ValueError where the rules themselves do not
    cover the model. Of dry tensors only names are checked, and all values are 0.
    """
    leaves = named_leaves(shapes)
    ours = [rule.ours for rule in rules]
    if sorted(ours) != sorted(leaves):
        missing, unknown = set(leaves) - set(ours), set(ours) - set(leaves)
        twice = {name for name in ours if ours.count(name) > 1}
        raise ValueError(
            f"rules do not cover the model: no rule for {missing}, no parameter for {unknown}, twice {twice}"
        )
    return nested({rule.ours: _load(rule, tensors, leaves[rule.ours].shape) for rule in rules})


def _load(rule: Rule, tensors: Tensors, shape: tuple[int, ...]) -> np.ndarray:
    if tensors.dry:
        for layer in range(shape[0] if rule.layered else 1):
            for name in rule.names(layer):
                tensors.check(name)
        return np.broadcast_to(np.float32(0), shape)
    if not rule.layered:
        return _one(rule, tensors, 0, shape)
    out = np.empty(shape, np.float32)  # filled in place: a list of layers would hold the model twice
    for layer in range(shape[0]):
        out[layer] = _one(rule, tensors, layer, shape[1:])
    return out


def _one(rule: Rule, tensors: Tensors, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    number, of = rule.part
    names = rule.names(layer)
    theirs = [tensors.take(name) for name in names]
    found = ", ".join(f"{name} is {[*x.shape]}" for name, x in zip(names, theirs))
    try:
        if of > 1:
            if any(x.ndim == 0 or x.shape[0] % of for x in theirs):
                raise Misfit(f"expected {of} equal parts")
            theirs = [np.split(x, of)[number] for x in theirs]
        value = rule.load(*theirs, shape=shape)
        if value.shape != shape:
            raise Misfit(f"expected what makes {rule.ours} {[*shape]}, it makes {[*value.shape]}")
    except ValueError as error:
        of_part = f" (part {number + 1} of {of})" if of > 1 else ""
        raise UserError(f"{tensors.path}: {found}{of_part}; {error} for {rule.ours} of this model") from error
    return np.asarray(value, np.float32, order="C")  # ascontiguousarray would make a vector of a scalar


def save(rules: list[Rule], params: dict) -> dict[str, np.ndarray]:
    """Their tensors by name, of every rule that has a way back; parts of a fused tensor are joined."""
    leaves, parts = named_leaves(params), {}
    for rule in rules:
        if rule.save is None:
            continue
        value = np.asarray(leaves[rule.ours])
        for layer in range(len(value) if rule.layered else 1):
            made = rule.save(value[layer] if rule.layered else value)
            for name, x in zip(rule.names(layer), (made,) if isinstance(rule.theirs, str) else made, strict=True):
                parts.setdefault(name, {})[rule.part[0]] = x
    joined = {n: p[0] if len(p) == 1 else np.concatenate([p[i] for i in sorted(p)]) for n, p in parts.items()}
    return {name: np.asarray(x, order="C") for name, x in joined.items()}


def copy(ours: str, theirs: str, *, then: Change | None = None, back: Change | None = None) -> list[Rule]:
    """The same array on both sides. then, back: applied to it on import and on export; `then` alone: no export."""
    return [Rule(ours, theirs, lambda x, shape: _apply(then, expect(x, *shape)), _back(lambda y: y, then, back))]


def linear(
    ours: str,
    theirs: str,
    *,
    ins: int = 1,
    bias: bool = True,
    part: tuple[int, int] = (0, 1),
    then: Change | None = None,
    back: Change | None = None,
) -> list[Rule]:
    """torch's Linear, `theirs`.weight [out, in] and .bias [out], to a kernel [*ins, *outs] and a bias [*outs].

    ins: how many axes of our kernel are inputs: 2 for attention's `out` [N, H, D]. bias: False where the model has none
    (`zeros` where only theirs lacks it). then, back: applied to kernel and bias in our shape on import, and on export,
    such as a permutation of the last axis, H; `then` alone: not exported.
    """

    def kernel(x: np.ndarray, shape: tuple) -> np.ndarray:
        flat = expect(x, int(np.prod(shape[ins:])), int(np.prod(shape[:ins])))
        return _apply(then, flat.T.reshape(shape))

    def weight(y: np.ndarray) -> np.ndarray:
        return y.reshape(int(np.prod(y.shape[:ins])), -1).T

    def vector(x: np.ndarray, shape: tuple) -> np.ndarray:
        return _apply(then, expect(x, int(np.prod(shape))).reshape(shape))

    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", kernel, _back(weight, then, back), part)]
    if bias:
        rules += [Rule(f"{ours}/bias", f"{theirs}.bias", vector, _back(lambda y: y.reshape(-1), then, back), part)]
    return rules


def qkv(
    ours: str, theirs: str, *, bias: bool = True, then: Change | None = None, back: Change | None = None
) -> list[Rule]:
    """A fused projection [3 D, D] to `ours`/q, k and v, each [D, N, H]; then, back: for q and k only (their rope)."""
    rules = []
    for number, name in enumerate("qkv"):
        turn = {} if name == "v" else dict(then=then, back=back)
        rules += linear(f"{ours}/{name}", theirs, bias=bias, part=(number, 3), **turn)
    return rules


def norm(
    ours: str, theirs: str, *, bias: bool = True, then: Change | None = None, back: Change | None = None
) -> list[Rule]:
    """torch's LayerNorm or RMSNorm: .weight to scale, .bias to bias."""
    rules = copy(f"{ours}/scale", f"{theirs}.weight", then=then, back=back)
    return rules + (copy(f"{ours}/bias", f"{theirs}.bias", then=then, back=back) if bias else [])


def conv_patch(ours: str, theirs: str, *, patch: int, channels: int = 3, bias: bool = True) -> list[Rule]:
    """torch's Conv2d of stride p, .weight [D, C, p, p], to a kernel [p * p * C, D] in (row, column, channel) order."""

    def kernel(x: np.ndarray, shape: tuple) -> np.ndarray:
        return expect(x, shape[1], channels, patch, patch).transpose(2, 3, 1, 0).reshape(shape)

    def weight(y: np.ndarray) -> np.ndarray:
        return y.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)

    rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", kernel, weight)]
    return rules + (copy(f"{ours}/bias", f"{theirs}.bias") if bias else [])


def zeros(ours: str) -> list[Rule]:
    """A parameter that the foreign model lacks and that is 0 there, such as one of its biases."""
    return constant(ours, 0.0)


def constant(ours: str, value: float) -> list[Rule]:
    """A parameter that the foreign model lacks and that has this value there; not exported."""
    return [Rule(ours, (), lambda shape: np.full(shape, value, np.float32))]


def _apply(change: Change | None, x: np.ndarray) -> np.ndarray:
    return x if change is None else change(x)


def _back(weight: Change, then: Change | None, back: Change | None) -> Change | None:
    return None if then and not back else lambda y: weight(_apply(back, y))
