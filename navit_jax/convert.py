"""Write weights in another format, or say what they are: `python -m navit_jax convert SOURCE TARGET --to FORMAT`.

    python -m navit_jax convert runs/quickstart-20260101-120000 model --to ours
    python -m navit_jax convert google/siglip2-base-patch16-naflex --info
    python -m navit_jax convert model served.stablehlo --to stablehlo --length 1024 --slots 64

SOURCE is a run, one of its checkpoints, an export, or any file, folder or hub name that `navit_jax.load` takes. Numbers
are not changed on the way: float32 in, float32 out.
"""

import argparse
import importlib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from input_pipeline.errors import UserError
from navit_jax import navit, weights
from navit_jax.arguments import Parser
from navit_jax.contrastive import TwoTowersConfig
from navit_jax.weights import stablehlo

FOLDERS = {  # format: module of navit_jax.weights, what it is
    "ours": ("ours", "safetensors and config.json of this project"),
    "siglip2": ("siglip", "Hugging Face's Siglip2Model or Siglip2VisionModel"),
    "timm": ("timm_vit", "timm's names"),
}
STABLEHLO = "one file for serving, with the parameters inside; needs jax alone"


def parser() -> Parser:
    """The arguments of the command."""
    formats = "; ".join(f"{name}: {about}" for name, (_, about) in FOLDERS.items())
    found = Parser("convert", __doc__)
    found.add_argument("source", help="a path or a hub name")
    found.add_argument("target", nargs="?", help="a folder to write to; of stablehlo a file")
    found.add_argument("--to", choices=(*FOLDERS, "stablehlo"), help=f"{formats}; stablehlo: {STABLEHLO}")
    found.add_argument("--info", action="store_true", help="say what SOURCE is; writes nothing without TARGET")
    found.add_argument("--overwrite", action="store_true", help="replace what is at TARGET")
    group = found.add_argument_group("of --to stablehlo")
    group.add_argument("--rows", type=int, default=1, help="rows of each call (1)")
    group.add_argument("--length", type=int, default=1024, help="tokens of a row (1024)")
    group.add_argument("--slots", type=int, default=64, help="images of a row, at most (64)")
    group.add_argument("--platforms", nargs="+", default=stablehlo.PLATFORMS, help="that run it (cpu cuda tpu)")
    group.add_argument("--dtype", default="float32", help="that it computes in: float32 or bfloat16 (float32)")
    return found


def main(arguments: list[str]) -> None:
    """Convert or describe; see `parser`."""
    args = parser().parse_args(arguments)
    if (
        args.info == (args.target is not None) == (args.to is not None)
        or not args.info
        and not (args.target and args.to)
    ):
        raise UserError("give a TARGET and --to FORMAT, or --info; --help says more")
    if args.target:
        _check_target(Path(args.target), args.overwrite)
    found = weights.read(args.source)
    if args.info:
        print("\n".join(describe(found)))
    if args.target:
        print(f"{_write(found, args)}: {args.source} as {args.to}")


def _check_target(target: Path, overwrite: bool) -> None:
    """Raises UserError where something would be lost."""
    taken = any(target.iterdir()) if target.is_dir() else target.exists()
    if taken and not overwrite:
        raise UserError(f"{target} is there already: name another TARGET, or give --overwrite")


def _write(found: weights.Weights, args: argparse.Namespace) -> Path:
    if args.to == "stablehlo":
        static = {name: getattr(args, name) for name in ("rows", "length", "slots", "platforms", "dtype")}
        return stablehlo.write(found, args.target, **static)
    module = importlib.import_module(f"navit_jax.weights.{FOLDERS[args.to][0]}")
    module.write(found, args.target)
    return Path(args.target)


def describe(found: weights.Weights) -> list[str]:
    """What is known about weights, a line each: sizes, and every field that is not the default of its kind."""
    cfg, kind = found.cfg, "an image tower"
    image = cfg.image if isinstance(cfg, TwoTowersConfig) else cfg
    if image is not cfg:
        kind = f"an image and a text tower into {cfg.embed_dim} dimensions"
    elif cfg.num_classes:
        kind = f"a classifier of {cfg.num_classes} classes"
    lines = [f"{found.source or 'weights'}: {kind}, {navit.count_params(found.params) / 1e6:.1f} M parameters"]
    lines.append(f"image: {_fields(image, ('num_classes', 'head_bias', 'channels'))}, channels {image.channels}")
    if image is not cfg:
        lines += [f"text: {_fields(cfg.text)}", f"tokenizer: {found.tokenizer or 'unknown; --config.text.tokenizer'}"]
    if found.classes:
        lines.append(f"classes: {', '.join(found.classes[:10])}{', ...' * (len(found.classes) > 10)}")
    return lines


def _fields(cfg: Any, without: tuple[str, ...] = ()) -> str:
    free = (*without, "dropout", "stochastic_depth", "remat", "dtype", "attention")
    shown = [
        f for f in fields(cfg) if f.name not in free and (f.default is MISSING or getattr(cfg, f.name) != f.default)
    ]
    return ", ".join(f"{f.name} {getattr(cfg, f.name)}" for f in shown)
