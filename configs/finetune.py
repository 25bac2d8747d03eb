"""Fits pretrained weights to your images: the whole model, or with `probe=true` its head alone.

    python train.py --config configs/finetune.py:weights=PATH,folder=PATH               # PATH/class/image.jpg
    python train.py --config configs/finetune.py:weights=PATH,folder=PATH,probe=true
    python train.py --config configs/finetune.py:weights=google/siglip2-base-patch16-naflex,folder=PATH

weights: a run of yours, an export, or any file, folder or hub name that `navit_jax.load` takes; the model is theirs.
The head starts anew where the classes are others. Each layer learns a quarter slower than the one behind it; the new
resolutions go through the position embedding's own rule, with learned tables stretched beyond their last row.
Other sizes of image: --config.resolution.max_side=384, pixels of the square of equal area.

On the embedded `shapes`, the model that configs/quickstart.py learned on digits, 100 steps of 120 images, top-1 of 2000
at 9 tokens an image: the whole model 77.3 %, its head alone 41.6 %, the same model from random parameters
(--config.init_from= --config.optim.layer_decay=1) 44.8 %, of three learning rates the best. One run each. Folders and
weights of others: run for a few steps only.
"""

from ml_collections import ConfigDict

from configs import base, recipes


def get_config(arg: str = "") -> ConfigDict:
    """The recipe for `weights=PATH,SOURCE[,probe=true]`. Raises ValueError without weights."""
    weights, probe, source = _parse(arg)
    c = recipes.use_data(base.get_config(), source)
    c.name = "probe" if probe else "finetune"
    c.init_from = c.model.like = weights
    c.model.posemb_beyond = "interpolate"
    c.loss.kind = "softmax"
    c.drop.kind = "none"
    c.resolution.update(min_side=128, max_side=256)
    c.packing.update(row_length=1024, rows_per_step=8)  # long enough for patches of 8 pixels
    c.augment.update(flip=True, crop_min_area=0.5)
    c.optim.update(schedule="cosine", warmup_steps=50, weight_decay=((".*kernel$", 0.05),))
    c.optim.update(dict(lr=3e-3, freeze=("^(?!head/)",)) if probe else dict(lr=2e-4, layer_decay=0.75))
    c.update(total_epochs=30.0, log_every_steps=10, checkpoint_every_steps=500, eval_every_steps=200)
    if not probe:
        c.loss.label_smoothing = 0.1
        c.model.stochastic_depth = 0.1
    if c.data.source in recipes.EMBEDDED:
        _demo(c)
    return c


def _demo(c: ConfigDict) -> None:
    """The embedded sets, whose images are small and whose classes a flip or a crop could change."""
    c.resolution.update(min_side=32, max_side=64)
    c.packing.row_length = 128
    c.augment.update(flip=False, crop_min_area=1.0)
    c.update(total_steps=100, checkpoint_every_steps=0, eval_every_steps=0)
    c.optim.update(lr=1e-2 if c.name == "probe" else 2e-3, warmup_steps=10)
    c.eval.token_budgets = (9, 16)


def _parse(arg: str) -> tuple[str, bool, str]:
    """(weights, probe, data source) of `weights=PATH,folder=PATH,probe=true`, in any order."""
    options, source = dict(weights="", probe="false"), []
    for part in arg.split(","):
        name, _, value = part.partition("=")
        if name in options:
            options[name] = value
        elif source and value:
            raise ValueError(f"{part}: expected weights=PATH, probe=true and one source of images, after {source[0]}")
        else:
            source.append(part)
    if not options["weights"]:
        raise ValueError("which weights? Write --config configs/finetune.py:weights=PATH,folder=PATH")
    if options["probe"] not in ("true", "false"):
        raise ValueError(f"probe={options['probe']}: expected true or false")
    return options["weights"], options["probe"] == "true", ",".join(source)
