"""What the vision towers of language models share: where they lie in a whole model, and how they take pixels.

A tower comes alone or inside the file of its whole model, whose other tensors all lie outside of the tower's prefix and
stay unread.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from input_pipeline.errors import UserError
from navit_jax.weights.reader import Tensors

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pixels in [0, 1]: OpenAI CLIP's, with which these towers learned
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def prefix_of(names: Iterable[str], ending: str) -> str | None:
    """What stands before `ending` in the one name that ends so, '' for a tower alone; None where none or several do."""
    found = [name.removesuffix(ending) for name in names if f".{name}".endswith(f".{ending}")]
    return found[0] if len(found) == 1 else None


def ignore_outside(tensors: Tensors, prefix: str) -> None:
    """The rest of the whole model: the language model and what projects into it."""
    if prefix:
        tensors.ignore(f"(?!{re.escape(prefix)}).*")


def count_layers(names: Iterable[str], beginning: str) -> int:
    """Layers in names such as '{beginning}{i}.rest': the largest i, and one."""
    numbers = (name.removeprefix(beginning).partition(".")[0] for name in names if name.startswith(beginning))
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def shape_of(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor from which sizes are taken. Raises UserError if it is missing or has other axes."""
    tensors.check(name)
    if len(tensors.names[name]) != axes:
        raise UserError(f"{tensors.path}: {name} is {[*tensors.names[name]]}; expected {axes} axes")
    return tensors.names[name]


def require(where: Path, option: str, value: Any, *known: Any) -> None:
    """Raises UserError, by the option's name and value, where the value is not among those that are implemented."""
    if value not in known:
        raise UserError(f"{where}: {option} is {value!r}; what can be imported has {' or '.join(map(repr, known))}")


def rope_base(where: Path, config: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies in a vision config of the older or the newer form; 10000 where it says nothing."""
    rope = config.get("rope_parameters") or {}
    require(where, "rope_type", rope.get("rope_type", "axial"), "axial", "default")
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))
