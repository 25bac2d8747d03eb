"""Softmax (CLIP) and sigmoid (SigLIP) losses over all images and texts of a step, and no matrix of all their logits.

Every device keeps its images; its texts go round a ring of the devices, and what they gather (softmax statistics, then
gradients) goes with them. Images and texts are cut into blocks on the device too, so that no more than block x block
logits exist at once, also on one device, where the ring is one turn and nothing is sent. The backward pass is a second
ring that computes the logits again: four products of that size where the dense loss has three, and keeps N x N numbers.
All is float32, because a learned scale of 100 turns bfloat16's rounding of a cosine, 0.004, into 0.4 of a logit.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from input_pipeline.errors import UserError
from navit_jax.sharding import BATCH

ROWS = PartitionSpec(BATCH)
KINDS = ("softmax", "sigmoid")
_dot = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
MASKED = -1e30  # finite: -inf - -inf would be nan in slots that have no negatives


class Ids(NamedTuple):
    """Which text belongs to which image, and what is equal; `Pairs` of a batch, slots flattened. int32.

    example_N, example_M: the same for an image and its text, each at most once a side and below N; -1: none.
    number_N, number_M: the same for equal texts, of an image its text's; -1: equal to no other.
    image_N, image_M: the same for copies of one image, of a text its image's; -1: a copy of no other.
    """

    example_N: jax.Array
    example_M: jax.Array
    number_N: jax.Array
    number_M: jax.Array
    image_N: jax.Array
    image_M: jax.Array


def contrastive_loss(
    z_NE: jax.Array,
    z_ME: jax.Array,
    pairs: Ids,
    scale: jax.Array | float,
    bias: jax.Array | float,
    *,
    kind: str,
    mesh: Mesh,
    block: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sum of the losses over the pairs of the step, metrics), to be called inside of the step's jit.

    z: unit vectors of N image slots and M text slots, split over the mesh as a step's rows; the logits are
    scale * <z_n, z_m>, for sigmoid + bias. An image and a text count if each other's example is in the step; what other
    slots hold, nan included, changes nothing. Texts equal to an image's own, and other texts of the same image, are not
    its negatives, nor is it theirs.
    softmax: sum over pairs of the mean of both directions' cross-entropies. sigmoid: -log sigmoid(+-logit), summed over
    all images and texts. Divide by the metric `images`, the number of pairs; `correct` of them have a larger logit than
    the image's negatives. block: rows of each side in a block of logits. Differentiable in z, scale and bias.
    Raises UserError for an unknown kind, or a block below 1.
    Source: Radford et al. 2021 (CLIP), section 2.3; Zhai et al. 2023 (SigLIP), sections 3.2 and 3.3.
    """
    if kind not in KINDS or block < 1:
        raise UserError(f"loss {kind!r} in blocks of {block}; expected {' or '.join(KINDS)}, in blocks of 1 or more.")
    images, texts = _sides(z_NE, z_ME, pairs, mesh)
    how = _How(kind, mesh, block)
    total, (best_N, positive_N) = _total(how, images, texts, jnp.float32(scale), jnp.float32(bias))
    valid_N = images.example > 0
    correct_N = valid_N & (positive_N > best_N)
    return total, jax.tree.map(lambda x: x.sum(dtype=jnp.float32), dict(images=valid_N, correct=correct_N))


class _How(NamedTuple):
    kind: str
    mesh: Mesh
    block: int


class _Side(NamedTuple):
    """Vectors of one side, 0 in slots that do not count, and their `Ids` counted from 1; 0: none."""

    z: jax.Array
    example: jax.Array
    number: jax.Array
    image: jax.Array


class _Sums(NamedTuple):
    """What a slot has met: its positive's logit, its largest negative, and a total over the negatives.

    total: softmax: of exp(logit - best); sigmoid: of the losses. The positive stays apart from it, so that the loss of
    a slot that is nearly right, log(1 + exp(negatives - positive)), is not the small difference of two large numbers.
    """

    positive: jax.Array
    best: jax.Array
    total: jax.Array


def _sides(z_NE: jax.Array, z_ME: jax.Array, pairs: Ids, mesh: Mesh) -> tuple[_Side, _Side]:
    """Both sides, with nothing left of the slots that have no partner."""
    slots, ways = len(pairs.example_N), prod(mesh.shape[axis] for axis in BATCH)

    def known(here: jax.Array, others: jax.Array) -> jax.Array:
        others = jax.lax.all_gather(others, BATCH, tiled=True) if ways > 1 else others
        seen = jnp.zeros(slots, bool).at[jnp.where(others < 0, slots, others)].set(True, mode="drop")
        return seen.at[jnp.where(here < 0, slots, here)].get(mode="fill", fill_value=False)

    partners = _over(mesh, lambda n, m: (known(n, m), known(m, n)), (ROWS, ROWS))
    valid_N, valid_M = partners(pairs.example_N, pairs.example_M)

    def side(z: jax.Array, valid: jax.Array, *ids: jax.Array) -> _Side:
        clean = jnp.where(valid[:, None], z.astype(jnp.float32), 0.0)
        return _Side(clean, *(jnp.where(valid, x + 1, 0) for x in ids))

    return side(z_NE, valid_N, *pairs[::2]), side(z_ME, valid_M, *pairs[1::2])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(how: _How, images: _Side, texts: _Side, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple]:
    """(the loss, (largest negative, positive) of each image)."""
    return _forward(how, images, texts, scale, bias)[0]


def _forward(how: _How, images: _Side, texts: _Side, scale: jax.Array, bias: jax.Array) -> tuple[tuple, tuple]:
    zeros_N, zeros_M = (jnp.zeros(side.example.shape, jnp.float32) for side in (images, texts))
    i, j = (_Sums(zeros, zeros + MASKED, zeros) for zeros in (zeros_N, zeros_M))
    i, j = _ring(how, _count, images, texts, i, j if how.kind == "softmax" else (), (scale, bias))
    valid_N, valid_M = images.example > 0, texts.example > 0
    if how.kind == "sigmoid":
        by_N = by_M = ()
        total = jnp.where(valid_N, i.total + jax.nn.softplus(-i.positive), 0.0).sum()
    else:
        (loss_N, *by_N), (loss_M, *by_M) = _normalised(i, valid_N), _normalised(j, valid_M)
        total = (loss_N.sum() + loss_M.sum()) / 2
    return (total, (i.best, i.positive)), (images, texts, scale, bias, by_N, by_M)


def _backward(how: _How, kept: tuple, d_out: tuple) -> tuple[_Side, _Side, jax.Array, jax.Array]:
    images, texts, scale, bias, by_N, by_M = kept
    i = jnp.zeros_like(images.z), jnp.zeros(images.example.shape, jnp.float32)
    sides = (images, by_N), (texts, by_M)
    (d_NE, d_N), d_ME = _ring(how, _differentiate, *sides, i, jnp.zeros_like(texts.z), (scale, bias))
    g = d_out[0]
    d_images, d_texts = (_Side(g * scale * d, None, None, None) for d in (d_NE, d_ME))
    d_bias = g * d_N.sum() if how.kind == "sigmoid" else jnp.zeros_like(bias)
    return d_images, d_texts, g * (images.z * d_NE).sum(), d_bias


_total.defvjp(_forward, _backward)


def _normalised(sums: _Sums, valid: jax.Array) -> list[jax.Array]:
    """Softmax of a slot: its loss, log of its sum of exp(logits), and the negatives' share; 0 where it does not count.

    The largest negative adds 1 to its total; where there is none, `best` is MASKED and the loss 0.
    """
    ahead = (sums.best - sums.positive) + jnp.log(jnp.maximum(sums.total, 1.0))
    loss = jax.nn.softplus(ahead)
    return [jnp.where(valid, x, 0.0) for x in (loss, sums.positive + loss, jax.nn.sigmoid(ahead))]


def _ring(how: _How, meet: Callable, images: Any, texts: Any, i: Any, j: Any, rates: tuple) -> tuple[Any, Any]:
    """Lets all images meet all texts, a block of each at a time: `meet(kind, image, text, i, j, rates) -> (i, j)`.

    i is what images gather, and stays with them; j what texts gather, and travels with them. All are trees of arrays
    whose first axis is split as a step's rows. Returns the last i and j.
    """
    ways = prod(how.mesh.shape[axis] for axis in BATCH)
    to_next = [(n, (n + 1) % ways) for n in range(ways)]

    def move(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.ppermute(x, BATCH, to_next), tree) if ways > 1 else tree

    def on_device(images: Any, texts: Any, i: Any, j: Any, rates: tuple) -> tuple[Any, Any]:
        whole = i, j
        images, texts, i, j = (_cut(tree, how.block) for tree in (images, texts, i, j))

        def texts_met(texts: Any, j: Any, image: Any, i: Any) -> tuple[Any, Any]:
            return jax.lax.scan(lambda i, its: meet(how.kind, image, its[0], i, its[1], rates), i, (texts, j))

        def turn(state: tuple, _: None) -> tuple[tuple, None]:
            texts, i, j = state
            coming = move(texts)  # first, because no product below waits for it
            j, i = jax.lax.scan(lambda j, mine: texts_met(texts, j, *mine)[::-1], j, (images, i))
            return (coming, i, move(j)), None

        (_, i, j), _ = jax.lax.scan(turn, (texts, i, j), length=ways)
        return jax.tree.map(lambda x, like: x.reshape(-1, *x.shape[2:])[: len(like)], (i, j), whole)

    return _over(how.mesh, on_device, (ROWS, ROWS, ROWS, ROWS, PartitionSpec()))(images, texts, i, j, rates)


def _cut(tree: Any, block: int) -> Any:
    """Arrays [n, ...] as [blocks, rows, ...], of as few blocks as will do and equal ones; slots of zeros fill up."""

    def one(x: jax.Array) -> jax.Array:
        blocks = -(-len(x) // block)
        size = -(-len(x) // blocks)
        x = jnp.pad(x, [(0, blocks * size - len(x)), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(blocks, size, *x.shape[1:])

    return jax.tree.map(one, tree)


def _over(mesh: Mesh, function: Callable, specs: tuple) -> Callable:
    # Unchecked, because the checker wants every zero that a scan starts with declared as different on each device.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False)


def _count(kind: str, image: _Side, text: _Side, i: _Sums, j: _Sums | tuple, rates: tuple) -> tuple:
    """What I images and J texts have met after each other."""
    logits_IJ, positive_IJ, negative_IJ = _logits(kind, image, text, rates)

    def add(sums: _Sums, axis: int) -> _Sums:
        best = jnp.maximum(sums.best, jnp.where(negative_IJ, logits_IJ, MASKED).max(axis))
        positive = sums.positive + jnp.where(positive_IJ, logits_IJ, 0.0).sum(axis)
        if kind == "sigmoid":
            total, terms_IJ = sums.total, jax.nn.softplus(logits_IJ)
        else:
            total, terms_IJ = sums.total * jnp.exp(sums.best - best), jnp.exp(logits_IJ - jnp.expand_dims(best, axis))
        return _Sums(positive, best, total + jnp.where(negative_IJ, terms_IJ, 0.0).sum(axis))

    return add(i, 1), add(j, 0) if j else ()


def _differentiate(kind: str, image: tuple, text: tuple, i: tuple, j: jax.Array, rates: tuple) -> tuple:
    """Gradients of I images (without the scale, and of their logits' sum) and J texts after each other's part."""
    (image, by_I), (text, by_J), (d_IE, d_I) = image, text, i
    logits_IJ, positive_IJ, negative_IJ = _logits(kind, image, text, rates)
    if kind == "sigmoid":
        pull_IJ, push_IJ = jax.nn.sigmoid(-logits_IJ), jax.nn.sigmoid(logits_IJ)
    else:
        (log_sum_I, missed_I), (log_sum_J, missed_J) = by_I, by_J
        pull_IJ = (missed_I[:, None] + missed_J) / 2
        push_IJ = (jnp.exp(logits_IJ - log_sum_I[:, None]) + jnp.exp(logits_IJ - log_sum_J)) / 2
    d_IJ = jnp.where(positive_IJ, -pull_IJ, jnp.where(negative_IJ, push_IJ, 0.0))
    return (d_IE + _dot("IJ,JE->IE", d_IJ, text.z), d_I + d_IJ.sum(1)), j + _dot("IJ,IE->JE", d_IJ, image.z)


def _logits(kind: str, image: _Side, text: _Side, rates: tuple) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits of I images and J texts, which are positives, and which negatives."""
    scale, bias = rates
    logits_IJ = scale * _dot("IE,JE->IJ", image.z, text.z) + (bias if kind == "sigmoid" else 0.0)
    both_IJ = (image.example > 0)[:, None] & (text.example > 0)
    same_IJ = image.example[:, None] == text.example
    equal_IJ = (image.number[:, None] == text.number) & (text.number > 0)
    copies_IJ = (image.image[:, None] == text.image) & (text.image > 0)
    return logits_IJ, both_IJ & same_IJ, both_IJ & ~(same_IJ | equal_IJ | copies_IJ)
