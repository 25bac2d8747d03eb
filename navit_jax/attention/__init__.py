"""Self-attention inside groups of tokens: one function, and the readable rule that picks its backend.

Callers pass groups, not a mask: a dense mask is L x L a row and hides which tokens lie together, which is what a faster
backend lives on. The backend is chosen, and what it needs to know of the groups is made, once a step, outside the
layers. A backend is a file with `unavailable(case)`, `prepare(ids_BL, capacity)` and `attend(q, k, v, ids_BL,
prepared)`.
"""

import functools
import importlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp

from input_pipeline.capacity import Capacity
from input_pipeline.errors import UserError
from navit_jax import sharding

KEPT = ("attended", "log_sum")  # what a backend names for its backward pass, where it is not a library's kernel
log = logging.getLogger(__name__)
PLANNED = ("slabs", "cudnn")  # those that need rows planned within a capacity
BACKENDS = ("dense", "slabs", "tiles", "splash", "flash", "cudnn")


@dataclass(frozen=True)
class Case:
    """What the rule decides on. rows: B on one device. contiguous: groups' tokens lie side by side."""

    platform: str  # cpu, gpu or tpu
    rows: int
    length: int
    head_dim: int
    dtype: jnp.dtype
    contiguous: bool
    capacity: Capacity | None


@partial(jax.tree_util.register_dataclass, data_fields=["ids_BL", "prepared"], meta_fields=["backend"])
@dataclass(frozen=True)
class Groups:
    """Which tokens see each other: those of a row with the same id; id 0 is padding.

    ids_BL: [B, L] int32. backend: that attends (static under jit). prepared: what it needs to know of the ids.
    """

    ids_BL: jax.Array
    prepared: Any
    backend: str


class Either(NamedTuple):
    """The groups where `first` is true, else the others; a scalar that is known when the step runs.

    So the blocks of a scan that see different things are one program, with one attention of each kind in it. Loops over
    runs of equal blocks need slices of the stacked weights: of 32 blocks and 676 M parameters over 4096 tokens, 853 MiB
    of temporaries forward instead of 238, and 13.1 GiB for a gradient instead of 7.8.
    """

    first: jax.Array
    groups: Groups
    others: Groups


def make_groups(
    ids_BL: jax.Array,
    *,
    contiguous: bool = True,
    capacity: Capacity | None = None,
    backend: str = "auto",
    head_dim: int = 64,
    dtype: jnp.dtype = jnp.float32,
) -> Groups:
    """Groups of a step's rows, made once and used by every layer.

    ids_BL: [B, L] integers, 0 = padding. contiguous: the tokens of a group lie side by side and ids ascend.
    capacity: what the rows were planned to hold. backend: 'auto' or a name. head_dim, dtype: of the queries.
    Raises UserError for a backend that is unknown or cannot do this.
    """
    rows = ids_BL.shape[0] // sharding.row_shards()
    case = Case(sharding.platform(), rows, ids_BL.shape[1], head_dim, jnp.dtype(dtype), contiguous, capacity)
    name, ids_BL = choose(backend, case), jnp.asarray(ids_BL, jnp.int32)
    return Groups(ids_BL, _backend(name).prepare(ids_BL, capacity), name)


def attend(q_BLNH: jax.Array, k_BLNH: jax.Array, v_BLNH: jax.Array, groups: Groups | Either) -> jax.Array:
    """Self-attention within groups; padding (id 0) attends to nothing and returns 0.

    q, k, v: [B, L, N, H], any one float dtype, logits scaled by 1/sqrt(H); logits and softmax are float32.
    Returns [B, L, N, H] in that dtype. Source: Dehghani et al. 2023 (NaViT), section 2.1.
    """
    if isinstance(groups, Either):
        one, other = (partial(attend, groups=each) for each in groups[1:])
        return jax.lax.cond(groups.first, one, other, q_BLNH, k_BLNH, v_BLNH)
    return _backend(groups.backend).attend(q_BLNH, k_BLNH, v_BLNH, groups.ids_BL, groups.prepared)


def kept(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: what libraries' kernels hand to their backward pass, which has no names."""
    return primitive.name == "pallas_call" or primitive.name.startswith("dot_product_attention_fwd")


def check(setting: str) -> None:
    """Raises UserError for a name that is neither 'auto' nor a backend."""
    if setting not in ("auto", *BACKENDS):
        known = ", ".join(["auto", *BACKENDS])
        raise UserError(f"unknown attention backend {setting!r}; there are {known}: set model.attention to one of them")


@functools.cache
def choose(setting: str, case: Case) -> str:
    """The backend that will run: the setting, or with 'auto' the first of the rule that can. Raises UserError."""
    check(setting)
    if setting != "auto":
        if reason := _backend(setting).unavailable(case):
            raise UserError(f"model.attention is {setting!r}, which cannot run here: {reason}. Set it to 'auto'.")
        return setting
    name = next(name for name in rule(case) if not _backend(name).unavailable(case))
    log.info("attention over rows of %d tokens on %s: %s", case.length, case.platform, name)
    return name


def rule(case: Case) -> tuple[str, ...]:
    """Backends in the order of preference; `dense` can always run. Only the CPU's order was timed, the others counted.

    On a CPU slabs pay where they hold fewer pairs of tokens than rows do; tiles from L=512 (`benchmarks.attention`).
    """
    long = case.length > 256
    slabs = ("slabs",) if case.capacity and case.capacity.pairs < case.capacity.rows * case.length**2 else ()
    if case.platform == "cpu":
        return (*slabs, "tiles", "dense") if long else (*slabs, "dense")
    if case.platform == "tpu":
        return ("splash", "flash", "dense") if case.length > 1024 else ("flash", "dense") if long else ("dense",)
    return ("cudnn", *slabs, "dense") if long else ("dense",)


def _backend(name: str) -> Any:
    return importlib.import_module(f"navit_jax.attention.{name}")
