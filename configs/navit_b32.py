"""NaViT-B/32.

    python train.py --config configs/navit_b32.py                     # embedded digits
    python train.py --config configs/navit_b32.py:folder=PATH         # PATH/class/image.jpg
    python train.py --config configs/navit_b32.py:imagenet2012        # TFDS, the full recipe

Digits: not run (as navit_b16, with patches of 32 pixels). imagenet2012 and folders: not run.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(arg: str = "") -> ConfigDict:
    """B/32 on the data that `arg` names; see `configs.recipes.navit`."""
    return recipes.navit("navit_b32", "B/32", arg, demo_steps=160, demo_lr=3e-4)
