"""What a run trains, as the trainer sees it: a model, the gradient of a step's rows, and what evaluation computes.

An objective is this and its evaluators; the stream, the loop, the step and the checkpoints are the same for all.
Gradients are sums over examples, so that the step divides once, whatever was added up before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from input_pipeline.errors import UserError
from input_pipeline.packed import Batch, Packed
from navit_jax import contrastive, losses, navit, optim, sharding, text_tower
from navit_jax.contrastive_loss import Ids, contrastive_loss

CACHED_TOKENS = 3072  # of a part: 6144 take twice the memory and 2 % more time, 2048 take 5 % more, 1024 take 11 %

Gradient = Callable[[dict, Batch, jax.Array], tuple[dict, dict]]  # (params, batch, key) -> (gradients, metrics), sums


class Objective(NamedTuple):
    """dtype: that the model computes in. shapes: of its parameters. init: seed -> parameters.

    gradient: mesh -> `Gradient`; its metrics hold `loss`, `correct`, `images` and `tokens`, and those of pairs
    `unmatched`, images that were read and carry no loss; `images` are then those that do. forward: (params, batch) ->
    (logits_BKC or None, vectors of the images). forward_texts: (params, texts) -> vectors; None without a text tower.
    limit: what parameters are held to after an update. flops: useful ones of a training step over images, and texts, of
    these lengths.
    """

    dtype: jnp.dtype
    shapes: dict
    init: Callable[[int], dict]
    gradient: Callable[[Mesh], Gradient]
    forward: Callable[[dict, Batch], tuple]
    forward_texts: Callable[[dict, Packed], jax.Array] | None
    limit: Callable[[dict], dict]
    flops: Callable[[np.ndarray, np.ndarray], float]


def make(config: ConfigDict, classes: int, vocab_size: int = 0) -> Objective:
    """The objective of a config; classes: of the data. vocab_size: of the tokenizer. Raises UserError."""
    if config.objective == "supervised":
        return _supervised(config, classes)
    if config.objective == "contrastive":
        return _contrastive(config, vocab_size)
    raise UserError(f"objective is {config.objective!r}; expected supervised or contrastive.")


def _supervised(config: ConfigDict, classes: int) -> Objective:
    model, graph, shapes = navit.for_classes(config, classes)

    def forward(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits_BKC, extra = navit.merge(graph, params)(batch.images)
        return logits_BKC, extra["pooled"]

    frozen = optim.frozen(config.optim, shapes)
    passes = _passes({name: x for name, x in shapes.items() if name != "head"}, frozen)
    random = config.model.dropout or config.model.stochastic_depth  # drawn for each part
    steps = config.optim.accumulate_steps or (1 if random else 0)
    gradient = supervised_gradient(graph, losses.make_loss(config.loss), steps, optim.hold(frozen))
    return Objective(
        dtype=model.compute_dtype,
        shapes=shapes,
        init=partial(navit.init_params, model),
        gradient=lambda mesh: gradient,
        forward=forward,
        forward_texts=None,
        limit=lambda params: params,
        flops=lambda images, texts: passes * navit.flops_forward(model, images),
    )


def _passes(part: dict, frozen: set[str]) -> int:
    """Forward passes whose products a step of this part needs: a backward pass is two, and locked parts have none."""
    return 1 if optim.paths(part) <= frozen else 3


def supervised_gradient(
    graph: Any, loss: Callable, parts: int = 0, hold: Callable[[dict], dict] = lambda params: params
) -> Gradient:
    """Of a loss that is a sum over images, so that rows can be taken in `parts` parts, one at a time in memory.

    Over several devices each part's gradients are summed over them: parts cost communication as well as save memory.
    parts 0: `_cached_parts`. hold: `optim.hold`.
    """

    def sums(params: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict]:
        logits_BKC, _ = navit.merge(graph, hold(params))(batch.images, key=key)
        mask_BK = (batch.index >= 0) & (batch.labels.reshape(*batch.index.shape, -1).max(-1) >= 0)
        total, count = losses.masked_sum(loss(logits_BKC, batch.labels, mask_BK), mask_BK)
        correct, _ = losses.masked_sum(losses.correct_BK(logits_BKC, batch.labels), mask_BK)
        return total, dict(loss=total, correct=correct, images=count, tokens=_tokens(batch))

    return partial(_accumulate, jax.grad(sums, has_aux=True), parts)


def _cached_parts(batch: Batch) -> int:
    """1, but on a single CPU as many as leave about `CACHED_TOKENS` to each: whole planned groups of rows."""
    if sharding.platform() != "cpu" or sharding.row_shards() > 1:
        return 1
    rows, length = batch.images.segment_ids.shape
    group = batch.images.capacity.rows if batch.images.capacity else 1
    counts = [n for n in range(1, rows + 1) if n == 1 or rows % (n * group) == 0]
    return min(counts, key=lambda n: abs(np.log(rows * length / n / CACHED_TOKENS)))


def _accumulate(gradient: Gradient, parts: int, params: dict, batch: Batch, key: jax.Array) -> tuple[dict, dict]:
    parts = parts or _cached_parts(batch)
    if parts == 1:
        return gradient(params, batch, key)
    batch, group = _group(batch, parts)
    slices = _slices(batch, parts, group)

    def body(total: tuple, part: tuple) -> tuple[tuple, None]:
        i, rows = part
        return jax.tree.map(jnp.add, total, gradient(params, rows, jax.random.fold_in(key, i))), None

    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], slices), key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, (jnp.arange(parts), slices))[0]


def _group(batch: Batch, parts: int) -> tuple[Batch, int]:
    """The batch and how many rows stay together in a part: a planned group, where each device has whole ones for
    every part; or 1, and no promise."""
    capacity = batch.images.capacity
    if capacity and batch.index.shape[0] % (parts * capacity.rows * sharding.row_shards()) == 0:
        return batch, capacity.rows
    return batch._replace(images=batch.images._replace(capacity=None)), 1


def _slices(rows: Any, parts: int, group: int) -> Any:
    """[parts, B / parts, ...]: a part takes every `parts`-th group, so that each device has its share of every part."""
    return jax.tree.map(lambda x: _swap(x, (-1, parts, group)).reshape(parts, -1, *x.shape[1:]), rows)


def _whole(slices: Any, parts: int, group: int) -> Any:
    """The reverse of `_slices`."""
    return jax.tree.map(lambda x: _swap(x, (parts, -1, group), 2).reshape(-1, *x.shape[2:]), slices)


def _swap(x: jax.Array, axes: tuple[int, ...], instead_of: int = 1) -> jax.Array:
    return x.reshape(*axes, *x.shape[instead_of:]).swapaxes(0, 1)


def _contrastive(config: ConfigDict, vocab_size: int) -> Objective:
    model = contrastive.from_config(config, vocab_size=vocab_size)
    graph, shapes = contrastive.abstract(model)
    frozen = optim.frozen(config.optim, shapes)
    passes = {tower: _passes({tower: shapes[tower]}, frozen) for tower in ("image", "text")}

    def forward(params: dict, batch: Batch) -> tuple[None, jax.Array]:
        return None, navit.merge(graph, params).encode_images(batch.images)

    def flops(images: np.ndarray, texts: np.ndarray) -> float:
        towers = navit.flops_forward(model.image, images), text_tower.flops_forward(model.text, texts)
        projections = contrastive.flops_forward(model, images, texts) - sum(towers)
        return passes["image"] * towers[0] + passes["text"] * towers[1] + 3 * projections

    return Objective(
        dtype=model.image.compute_dtype,
        shapes=shapes,
        init=partial(contrastive.init_params, model),
        gradient=partial(contrastive_gradient, graph, config.contrastive, hold=optim.hold(frozen)),
        forward=forward,
        forward_texts=lambda params, texts: navit.merge(graph, params).encode_texts(texts),
        limit=partial(contrastive.limit_scale, max_scale=config.contrastive.max_scale),
        flops=flops,
    )


def contrastive_gradient(
    graph: Any, cfg: ConfigDict, mesh: Mesh, hold: Callable[[dict], dict] = lambda params: params
) -> Gradient:
    """Of a loss over all pairs of the step. With `cache_parts` the towers see the rows in parts, the loss all of them:

    vectors first, without what a backward pass needs; then the loss and the gradient of each vector; then each part
    again, backwards from its vectors' gradients. Two forward passes instead of one, a part's memory, the same gradient;
    over several devices it is summed over them for each part. hold: `optim.hold`.
    Source: Gao et al. 2021 (GradCache, 2101.06983).
    """
    parts = cfg.cache_parts

    def encode(params: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        towers, keys = navit.merge(graph, hold(params)), jax.random.split(key)
        return towers.encode_images(batch.images, key=keys[0]), towers.encode_texts(batch.pairs.texts, key=keys[1])

    def loss(params: dict, vectors: tuple, batch: Batch) -> tuple[jax.Array, dict]:
        towers, pairs = navit.merge(graph, hold(params)), batch.pairs
        ids = Ids(*(x.reshape(-1) for x in pairs[1:]))
        flat = (z.reshape(-1, z.shape[-1]) for z in vectors)
        total, found = contrastive_loss(
            *flat, ids, towers.scale(), towers.bias(), kind=cfg.loss, mesh=mesh, block=cfg.block
        )
        unmatched = (batch.index >= 0).sum() - found["images"]
        return total, found | dict(loss=total, tokens=_tokens(batch), unmatched=unmatched)

    def direct(params: dict, batch: Batch, key: jax.Array) -> tuple[dict, dict]:
        return jax.grad(lambda p: loss(p, encode(p, batch, key), batch), has_aux=True)(params)

    def cached(params: dict, batch: Batch, key: jax.Array) -> tuple[dict, dict]:
        batch, group = _group(batch, parts)
        work = (jax.random.split(key, parts), _slices(batch, parts, group))
        vectors = jax.lax.scan(lambda _, part: (None, encode(params, part[1], part[0])), None, work)[1]
        vectors = _whole(vectors, parts, group)
        (grads, slopes), metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, vectors, batch)
        slopes = _slices(slopes, parts, group)

        def body(total: dict, part: tuple) -> tuple[dict, None]:
            key, rows, slope = part
            _, back = jax.vjp(lambda p: encode(p, rows, key), params)
            return jax.tree.map(jnp.add, total, back(slope)[0]), None

        return jax.lax.scan(body, grads, (*work, slopes))[0], metrics

    return direct if parts == 1 else cached


def _tokens(batch: Batch) -> jax.Array:
    return jnp.sum(batch.images.segment_ids > 0)


def flops(objective: Objective, batch: Batch) -> float:
    """Useful ones of a training step over these numpy rows, which are this process's."""
    return objective.flops(_lengths(batch.images), _lengths(batch.pairs.texts) if batch.pairs else np.zeros(0))


def _lengths(packed: Packed) -> np.ndarray:
    """Tokens of each segment, [segments]."""
    ids = packed.segment_ids
    found = np.bincount((ids + np.arange(len(ids))[:, None] * (ids.max() + 1))[ids > 0])
    return found[found > 0]


def parts(config: ConfigDict) -> int:
    """In how many equal parts the model sees a step's rows."""
    if config.objective == "contrastive":
        return config.contrastive.cache_parts
    return config.optim.accumulate_steps or 1  # those of a single CPU fit the rows by themselves
