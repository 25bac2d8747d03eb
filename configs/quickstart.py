"""A small NaViT (width 128, 4 layers) that learns the embedded digits while one watches.

    python train.py --config configs/quickstart.py
    python train.py --config configs/quickstart.py:shapes

HEADER_quickstart
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    c = base.navit("quickstart", "Ti/16", arg, demo_steps=1200, demo_lr=2e-3)
    c.model.update(width=128, depth=4, heads=4, mlp_dim=512)
    c.packing.update(row_length=128, rows_per_step=4)
    c.update(log_every_steps=20)
    return c
