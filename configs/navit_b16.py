"""NaViT-B/16.

    python train.py --config configs/navit_b16.py                     # embedded digits
    python train.py --config configs/navit_b16.py:folder=PATH         # PATH/class/image.jpg
    python train.py --config configs/navit_b16.py:imagenet2012        # TFDS, the full recipe

Digits: 95.3 % of 360 at 4 tokens an image, 86.7 % at 9; loss 1.76 over the first fifth, 0.14 over the last; 6 minutes
on two CPU cores that were shared, 160 steps of 46 images. imagenet2012 and folders: not run.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(arg: str = "") -> ConfigDict:
    """B/16 on the data that `arg` names; see `configs.recipes.navit`."""
    return recipes.navit("navit_b16", "B/16", arg, demo_steps=160, demo_lr=3e-4)
