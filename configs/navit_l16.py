"""NaViT-L/16.

    python train.py --config configs/navit_l16.py                     # embedded digits
    python train.py --config configs/navit_l16.py:folder=PATH         # PATH/class/image.jpg
    python train.py --config configs/navit_l16.py:imagenet2012        # TFDS, the full recipe

Digits: not run; 311 M parameters need 5 GB and about 4 s a step on two CPU cores. imagenet2012 and folders: not run.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(arg: str = "") -> ConfigDict:
    """L/16 on the data that `arg` names; see `configs.recipes.navit`."""
    return recipes.navit("navit_l16", "L/16", arg, demo_steps=60, demo_lr=2e-4)
