"""The fixed-square ViT-B/16 as the same code: one image a row, squashed to a square, no dropping.

    python train.py --config configs/vit_b16_square.py                     # embedded digits
    python train.py --config configs/vit_b16_square.py:folder=PATH
    python train.py --config configs/vit_b16_square.py:imagenet2012        # 224 pixels, 196 tokens

Digits: 96.4 % of 360 at 9 tokens an image; 5 minutes on two shared CPU cores, 160 steps of 28 images.
imagenet2012 and folders: not run.
"""

from ml_collections import ConfigDict

from configs import recipes


def get_config(arg: str = "") -> ConfigDict:
    """B/16 on squares, on the data that `arg` names; see `configs.recipes.navit`."""
    c = recipes.navit("vit_b16_square", "B/16", arg, demo_steps=160, demo_lr=3e-4)
    embedded = c.data.source in recipes.EMBEDDED
    side = 48 if embedded else 224
    tokens = (side // 16) ** 2
    c.data.squash = True
    c.resolution.update(min_side=side, max_side=side)
    c.drop.kind = "none"
    c.packing.update(row_length=tokens, rows_per_step=28 if embedded else 1024, images_per_row=1)
    c.eval.update(token_budgets=(tokens,), rows_per_step=0)
    return c
