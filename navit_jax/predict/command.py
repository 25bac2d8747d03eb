"""What a model says of images: `python -m navit_jax predict MODEL IMAGES...`

    python -m navit_jax predict runs/quickstart-20260101-120000 photos/ --out grid.png --heatmap
    python -m navit_jax predict RUN '*.jpg' --json --budgets 64,256 --escalate 0.3
    python -m navit_jax predict google/siglip2-base-patch16-naflex cat.jpg --classes cat,dog --max-tokens 576

MODEL is a run, one of its checkpoints, an export, or any file, folder or hub name that navit_jax.load takes. IMAGES are
files, folders (all images in them) and patterns. One line an image, in their order; with --json one JSON object a line.
An image that cannot be read has a line that says why.
"""

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from input_pipeline.errors import UserError
from navit_jax import host_memory
from navit_jax.arguments import Parser

if TYPE_CHECKING:
    from navit_jax.predict import Model

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".npy")
MOST_SHOWN = 48  # images of a picture


def parser() -> Parser:
    """The arguments of the command."""
    found = Parser("predict", __doc__)
    found.add_argument("model", help="a run, a checkpoint, an export, another library's weights, or a hub name")
    found.add_argument("images", nargs="+", help="files, folders, patterns such as 'photos/**/*.jpg'")
    found.add_argument("--max-tokens", type=int, help="of an image; default: as the run was trained, else 256")
    found.add_argument("--no-enlarge", action="store_true", help="leave images as they are that have fewer tokens")
    found.add_argument("--top-k", type=int, default=5, help="classes of each image (5)")
    found.add_argument("--classes", help="of a model with a text tower: cat,dog,..., or a file with one a line")
    found.add_argument("--template", action="append", help="a sentence with {} for the class; several: their mean")
    found.add_argument("--tokenizer", help="of its texts, where its files name none: PATH/tokenizer.json or *.model")
    found.add_argument("--json", action="store_true", help="one JSON object a line")
    found.add_argument("--embed", action="store_true", help="vectors instead of classes")
    cascade = found.add_argument_group("cascade: few tokens for all images, more for those in doubt")
    cascade.add_argument("--budgets", type=_numbers, help="tokens, ascending: 64,256")
    cascade.add_argument("--escalate", type=float, help="the least confident share that goes on, such as 0.3")
    cascade.add_argument("--confidence", type=float, help="or the probability below which an image goes on")
    picture = found.add_argument_group("picture")
    picture.add_argument("--out", help=f"where to draw the first {MOST_SHOWN} images with their classes: grid.png")
    picture.add_argument("--heatmap", action="store_true", help="with what each image's vector was made of")
    return found


def main(arguments: list[str]) -> None:
    """Run the command. Raises UserError."""
    args = parser().parse_args(arguments)
    _check(args)
    paths = list(expand(args.images))
    host_memory.keep()  # before numpy and jax start threads
    import jax

    import navit_jax
    from input_pipeline.size_index import cache_dir

    jax.config.update("jax_compilation_cache_dir", str(cache_dir("compilation")))
    options = dict(tokenizer=args.tokenizer) if args.tokenizer else {}
    model = navit_jax.load(args.model, **options)
    classes = _classes(args.classes)
    heat = _heat(model, paths[:MOST_SHOWN], args) if args.heatmap else []  # refused before anything is printed
    able = model.image.num_classes or classes
    silent = not able and args.heatmap and not args.embed  # nothing to say, but something to show
    answers = [None] * len(paths) if silent else _answers(model, iter(paths), classes, args)
    shown, bad = [], 0
    for path, answer in zip(paths, answers, strict=True):
        shown += [answer] if len(shown) < MOST_SHOWN else []
        bad += hasattr(answer, "reason")
        if not silent:
            print(_line(path, answer, args.json), flush=True)
    if args.out:
        _draw(model, paths, shown, heat, args)
    if bad:
        print(f"{bad} of {len(paths)} images could not be read", file=sys.stderr)
        if bad == len(paths):
            sys.exit(2)


def _check(args: argparse.Namespace) -> None:
    """Refuses what can be known before a model is read."""
    if args.heatmap and not args.out:
        raise UserError("--heatmap is drawn into a picture: name it with --out=grid.png")
    if args.embed and (args.budgets or args.classes):
        raise UserError("--embed gives vectors, which neither --budgets nor --classes change: leave one out")
    if args.out:
        from matplotlib.figure import Figure

        known = sorted(Figure().canvas.get_supported_filetypes())
        if Path(args.out).suffix[1:].lower() not in known:
            raise UserError(f"--out={args.out}: expected a picture's name, such as grid.png, or .{', .'.join(known)}")
        folder = Path(args.out).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(args.out, error.strerror) from None
        if not os.access(folder, os.W_OK):
            raise _unwritable(args.out, f"{folder} cannot be written to")


def expand(names: Sequence[str]) -> Iterator[str]:
    """The images that names mean, in their order: those in a folder sorted, at any depth.

    A name that is nothing stays, and is told like an image that cannot be read. Raises UserError for a folder without
    images and a pattern that matches nothing.
    """
    for name in names:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            found = sorted(str(p) for p in Path(path).rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
            if not found:
                raise UserError(f"there is no image in the folder {name}; looked for {', '.join(ENDINGS)}")
            yield from found
        elif glob.has_magic(path) and not os.path.exists(path):
            found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
            if not found:
                raise UserError(f"no file matches {name}")
            yield from found
        else:
            yield path


def _classes(given: str | None) -> list[str] | None:
    """Names from `a,b,c` or from a file with one a line."""
    if given is None:
        return None
    if os.path.isfile(given):
        try:
            given = Path(given).read_text("utf-8-sig").replace("\n", ",")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--classes={given} cannot be read: {error}") from None
    return [name.strip() for name in given.split(",") if name.strip()]


def _numbers(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in given.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 64,256, found {given!r}") from None


def _answers(model: "Model", paths: Iterator[str], classes: list[str] | None, args: argparse.Namespace) -> Iterator:
    size = dict(max_tokens=args.max_tokens, enlarge=not args.no_enlarge)
    if args.embed:
        return model.embed(paths, **size)
    cascade = {name: getattr(args, name) for name in ("budgets", "escalate", "confidence")}
    texts = dict(classes=classes, templates=args.template) if args.template else dict(classes=classes)
    return model.classify(paths, args.top_k, **size, **texts, **cascade)


def _heat(model: "Model", paths: list[str], args: argparse.Namespace) -> list:
    budget = args.budgets[-1] if args.budgets else args.max_tokens
    return model.heatmaps(paths, budget, enlarge=not args.no_enlarge)


def _line(path: str, answer: Any, as_json: bool) -> str:
    """What is printed for one image."""
    if hasattr(answer, "reason"):
        return (
            json.dumps(dict(image=path, error=answer.reason)) if as_json else f"{path}  cannot be read: {answer.reason}"
        )
    if not hasattr(answer, "labels"):
        numbers = [round(float(x), 7) for x in answer]
        return json.dumps(dict(image=path, embedding=numbers)) if as_json else f"{path}  {' '.join(map(str, numbers))}"
    if as_json:
        return json.dumps(dict(image=path, **answer._asdict()))
    best = "  ".join(f"{n} {100 * p:.1f} %" for n, p in zip(answer.labels, answer.probabilities, strict=True))
    return f"{path}  {best}  ({_tokens(answer)})"


def _tokens(answer: Any) -> str:
    rows, columns = answer.grid
    more = f", {answer.spent} over all budgets" if answer.spent > answer.tokens else ""
    return f"{rows}x{columns}: {answer.tokens} tokens{more}"


def _draw(model: "Model", paths: list[str], answers: list, heat: list, args: argparse.Namespace) -> None:
    """Writes the picture. Raises UserError where it cannot be written."""
    from navit_jax.predict import picture
    from navit_jax.predict.images import viewed

    shown = []
    for i, (path, answer) in enumerate(zip(paths, answers)):
        reason = getattr(answer, "reason", "") or getattr(heat[i] if heat else None, "reason", "")
        pixels = None if reason else viewed(path)
        labels, shares = (getattr(answer, name, ())[:5] for name in ("labels", "probabilities"))
        note = reason or (_tokens(answer) if hasattr(answer, "grid") else "")
        shown.append(
            picture.Shown(
                os.path.basename(path), pixels, note, labels, shares, heat[i] if heat and not reason else None
            )
        )
    first = f"the first {len(shown)} of {len(paths)} images" if len(paths) > len(shown) else _count(len(paths))
    about = ", and where each one's vector comes from: the weights of its attention pooling" * bool(heat)
    figure = picture.draw(shown, f"{args.model}", first + about)
    try:
        figure.savefig(args.out, dpi=100 * picture.SCALE)
    except OSError as error:
        raise _unwritable(args.out, error.strerror) from None
    print(f"{args.out}: {_count(len(shown))}", file=sys.stderr)


def _unwritable(out: str, why: str) -> UserError:
    return UserError(f"cannot write {out}: {why}. Give another place with --out.")


def _count(images: int) -> str:
    return f"{images} image{'s' * (images != 1)}"
