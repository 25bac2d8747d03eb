"""What shapes a NaViT: every field of a model with its checks, and the variants of the papers by name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from ml_collections import ConfigDict

from input_pipeline.errors import UserError
from navit_jax import merger, pooling, positions, transformer

SIZES = {  # width, depth, heads, mlp_dim
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "So400m": (1152, 27, 16, 4304),
    "g": (1408, 40, 16, 6144),
}
PATCH_SIZES = (8, 14, 16, 32)
OVERRIDES = ("width", "depth", "heads", "mlp_dim", "patch_size")  # 0: the variant's


@dataclass(frozen=True, kw_only=True)
class NaViTConfig(transformer.EncoderConfig, positions.PositionConfig):
    """Everything that shapes a model; UserError where fields contradict each other. num_classes 0: no head."""

    patch_size: int
    channels: int = 3
    num_classes: int = 0
    head_bias: float = 0.0  # initial: -log(C) with a sigmoid loss, or the first steps only learn that most are absent
    stored_patch_size: int = 0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    embed_norm: str = "none"
    pool: str = "map"
    registers: int = 0
    norm_tokens: bool = True
    norm_pooled: bool = False
    pre_logits: int = 0
    window: int = 0
    full_blocks: tuple[int, ...] = ()
    merge: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_positions(self.width, self.head_dim)
        for field, known in (("pool", pooling.KINDS), ("embed_norm", ("none", "after", "both", "entry"))):
            if getattr(self, field) not in known:
                raise UserError(f"model.{field} is {getattr(self, field)!r}; it must be one of {', '.join(known)}")
        for field in ("patch_size", "channels"):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field} is {getattr(self, field)}; it must be at least 1")
        for field in ("registers", "stored_patch_size", "num_classes", "pre_logits", "window", "merge"):
            if getattr(self, field) < 0:
                raise UserError(f"model.{field} is {getattr(self, field)}; it must not be negative")
        if self.pool == "first" and not self.registers:
            raise UserError("model.pool is 'first', the first register, and model.registers is 0; set it to 1 or more")
        for field in ("mean", "std"):
            if len(getattr(self, field)) not in (1, self.channels):
                raise UserError(
                    f"model.{field} is {getattr(self, field)}; expected one number, or one for each of the "
                    f"{self.channels} channels"
                )
        if min(self.std) <= 0:
            raise UserError(f"model.std is {self.std}; expected numbers above 0")
        self._check_windows()

    def _check_windows(self) -> None:
        if self.full_blocks and not self.window:
            raise UserError(
                f"model.full_blocks is {self.full_blocks} and model.window 0, so every block is full: set window to "
                "the patches of a window's side, or full_blocks to ()"
            )
        if any(not 0 <= i < self.depth for i in self.full_blocks):
            raise UserError(f"model.full_blocks is {self.full_blocks}; the blocks are 0 to {self.depth - 1}")
        if self.merge and self.pool != "mean":
            raise UserError(f"model.pool is {self.pool!r}; merged tokens (model.merge) take 'mean' only: set it so")

    @property
    def grid_multiple(self) -> int:
        """What both sides of every image's grid must be a multiple of."""
        return merger.SIDE if self.merge else 1

    @property
    def token_width(self) -> int:
        """Of the tokens that the model gives, and of `pooled`."""
        return self.merge or self.width


CONFIG_FIELDS = tuple(  # of configs.base.model, taken over as they are
    field.name
    for field in fields(NaViTConfig)
    if field.name not in (*OVERRIDES, "channels", "num_classes", "head_bias")
)


def variant(name: str) -> dict[str, int]:
    """Sizes of a variant such as 'B/16': width, depth, heads, mlp_dim, patch_size. UserError for an unknown name."""
    size, _, patch = name.partition("/")
    if size not in SIZES or patch not in map(str, PATCH_SIZES):
        patches = ", ".join(f"/{p}" for p in PATCH_SIZES)
        raise UserError(f"unknown model.variant {name!r}; write one of {', '.join(SIZES)} and one of {patches}: 'B/16'")
    return dict(zip(("width", "depth", "heads", "mlp_dim"), SIZES[size])) | {"patch_size": int(patch)}


def from_config(model: ConfigDict | Mapping, *, channels: int, num_classes: int, head_bias: float = 0.0) -> NaViTConfig:
    """The model that `configs.base.model` describes; its sizes and patch size override the variant's where not 0.

    Raises UserError for an unknown variant and for sizes that do not fit together.
    """
    sizes = variant(model["variant"]) | {name: model[name] for name in OVERRIDES if model[name]}
    shared = {name: tuple(x) if isinstance(x := model[name], list) else x for name in CONFIG_FIELDS}
    return NaViTConfig(**sizes, **shared, channels=channels, num_classes=num_classes, head_bias=head_bias)
