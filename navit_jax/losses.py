"""One loss per image slot, in float32, and the sums that make a mean over the real images of the global batch.

A loss keeps the slot axes [B, K]: only the caller knows the global number of images (over devices, and over the parts
of an accumulated step), so it adds up `masked_sum`s and divides once. Logits of masked slots are replaced before any
arithmetic: multiplying a loss by 0 afterwards would still send 0 * nan into the gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from input_pipeline.errors import UserError

Loss = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


def softmax_xent(
    logits_BKC: jax.Array, targets: jax.Array, smoothing: float = 0.0, mask_BK: jax.Array | None = None
) -> jax.Array:
    """Softmax cross-entropy of every slot: logsumexp(x) * sum(y) - sum(y * x), y the smoothed targets.

    logits: [B, K, C], any float dtype. targets: class numbers [B, K] int (-1: none), or weights [B, K, C] float.
    smoothing s mixes the targets with a uniform distribution of the same sum: (1 - s) * y + s * mean(y).
    mask: [B, K], which slots count; None: all that have a target. Returns [B, K] float32, 0 in the other slots.
    """
    x_BKC, real_BK = _only_real(logits_BKC, targets, mask_BK)
    dot_BK, total_BK = _smoothed_dot(x_BKC, targets, smoothing)
    loss_BK = jax.nn.logsumexp(x_BKC, axis=-1) * total_BK - dot_BK
    return jnp.where(real_BK, loss_BK, 0.0)


def sigmoid_xent(
    logits_BKC: jax.Array, targets: jax.Array, smoothing: float = 0.0, mask_BK: jax.Array | None = None
) -> jax.Array:
    """Sigmoid cross-entropy of every slot, summed over the classes: sum(log(1 + exp(x)) - y * x).

    Arguments and result as `softmax_xent`, smoothing included: it keeps the expected number of labels, where the
    binary kind (1 - s) * y + s / 2 would ask for C / 2 of them. At zero logits the loss is C * log(2).
    Source: the sum over classes is Beyer et al. 2020 (arXiv 2006.07159), section 5, and NaViT's supervised recipe.
    """
    x_BKC, real_BK = _only_real(logits_BKC, targets, mask_BK)
    dot_BK, _ = _smoothed_dot(x_BKC, targets, smoothing)
    loss_BK = jax.nn.softplus(x_BKC).sum(-1) - dot_BK
    return jnp.where(real_BK, loss_BK, 0.0)


def make_loss(cfg: ConfigDict) -> Loss:
    """The loss that `config.loss` names, as f(logits_BKC, targets, mask_BK=None) -> loss_BK.

    Raises UserError for an unknown kind, or a smoothing outside [0, 1).
    """
    kinds = {"sigmoid": sigmoid_xent, "softmax": softmax_xent}
    if cfg.kind not in kinds:
        raise UserError(f"loss.kind is {cfg.kind!r}; expected one of {', '.join(kinds)}.")
    smoothing = float(cfg.label_smoothing)
    if not 0 <= smoothing < 1:
        raise UserError(f"loss.label_smoothing is {smoothing}; expected a share from 0 to below 1, such as 0.1.")
    loss = kinds[cfg.kind]
    return lambda logits_BKC, targets, mask_BK=None: loss(logits_BKC, targets, smoothing, mask_BK)


def masked_sum(value_BK: jax.Array, mask_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum over the slots that count, how many they are), both float32 scalars; nan in other slots is ignored.

    Divide the total of the sums by the total of the counts: over parts of a step, the mean over all their images.
    """
    mask_BK = jnp.asarray(mask_BK, bool)
    value_BK = jnp.asarray(value_BK, jnp.float32)
    return jnp.where(mask_BK, value_BK, 0.0).sum(), mask_BK.sum(dtype=jnp.float32)


def correct_BK(logits_BKC: jax.Array, targets: jax.Array) -> jax.Array:
    """Whether the largest logit is the label, or one of the labels (weight above 0) if there are several.

    logits: [B, K, C]; targets as for the losses. Returns [B, K] bool, False where there is no target.
    """
    top_BK = jnp.argmax(logits_BKC, axis=-1)
    if targets.ndim == 2:
        return top_BK == targets
    return jnp.take_along_axis(jnp.asarray(targets), top_BK[..., None], axis=-1)[..., 0] > 0


def _only_real(logits_BKC: jax.Array, targets: jax.Array, mask_BK: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Float32 logits, zero in the slots that do not count, and which slots do."""
    real_BK = jnp.ones(logits_BKC.shape[:2], bool) if mask_BK is None else jnp.asarray(mask_BK, bool)
    if targets.ndim == 2:
        real_BK &= targets >= 0
    return jnp.where(real_BK[..., None], logits_BKC.astype(jnp.float32), 0.0), real_BK


def _smoothed_dot(x_BKC: jax.Array, targets: jax.Array, smoothing: float) -> tuple[jax.Array, jax.Array]:
    """sum(y * x) for the smoothed targets y, and sum(y), without building y from class numbers.

    The comparison with the class axis fuses into the sum, and its gradient is no scatter: the same bits every time.
    """
    if targets.ndim == 2:
        classes_C = jnp.arange(x_BKC.shape[-1])
        dot_BK = jnp.where(classes_C == targets[..., None], x_BKC, 0.0).sum(-1)
        total_BK = jnp.ones_like(dot_BK)
    else:
        y_BKC = jnp.asarray(targets, jnp.float32)
        dot_BK, total_BK = (y_BKC * x_BKC).sum(-1), y_BKC.sum(-1)
    return (1 - smoothing) * dot_BK + smoothing * total_BK * x_BKC.mean(-1), total_BK
