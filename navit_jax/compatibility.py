"""Whether what a checkpoint holds fits what is here: parameters by name and shape, configuration field by field.

A run resumes only if it would go on bit-identically, so any field not known to be harmless is refused: a wrong refusal
costs a new folder, a wrong continuation costs the run. Fine-tuning forgives a head of another size, and takes the image
tower alone from a model of two towers to one of one, or back.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from input_pipeline.errors import UserError
from navit_jax.optim import name_of
from navit_jax.sharding import from_host

Tree = Any
# What can change without changing the training that follows: not a bit of it, or with `mesh` the order of sums only.
HARMLESS = {
    *("name", "log_every_steps", "eval_every_steps", "checkpoint_every_steps", "keep_checkpoints", "best_metric"),
    *("data.num_threads", "data.num_workers", "data.max_bad_share", "data.eval_source", "data.eval_split"),
    *("eval", "mesh"),
}
IMAGE = "image/"  # where a model of two towers keeps its image tower; elsewhere that is the top level
_ABSENT = "(absent)"


def init_from(params_new: Tree, params_old: Tree) -> tuple[Tree, list[str]]:
    """(parameters to start from, what to tell the user): old values with the new dtypes and shardings.

    A `head/` that differs (other classes, or none) stays new, a bias of the logits that only one has, too, and so does
    all but the image tower where one model has two towers and the other only that; all are mentioned. Raises UserError
    naming any other parameter that is missing, unexpected or of another shape, with both shapes.
    """
    new, old, notes = _shared_tower(named_leaves(params_new), named_leaves(params_old))
    for what, prefix in (("head", "head/"), ("bias of the logits", "logit_bias")):
        own_new, own_old = ({n: x for n, x in leaves.items() if n.startswith(prefix)} for leaves in (new, old))
        if differences(own_old, own_new, dtypes=False):
            was, now = (
                ", ".join(f"{n} {list(x.shape)}" for n, x in own.items()) or "none" for own in (own_old, own_new)
            )
            notes.append(f"The {what} starts anew: {was} in the checkpoint, {now} in this model.")
            new, old = ({n: x for n, x in leaves.items() if not n.startswith(prefix)} for leaves in (new, old))
    wrong = differences(old, new, dtypes=False)
    if wrong:
        raise UserError(
            f"The parameters to start from do not fit this model:\n{wrong}\n--config.model.like with the path that "
            "init_from has takes their architecture. Of a contrastive run use its config.text and config.contrastive."
        )

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        value = old.get(name_of(path))
        return leaf if value is None else from_host(np.asarray(value, leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(one, params_new), notes


def _shared_tower(new: dict, old: dict) -> tuple[dict, dict, list[str]]:
    """(leaves to fill, old leaves by their names here, notes): the image tower's only, if just one has two towers."""
    two_new, two_old = (any(name.startswith(IMAGE) for name in leaves) for leaves in (new, old))
    if two_new == two_old:
        return new, old, []
    if two_old:
        old = {name.removeprefix(IMAGE): x for name, x in old.items() if name.startswith(IMAGE)}
        return new, old, ["The checkpoint is of two towers: its image tower is taken, the rest left out."]
    new = {name: x for name, x in new.items() if name.startswith(IMAGE)}
    old = {IMAGE + name: x for name, x in old.items() if not name.startswith("head/")}
    note = "The checkpoint is of one tower: it becomes the image tower, without its head; all else starts anew."
    return new, old, [note]


def without_other_classes(
    params: Tree, classes_old: Sequence[str] | None, classes_new: Sequence[str] | None
) -> tuple[Tree, str]:
    """(parameters without a head that names other classes, what to tell the user); unknown names are no reason."""
    old, new = tuple(classes_old or ()), tuple(classes_new or ())
    if not old or not new or old == new or "head" not in params:
        return params, ""
    shown = [", ".join(names[:3]) + ", ..." * (len(names) > 3) for names in (old, new)]
    note = f"The head starts anew: its {len(old)} classes were {shown[0]}; here are {len(new)}, {shown[1]}."
    return {name: part for name, part in params.items() if name != "head"}, note


def other_tokenizer(meta_old: dict, data: dict) -> str:
    """What to tell the user where a checkpoint's text tower learned another tokenizer's ids; "" if it did not."""
    was, now = meta_old.get("data", {}).get("tokenizer"), data.get("tokenizer")
    if was is None or now is None or was == now:
        return ""
    return f"The checkpoint's texts had the tokenizer {was}, these have {now}: set that run's config.text.tokenizer."


def check_compatible(meta_old: dict, meta_new: dict) -> None:
    """Refuse to resume with a config or data that would not continue the run bit-identically.

    Compares `config` and `data` (the fingerprint) of both as JSON, field by field, but for the harmless fields.
    Raises UserError listing every difference as "field: was X, now Y".
    """
    lines = []
    for part, prefix in (("config", ""), ("data", "data fingerprint: ")):
        old, new = (dict(_fields(to_json(meta.get(part, {})))) for meta in (meta_old, meta_new))
        changed = [name for name in {**old, **new} if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
        lines += [
            f"  {prefix}{name or part}: was {_short(old.get(name, _ABSENT))}, now {_short(new.get(name, _ABSENT))}"
            for name in changed
            if part != "config" or not _is_harmless(name)
        ]
    if lines:
        raise UserError(
            "The checkpoint belongs to a run that these changes would not continue:\n" + "\n".join(lines) + "\n"
            "Use the earlier values, or start a new run in another --workdir (--config.init_from keeps the weights)."
        )


def to_json(value: Any) -> Any:
    """The value as JSON gives it back: tuples as lists, numpy as numbers, functions and paths by their name."""

    def default(x: Any) -> Any:
        if isinstance(x, (np.ndarray, np.generic)):
            return x.tolist()
        if callable(x):
            return f"{x.__module__}.{x.__qualname__}"
        if isinstance(x, os.PathLike):
            return os.fspath(x)
        raise TypeError(f"{type(x).__name__} cannot be kept in a checkpoint's meta: {x!r}")

    return json.loads(json.dumps(value, default=default))


def named_leaves(tree: Tree) -> dict[str, Any]:
    """The leaves by their path, such as `opt/0/mu/head/kernel`."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def nested(leaves: dict[str, Any]) -> dict:
    """Plain nested dicts from paths: tuples and classes become dicts, empty parts go."""
    out = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        inner = out
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return out


def differences(saved: dict, here: dict, dtypes: bool = True) -> str:
    """A line for each of the named arrays that the checkpoint and this run do not share, 12 at most; "" if none."""

    def size(leaf: jax.Array) -> str:
        return f"{leaf.dtype if dtypes else ''}[{', '.join(map(str, leaf.shape))}]"

    was, now = ({name: size(leaf) for name, leaf in leaves.items()} for leaves in (saved, here))
    lines = [f"  {name}: {now[name]} here, missing in the checkpoint" for name in now if name not in was]
    lines += [f"  {name}: {was[name]} in the checkpoint, missing here" for name in was if name not in now]
    both = [name for name in now if name in was and was[name] != now[name]]
    lines += [f"  {name}: {was[name]} in the checkpoint, {now[name]} here" for name in both]
    return "\n".join(lines[:12] + ([f"  and {len(lines) - 12} more"] if len(lines) > 12 else []))


def _fields(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for name, inner in value.items():
        yield from _fields(inner, f"{prefix}.{name}" if prefix else name)


def _is_harmless(field: str) -> bool:
    parts = field.split(".")
    return any(".".join(parts[: i + 1]) in HARMLESS for i in range(len(parts)))


def _short(value: Any) -> str:
    text = value if value == _ABSENT else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
