"""NaViT-B/16 and a text tower, trained on images with texts.

python train.py --config configs/navit_clip_b16.py                  # embedded shapes with captions
python train.py --config configs/navit_clip_b16.py:folder=PATH      # PATH/captions.csv: file_name,text
python train.py --config configs/navit_clip_b16.py:tar=GLOB         # WebDataset: 0001.jpg + 0001.txt or .json

Shapes: loss 2.91 over the first fifth, 1.48 over the last; 160 steps in 8 min on two CPU cores that were shared. That
shows the job and teaches little, zero-shot 21.6 % of six classes, text-to-image R@1 14 %: `navit_clip_quickstart` is
the one that learns. Folders and shards: not run at length.
"""

from ml_collections import ConfigDict

from configs import base, recipes


def get_config(arg: str = "") -> ConfigDict:
    """Two towers on the images with texts that `arg` names; "": the embedded shapes."""
    c = base.get_config()
    c.name, c.objective, c.model.variant = "navit_clip_b16", "contrastive", "B/16"
    recipes.use_data(c, arg or "shapes")
    if c.data.source not in recipes.EMBEDDED:
        return recipes.captions(c)
    recipes.demo(c, steps=160, lr=3e-4)
    c.text.update(width=256, depth=4, heads=4, mlp_dim=1024)
    c.optim.weight_decay = ((".*kernel$", 0.03),)
    return c
