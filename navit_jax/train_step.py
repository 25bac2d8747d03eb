"""One training step and one forward pass of any objective, as pure functions of plain dicts.

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
from navit_jax import optim, sharding
from navit_jax.objectives import Gradient

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
    gradient: Gradient,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    shardings: State,
    *,
    limit: Callable[[dict], dict] = lambda params: params,
    ema_decay: float = 0.0,
    seed: int = 0,
) -> Callable[[State, Batch, jax.Array], tuple[State, dict]]:
    """`step(state, batch, host) -> (state, metrics)`, jitted, donating the state.

    gradient: sums over the step's examples (`objectives`), divided here by the number of them. shardings: of the state,
    from `sharding.state_shardings`. host: [devices, n] float32, what the hosts want summed (`sharding.put_host`).
    limit: applied to the new parameters. metrics: the gradient's, `host` [n], and `grad_norm`.
    """

    def step(state: State, batch: Batch, host: jax.Array) -> tuple[State, dict]:
        params = state["params"]
        with sharding.under(mesh):
            grads, metrics = gradient(params, batch, jax.random.fold_in(jax.random.key(seed), state["step"]))
        grads = jax.tree.map(lambda g: g / jnp.maximum(metrics["images"], 1), grads)
        updates, opt = tx.update(grads, state["opt"], params)
        params = limit(optax.apply_updates(params, updates))
        new = dict(params=params, opt=opt, step=state["step"] + 1)
        if ema_decay:
            new["ema"] = optim.ema_update(state["ema"], params, ema_decay)
        return new, metrics | dict(grad_norm=optax.tree.norm(grads), host=host.sum(axis=0))

    places = (shardings, sharding.rows(mesh), sharding.host_numbers(mesh))
    return jax.jit(step, donate_argnums=0, in_shardings=places, out_shardings=(shardings, sharding.replicated(mesh)))


def make_forward(call: Callable[[dict, Any], Any], mesh: Mesh, shardings: dict) -> Callable[[dict, Any], Any]:
    """`call(params, rows)`, jitted, its results whole in every process. shardings: of the parameters."""

    def forward(params: dict, rows: Any) -> Any:
        with sharding.under(mesh):
            return call(params, rows)

    return jax.jit(forward, in_shardings=(shardings, sharding.rows(mesh)), out_shardings=sharding.replicated(mesh))
