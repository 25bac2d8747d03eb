"""NaViT-S/16.

    python train.py --config configs/navit_s16.py                     # embedded digits
    python train.py --config configs/navit_s16.py:folder=PATH         # PATH/class/image.jpg
    python train.py --config configs/navit_s16.py:imagenet2012        # TFDS, the full recipe

HEADER_s16
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    return base.navit("navit_s16", "S/16", arg, demo_steps=400, demo_lr=6e-4)
