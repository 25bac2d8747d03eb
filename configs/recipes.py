"""What several configs share: a recipe by what the data is, the demo, ImageNet, images of one's own, or captions."""

from ml_collections import ConfigDict

from configs import base

EMBEDDED = ("digits", "shapes", "photos")  # sources that need no download


def use_data(c: ConfigDict, arg: str) -> ConfigDict:
    """The data that follows the config's name: `` (digits), `shapes`, `imagenet2012`, `folder=PATH`, `tfds=NAME` ..."""
    if arg == "imagenet2012":
        c.data.source = "tfds=imagenet2012"
    elif arg:
        c.data.source = arg
    return c


def demo(c: ConfigDict, *, steps: int, lr: float) -> ConfigDict:
    """A short run on an embedded set: 4-9 tokens an image, few tokens a step, so a large model fits two CPU cores.

    Fourier positions because they did best on digits (quickstart, 600 steps, softmax: 92.5 % against 78.9 % learned,
    both fractional; rope 91.1 %), judged on the held-out images. On `shapes` it is the other way round.
    """
    patch = int(c.model.variant.split("/")[1])
    c.resolution.update(min_side=2 * patch, max_side=3 * patch)
    c.model.update(posemb="fourier", posemb_coords="fractional")
    c.loss.kind = "softmax"
    c.drop.kind = "none"
    c.packing.update(row_length=64, rows_per_step=4)
    c.optim.update(lr=lr, schedule="cosine", warmup_steps=10)
    c.update(total_steps=steps, log_every_steps=5, checkpoint_every_steps=0)
    c.eval.update(token_budgets=(4, 9), rows_per_step=8)
    return c


def imagenet(c: ConfigDict) -> ConfigDict:
    """ImageNet-1k from scratch: sides U(64, 256), resolution-dependent dropping, mixup and RandAugment. Not run."""
    c.packing.update(row_length=256, rows_per_step=256)
    c.model.posemb_beyond = "interpolate"  # for the rare very long image
    c.drop.update(kind="resolution", min_rate=0.1, max_rate=0.5)
    c.augment.update(flip=True, crop_min_area=0.25, crop_max_aspect=1.33, randaugment_ops=2, mixup=0.2)
    c.optim.update(
        lr=1e-3, schedule="cosine", warmup_steps=10_000, weight_decay=((".*kernel$", 0.1),), ema_decay=0.9999
    )
    c.update(total_epochs=300.0, log_every_steps=50, checkpoint_every_steps=2000, eval_every_steps=10_000)
    c.eval.update(token_budgets=(64, 128, 196, 256), fewshot_shots=(10,))
    return c


def own_data(c: ConfigDict) -> ConfigDict:
    """A folder or dataset of the user's: sides U(64, 256), beta token dropping, flips; evaluated ten times or so."""
    c.packing.update(row_length=256, rows_per_step=64)
    c.model.posemb_beyond = "interpolate"  # for the rare very long image
    c.augment.flip = True
    c.optim.update(lr=5e-4, schedule="cosine", warmup_steps=500, weight_decay=((".*kernel$", 0.1),))
    c.update(total_epochs=30.0, log_every_steps=20, checkpoint_every_steps=500, eval_every_steps=500)
    return c


def captions(c: ConfigDict) -> ConfigDict:
    """Images with texts of the user's: the paper's sides and softmax over all pairs of the step, texts of 64 tokens."""
    c.packing.update(row_length=256, rows_per_step=64)
    c.model.posemb_beyond = "interpolate"  # for the rare very long image
    c.optim.update(lr=1e-3, warmup_steps=2000, cooldown_steps=2000, b2=0.95, weight_decay=((".*kernel$", 1e-4),))
    c.update(total_epochs=10.0, log_every_steps=20, checkpoint_every_steps=1000, eval_every_steps=2000)
    if not c.data.source.startswith("folder="):  # whose labels may be there or not
        c.data.label_field = ""
    return c


def navit(name: str, variant: str, arg: str, *, demo_steps: int, demo_lr: float) -> ConfigDict:
    """A NaViT of this size on the data that `arg` names: the demo, the ImageNet recipe or the one for own data."""
    c = base.get_config()
    c.name, c.model.variant = name, variant
    use_data(c, arg)
    if c.data.source in EMBEDDED:
        return demo(c, steps=demo_steps, lr=demo_lr)
    return imagenet(c) if arg == "imagenet2012" else own_data(c)
