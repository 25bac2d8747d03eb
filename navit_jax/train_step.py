"""One training step and one forward pass, as pure functions of plain dicts.

The model is split once into a static graph and a dict of arrays, and `jax.jit` stands outside: with flax's own jit 24
small layers took 101 ms a step, this way 17.6. State is {params, opt, step} and, where an average is kept, {ema}. Where
arrays lie is `sharding`'s matter; here the places are pinned, and XLA's partitioner writes the communication.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from input_pipeline.packed import Batch
from navit_jax import losses, navit, optim, sharding

State = dict[str, Any]


def init_state(params: dict, tx: optax.GradientTransformation, ema: bool) -> State:
    """Step 0. The average starts as the parameters."""
    state = dict(params=params, opt=tx.init(params), step=jnp.zeros((), jnp.int32))
    return state | (dict(ema=jax.tree.map(jnp.copy, params)) if ema else {})


def new_state(
    params: Callable[[], dict] | dict, tx: optax.GradientTransformation, ema: bool, shardings: State
) -> State:
    """`init_state` made where it will lie: no device ever holds more than its part.

    params: a function that makes them, run under jit, so each device computes its part of them; or arrays already in
    place, which are donated.
    """
    if callable(params):
        params = jax.jit(params, out_shardings=shardings["params"])()
    make = jax.jit(lambda p: init_state(p, tx, ema), out_shardings=shardings, donate_argnums=0)
    return make(params)


def make_train_step(
    graph: Any,
    tx: optax.GradientTransformation,
    loss: Callable,
    mesh: Mesh,
    shardings: State,
    *,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    seed: int = 0,
) -> Callable[[State, Batch, jax.Array], tuple[State, dict]]:
    """`step(state, batch, host) -> (state, metrics)`, jitted, donating the state.

    shardings: of the state, from `sharding.state_shardings`. host: [devices, n] float32, what the hosts want summed
    (`sharding.put_host`). The loss is the mean over the real images of the whole batch; with `accumulate`, rows are
    processed in that many parts whose sums are added before the one division, so it equals the undivided step; over
    several devices each part's gradients are summed over them, so parts cost communication as well as save memory.
    metrics: sums over the batch `loss`, `correct`, `images` and `tokens`, `host` [n], and `grad_norm`.
    """

    def sums(params: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
        logits_BKC, _ = navit.merge(graph, params)(batch.images, key=key)
        mask_BK = (batch.index >= 0) & (batch.labels.reshape(*batch.index.shape, -1).max(-1) >= 0)
        total, count = losses.masked_sum(loss(logits_BKC, batch.labels, mask_BK), mask_BK)
        correct, _ = losses.masked_sum(losses.correct_BK(logits_BKC, batch.labels), mask_BK)
        tokens = jnp.sum(batch.images.segment_ids > 0)
        return total, dict(loss=total, correct=correct, images=count, tokens=tokens)

    gradient = jax.grad(sums, has_aux=True)

    def step(state: State, batch: Batch, host: jax.Array) -> tuple[State, dict]:
        params = state["params"]
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        with sharding.under(mesh):
            if accumulate == 1:
                grads, metrics = gradient(params, batch, key)
            else:
                grads, metrics = _accumulate(gradient, params, batch, key, accumulate)
        grads = jax.tree.map(lambda g: g / jnp.maximum(metrics["images"], 1), grads)
        updates, opt = tx.update(grads, state["opt"], params)
        params = optax.apply_updates(params, updates)
        new = dict(params=params, opt=opt, step=state["step"] + 1)
        if ema_decay:
            new["ema"] = optim.ema_update(state["ema"], params, ema_decay)
        return new, metrics | dict(grad_norm=optax.tree.norm(grads), host=host.sum(axis=0))

    places = (shardings, sharding.rows(mesh), sharding.host_numbers(mesh))
    return jax.jit(step, donate_argnums=0, in_shardings=places, out_shardings=(shardings, sharding.replicated(mesh)))


def _accumulate(gradient: Callable, params: dict, batch: Batch, key: jax.Array, parts: int) -> tuple[dict, dict]:
    """Sums of gradients and metrics over `parts` equal slices of the rows, one at a time in memory.

    A part takes every `parts`-th row, so that each device finds its share of every part among its own rows.
    """
    slices = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total: tuple, part: tuple) -> tuple[tuple, None]:
        i, rows = part
        return jax.tree.map(jnp.add, total, gradient(params, rows, jax.random.fold_in(key, i))), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], slices), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (jnp.arange(parts), slices))[0]


def make_forward(graph: Any, mesh: Mesh, shardings: dict) -> Callable[[dict, Batch], tuple[jax.Array, jax.Array]]:
    """`forward(params, batch) -> (logits_BKC, pooled_BKD)`, jitted, without dropout; float32, whole in every process.

    shardings: of the parameters.
    """

    def forward(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with sharding.under(mesh):
            logits_BKC, extra = navit.merge(graph, params)(batch.images)
        return logits_BKC, extra["pooled"]

    return jax.jit(forward, in_shardings=(shardings, sharding.rows(mesh)), out_shardings=sharding.replicated(mesh))
