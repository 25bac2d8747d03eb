"""What users would pick instead, in torch: `vit-pytorch`'s NaViT and its nested-tensor variant, MONAI's, timm's NaFlex.

Same images, width, depth, heads, MLP and classes, Adam, no dropout and no token dropping. A step starts from a list of
float images in memory, as these libraries take them; packing or padding them is part of it.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F

import benchmarks.torchvision_ops  # noqa: F401, before the peers
from benchmarks.images import LABELS, PATCH, make_images


class Peer:
    """A model, its Adam, and the images as float tensors [3, h, w] in [-1, 1].

    spec: `grids`; `sizes`, width, depth, heads and mlp_dim; `length` or, where it is not ours, `peer_length`,
    tokens a row; `threads`; `device`, the CPU unless said; `updates` of a step, 1 unless said, behind each other
    without waiting for the device; `autocast`: in bfloat16; `collated`: batches that are padded by a loader are so
    before the step.
    """

    def __init__(self, spec: dict):
        torch.set_num_threads(spec.get("threads", 2))
        torch.manual_seed(0)
        grids = np.array(spec["grids"])
        images, labels = make_images(grids, PATCH)
        self.device = spec.get("device", "cpu")
        images = [torch.from_numpy(x).permute(2, 0, 1).float().div(127.5).sub(1).contiguous() for x in images]
        self.images, self.labels = [x.to(self.device) for x in images], torch.from_numpy(labels).to(self.device)
        self.length, self.embedded = spec.get("peer_length", spec["length"]), 0.0
        self.updates, self.collated = spec.get("updates", 1), spec.get("collated", False)
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=spec.get("autocast", False))
        self.model = self.build(PATCH * int(-(-grids.max() // 8) * 8), **spec["sizes"]).to(self.device).train()
        for name, module in self.model.named_modules():
            if name in ("to_patch_embedding", "embeds"):
                module.register_forward_pre_hook(self._mark)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self._make_moments()
        self.info = dict(parameters=sum(p.numel() for p in self.model.parameters()))

    def _mark(self, *_: object) -> None:
        self.embedded = time.perf_counter()

    def _make_moments(self) -> None:
        """Before the base of memory is measured, when ours exist too."""
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def build(self, side: int, *, width: int, depth: int, heads: int, mlp_dim: int) -> torch.nn.Module:
        """side: pixels, of the position tables."""
        raise NotImplementedError

    def forward(self) -> torch.Tensor:
        return self.model(self.images)

    def step(self) -> dict:
        """pack: seconds from the images to the first layer."""
        start = time.perf_counter()
        for _ in range(self.updates):
            self.optimizer.zero_grad(set_to_none=True)
            with self.autocast:
                loss = F.cross_entropy(self.forward(), self.labels)
            loss.backward()
            self.optimizer.step()
        return dict(loss=float(loss.detach()), pack=self.embedded - start)


class VitPytorch(Peer):
    """`vit_pytorch.na_vit`: next-fit rows of at most `length` tokens, a dense mask."""

    def build(self, side, *, width, depth, heads, mlp_dim):
        from vit_pytorch.na_vit import NaViT

        sizes = dict(dim=width, depth=depth, heads=heads, mlp_dim=mlp_dim, dim_head=width // heads)
        return NaViT(image_size=side, patch_size=PATCH, num_classes=LABELS, **sizes)

    def forward(self) -> torch.Tensor:
        return self.model(self.images, group_images=True, group_max_seq_len=self.length)


class VitPytorchNested(Peer):
    """`vit_pytorch.na_vit_nested_tensor`: jagged tensors, no rows."""

    def build(self, side, *, width, depth, heads, mlp_dim):
        from vit_pytorch.na_vit_nested_tensor import NaViT

        sizes = dict(dim=width, depth=depth, heads=heads, mlp_dim=mlp_dim, dim_head=width // heads)
        return NaViT(image_size=side, patch_size=PATCH, num_classes=LABELS, token_dropout_prob=0.0, **sizes)


class Monai(VitPytorch):
    """`monai.networks.nets.NaViT`: the same rows."""

    def build(self, side, *, width, depth, heads, mlp_dim):
        from monai.networks.nets.navit import NaViT

        sizes = dict(hidden_size=width, num_layers=depth, num_heads=heads, mlp_dim=mlp_dim)
        return NaViT(image_size=side, patch_size=PATCH, num_classes=LABELS, in_channels=3, spatial_dims=2, **sizes)


class Timm(Peer):
    """`timm.models.NaFlexVit` on a batch that timm's own collator pads to the longest image."""

    def build(self, side, *, width, depth, heads, mlp_dim):
        from timm.data.naflex_dataset import NaFlexCollator
        from timm.data.naflex_transforms import Patchify
        from timm.models.naflexvit import NaFlexVit

        self.images, self.ready = [x.cpu() for x in self.images], None  # its collator works there
        longest = max(x.shape[1] * x.shape[2] for x in self.images) // PATCH**2
        self.patchify, self.collate = Patchify(PATCH), NaFlexCollator(longest)
        sizes = dict(embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp_dim / width, patch_size=PATCH)
        positions = dict(pos_embed="factorized", pos_embed_grid_size=(side // PATCH, side // PATCH))
        return NaFlexVit(num_classes=LABELS, qk_norm=True, qkv_bias=False, global_pool="map", **sizes, **positions)

    def batch(self) -> dict:
        batch = self.collate([(self.patchify(x), 0) for x in self.images])[0]
        return {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()}

    def forward(self) -> torch.Tensor:
        if self.collated and self.ready is None:
            self.ready = self.batch()
        return self.model(self.ready or self.batch())


SIDES = {"vit-pytorch": VitPytorch, "vit-pytorch nested": VitPytorchNested, "monai": Monai, "timm": Timm}
