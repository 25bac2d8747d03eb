"""NaViT-S/16.

    python train.py --config configs/navit_s16.py                     # embedded digits
    python train.py --config configs/navit_s16.py:folder=PATH         # PATH/class/image.jpg
    python train.py --config configs/navit_s16.py:imagenet2012        # TFDS, the full recipe

Digits: 97.2 % of 360 at 4 tokens an image, 92.2 % at 9; 3 minutes on two CPU cores, 400 steps of 46 images.
imagenet2012 and folders: not run.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(arg: str = "") -> ConfigDict:
    """S/16 on the data that `arg` names; see `configs.recipes.navit`."""
    return recipes.navit("navit_s16", "S/16", arg, demo_steps=400, demo_lr=6e-4)
