"""The peers of `benchmarks.packed_inference`: transformers' SigLIP 2 and timm's NaFlexViT, batched as they do it.

Images are in memory; patches are cut by reshaping, without a resize, and padded to the longest image of the batch or to
a fixed number, as the processors of both libraries do. Of transformers with its default attention (sdpa).
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import benchmarks.torchvision_ops  # noqa: F401, before the peers
from benchmarks.images import PATCH, make_images


class Peer:
    """spec: `grids`; `sizes`, width, depth, heads, mlp_dim; `batch`, images at a time; `pad`, tokens that a batch is
    padded to, 0: its longest; `sorted`: batches of images of similar size; `threads`; `weights`, where it is saved."""

    def __init__(self, spec: dict):
        torch.set_num_threads(spec["threads"])
        torch.manual_seed(0)
        images, _ = make_images(np.array(spec["grids"]), PATCH)
        self.images = [torch.from_numpy(x) for x in images]
        self.batch, self.pad = spec["batch"], spec["pad"]
        tokens = np.prod(spec["grids"], axis=1)
        self.order = np.argsort(-tokens, kind="stable").tolist() if spec["sorted"] else list(range(len(images)))
        self.model = self.build(**spec["sizes"]).eval()
        for p in self.model.parameters():  # zeros and ones of a fresh model would hide a difference
            if p.ndim < 2:
                p.data.add_(0.1 * torch.randn_like(p))
        folder = Path(spec["weights"])
        if not folder.exists():
            self.save(folder)
        padded = sum(len(m) * (self.pad or int(tokens[m].max())) for m in self.batches())
        self.info = dict(parameters=sum(p.numel() for p in self.model.parameters()), padded=int(padded))

    def build(self, *, width: int, depth: int, heads: int, mlp_dim: int) -> torch.nn.Module:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def forward(self, patches: torch.Tensor, mask: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """[n, D] of patches [n, L, P] in [-1, 1], mask [n, L] bool, grids [n, 2]."""
        raise NotImplementedError

    def batches(self) -> Iterator[list[int]]:
        return (self.order[i : i + self.batch] for i in range(0, len(self.order), self.batch))

    def run(self) -> torch.Tensor:
        found: list = [None] * len(self.images)
        with torch.inference_mode():
            for members in self.batches():
                for i, vector in zip(members, self.forward(*self.padded(members)), strict=True):
                    found[i] = vector
        return torch.stack(found)

    def padded(self, members: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sides = torch.tensor([[n // PATCH for n in self.images[i].shape[:2]] for i in members])
        length = self.pad or int(sides.prod(1).max())
        patches = torch.zeros(len(members), length, PATCH * PATCH * 3)
        for row, i in enumerate(members):
            h, w = sides[row].tolist()
            cells = self.images[i].reshape(h, PATCH, w, PATCH, 3).permute(0, 2, 1, 3, 4).reshape(h * w, -1)
            patches[row, : h * w] = cells.float().div_(127.5).sub_(1)
        return patches, torch.arange(length) < sides.prod(1, keepdim=True), sides

    def step(self) -> dict:
        return dict(loss=float(self.run().mean()), pack=0.0)

    def vectors(self) -> dict:
        return dict(vectors=self.run().tolist())


class Siglip2(Peer):
    """`transformers.Siglip2VisionModel`; its processor pads to max_num_patches."""

    def build(self, *, width, depth, heads, mlp_dim):
        from transformers import Siglip2VisionConfig, Siglip2VisionModel

        sizes = dict(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=mlp_dim)
        return Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=PATCH, num_patches=256))

    def save(self, folder):
        self.model.save_pretrained(folder)

    def forward(self, patches, mask, grids):
        return self.model(patches, pixel_attention_mask=mask.to(torch.int32), spatial_shapes=grids).pooler_output


class Timm(Peer):
    """`timm.models.NaFlexVit` with a learned table and attention pooling; its collator pads to the longest."""

    def build(self, *, width, depth, heads, mlp_dim):
        import timm

        sizes = dict(embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp_dim / width, patch_size=PATCH)
        return timm.create_model("naflexvit_base_patch16_map", num_classes=0, **sizes)

    def save(self, folder):
        from timm.models._hub import save_for_hf

        self.model.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        save_for_hf(self.model, folder, safe_serialization=True)

    def forward(self, patches, mask, grids):
        w = grids[:, 1]
        at = torch.arange(patches.shape[1]).expand(len(grids), -1)
        coord = torch.stack([at // w[:, None], at % w[:, None]], dim=-1) * mask[..., None]
        batch = dict(patches=patches, patch_coord=coord, patch_valid=mask)
        return self.model(batch)


SIDES = {"inference siglip2": Siglip2, "inference timm": Timm}
