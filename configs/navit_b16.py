"""NaViT-B/16.

    python train.py --config configs/navit_b16.py                     # embedded digits
    python train.py --config configs/navit_b16.py:folder=PATH         # PATH/class/image.jpg
    python train.py --config configs/navit_b16.py:imagenet2012        # TFDS, the full recipe

HEADER_b16
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    return base.navit("navit_b16", "B/16", arg, demo_steps=160, demo_lr=3e-4)
