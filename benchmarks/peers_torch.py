"""What users would pick instead, in torch: `vit-pytorch`'s NaViT and its nested-tensor variant, MONAI's, timm's NaFlex.

Same images, width, depth, heads and MLP, Adam, no dropout and no token dropping. A step starts from a list of float
images in memory, as these libraries take them; packing them is part of it.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.images import LABELS, make_images

MODEL = dict(dim=192, depth=12, heads=3, mlp_dim=768)
PATCH = 16


class Peer:
    """A model, its Adam, and the images as float tensors [3, h, w]."""

    def __init__(self, spec: dict):
        torch.set_num_threads(spec.get("threads", 2))
        torch.manual_seed(0)
        grids = np.array(spec["grids"])
        images, labels = make_images(grids, PATCH)
        self.images = [torch.from_numpy(x).permute(2, 0, 1).float().div(127.5).sub(1).contiguous() for x in images]
        self.labels = torch.from_numpy(labels)
        self.length = spec.get("length", 0)
        self.sizes = MODEL | spec.get("sizes", {})
        side = PATCH * int(-(-grids.max() // 8) * 8)
        shared = dict(image_size=side, patch_size=PATCH, num_classes=LABELS, dim_head=64)
        self.model = self.build(**self.sizes, **shared).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.warm()
        self.info = dict(parameters=sum(p.numel() for p in self.model.parameters()))

    def warm(self) -> None:
        """The optimizer's moments exist before the base of memory is measured, as ours do."""
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self) -> torch.Tensor:
        return self.model(self.images)

    def step(self) -> dict:
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.forward(), self.labels)
        loss.backward()
        self.optimizer.step()
        return dict(loss=float(loss.detach()), pack=self.packing())

    def packing(self) -> float:
        return 0.0


def vit_pytorch(module: str) -> ModuleType:
    """A module of the package without its __init__, which needs a torchvision that fits torch for unrelated models."""
    package = ModuleType("vit_pytorch")
    package.__path__ = importlib.util.find_spec("vit_pytorch").submodule_search_locations
    sys.modules.setdefault("vit_pytorch", package)
    return importlib.import_module(f"vit_pytorch.{module}")


class VitPytorch(Peer):
    """`vit_pytorch.na_vit`: next-fit rows of at most `length` tokens, a dense mask."""

    def build(self, **sizes: int) -> torch.nn.Module:
        return vit_pytorch("na_vit").NaViT(**sizes)

    def forward(self) -> torch.Tensor:
        return self.model(self.images, group_images=True, group_max_seq_len=self.length)


class VitPytorchNested(Peer):
    """`vit_pytorch.na_vit_nested_tensor`: jagged tensors, no rows."""

    def build(self, **sizes: int) -> torch.nn.Module:
        return vit_pytorch("na_vit_nested_tensor").NaViT(**sizes, token_dropout_prob=0.0)


class Monai(Peer):
    """`monai.networks.nets.NaViT`."""

    def build(self, **sizes: int) -> torch.nn.Module:
        raise NotImplementedError


class Timm(Peer):
    """`timm.models.NaFlexVit` on a batch padded to the longest image, as its loader makes it."""

    def build(self, *, dim: int, depth: int, heads: int, mlp_dim: int, **_: int) -> torch.nn.Module:
        raise NotImplementedError


SIDES = {"vit-pytorch": VitPytorch, "vit-pytorch nested": VitPytorchNested, "monai": Monai, "timm": Timm}
