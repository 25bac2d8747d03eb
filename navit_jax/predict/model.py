"""A model that a person can call: images in, vectors, classes or tokens out, in the caller's order.

    model = navit_jax.load("runs/quickstart-20260101-120000")
    model.classify(["cat.jpg", array, pillow_image])[0].labels

Images are packed into rows of a few static shapes, each compiled once (`rows`), so their number and sizes cost
no compilation, and what one answer is does not depend on the others. It runs on one device, the first.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from input_pipeline.errors import UserError
from input_pipeline.packed import Packed
from navit_jax import contrastive, navit
from navit_jax.predict import rows
from navit_jax.predict.cascade import Cascade, Prediction, prediction, probabilities
from navit_jax.predict.heat import check_heat, heat_logits, heat_of
from navit_jax.predict.images import Sizing, in_threads, longest_side, many
from navit_jax.predict.rows import Place
from navit_jax.predict.texts import Texts


class Model:
    """A NaViT or two towers with their parameters; `navit_jax.load` makes one from a file.

    params: nested dict, as `navit.split` gives it. classes: names, of a model with a head; (): their numbers.
    tokenizer: as `text.tokenizer`, of two towers; "": texts cannot be given. lower: they are read in lower case.
    max_tokens: of an image where a call says nothing. bits, background, squash: see `Sizing`. threads: that decode.
    Raises UserError where the number of classes is another than the head's.
    """

    def __init__(
        self,
        cfg: navit.NaViTConfig | contrastive.TwoTowersConfig,
        params: Mapping,
        classes: Sequence[str] = (),
        *,
        tokenizer: str = "",
        lower: bool = True,
        max_tokens: int = 256,
        bits: int = 8,
        background: tuple[int, int, int] = (255, 255, 255),
        squash: bool = False,
        threads: int = 0,
    ):
        self.cfg, self.two_towers = cfg, isinstance(cfg, contrastive.TwoTowersConfig)
        self.image = cfg.image if self.two_towers else cfg
        self.classes = tuple(map(str, classes)) or tuple(map(str, range(self.image.num_classes)))
        if len(self.classes) != self.image.num_classes and self.image.num_classes:
            raise UserError(f"{len(self.classes)} classes are named, but the head has {self.image.num_classes}")
        self.graphdef = (contrastive if self.two_towers else navit).abstract(cfg)[0]
        self.device = jax.devices()[0]
        self.params = jax.device_put(jax.tree.map(jnp.asarray, dict(params)), self.device)
        self.max_tokens, self.threads = max_tokens, threads or rows.cores()
        self._sizing = dict(bits=bits, background=tuple(background), squash=squash)
        self._programs: dict[tuple, Any] = {}
        self._compiling = threading.Lock()
        self._texts = Texts(cfg, tokenizer, lower) if self.two_towers else None

    @property
    def compiled(self) -> int:
        """Programs compiled so far, one for each kind of answer and static shape."""
        return len(self._programs)

    def embed(self, images: Iterable, max_tokens: int | None = None, *, enlarge: bool = True) -> Any:
        """The vector of each image, [D] float32: pooled, of two towers the one of length 1 that texts compare with.

        images: paths, encoded bytes, PIL images, arrays [H, W] or [H, W, C] of uint8 or uint16, also mixed. A list
        gives a list in its order, an iterator a generator that holds a bounded number of images. `Unreadable` stands
        for an image that cannot be used. max_tokens: of an image; enlarge False: smaller ones stay as they are.
        """
        return self._answer(images, "vectors", _vector, max_tokens, enlarge)

    def tokens(self, images: Iterable, max_tokens: int | None = None, *, enlarge: bool = True) -> Any:
        """The tokens of each image on its grid, [rows, columns, D] float32, behind the last norm; see `embed`."""
        return self._answer(images, "tokens", self._grid_of_tokens, max_tokens, enlarge)

    def heatmaps(self, images: Iterable, max_tokens: int | None = None, *, enlarge: bool = True) -> Any:
        """How much of each image's vector comes from where: attention pooling's weights, the mean over its heads.

        [rows, columns] float32 that add up to 1; see `embed`. UserError for a model that pools otherwise.
        """
        check_heat(self.image)
        return self._answer(images, "heat", heat_of, max_tokens, enlarge)

    def classify(
        self,
        images: Iterable,
        top_k: int = 5,
        max_tokens: int | None = None,
        *,
        classes: Sequence[str] | None = None,
        templates: Sequence[str] = ("{}",),
        budgets: Sequence[int] | None = None,
        escalate: float | None = None,
        confidence: float | None = None,
        enlarge: bool = True,
    ) -> Any:
        """The `top_k` likeliest classes of each image, a `Prediction`; images, max_tokens, enlarge: see `embed`.

        classes: of two towers, what to tell apart, in words; templates: sentences with {} for the class, whose mean
        counts. budgets: token budgets of a cascade, ascending. All images see the first; the least confident share
        `escalate` of them (of an iterator: of each 512), or those whose best class has a probability below
        `confidence`, go on to the next. Raises UserError for a model that cannot say classes.
        """
        if not isinstance(top_k, int) or top_k < 1:
            raise UserError(f"top_k is {top_k!r}; expected a whole number from 1 on")
        names, judge, kind = self._judge(classes, templates)

        def read(arrays: list[np.ndarray], place: Place) -> Prediction:
            return prediction(judge(arrays[0][place.row, place.slot]), names, top_k, place.grid)

        if budgets is None:
            if escalate is not None or confidence is not None:
                raise UserError("escalate and confidence are of a cascade: name its budgets, such as budgets=(64, 256)")
            return self._answer(images, kind, read, max_tokens, enlarge)
        if max_tokens is not None:
            raise UserError("give max_tokens, or the budgets of a cascade, not both")
        cascade = Cascade(tuple(budgets), escalate, confidence)
        sizings = [self._size(budget, enlarge) for budget in cascade.budgets]  # refused before the first image
        stages = [functools.partial(self._answers, kind=kind, read=read, sizing=sizing) for sizing in sizings]
        return many(images, lambda images: cascade(images, stages))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of length 1, [n, D] float32, of two towers; their products with `embed`'s are cosines.

        Raises UserError for a model without a text tower or tokenizer, and for a text without tokens.
        """
        if self._texts is None:
            raise UserError("this model has no text tower: texts need two towers, as SigLIP and CLIP have them")
        return self._texts.encode(texts, functools.partial(self._launch, "texts"))

    def _judge(self, classes: Sequence[str] | None, templates: Sequence[str]) -> tuple[tuple, Callable, str]:
        """(class names, what makes probabilities of an answer, the kind of answer that it takes)."""
        if self.two_towers:
            names, vectors_CD = self._texts.class_vectors(classes, templates, self.embed_texts)
            scale, bias = float(np.exp(self.params["logit_scale"])), float(self.params.get("logit_bias", 0))
            kind = "sigmoid" if "logit_bias" in self.params else "softmax"
            return names, lambda z: probabilities(scale * vectors_CD @ z + bias, kind), "vectors"
        if classes is not None:
            raise UserError("classes= are for two towers; this model has no text tower")
        if not self.image.num_classes:
            raise UserError(
                "this model has no head, so it knows no classes: take its vectors (embed), or fit a head to images of "
                "your own: python train.py --config configs/finetune.py:weights=PATH,folder=PATH"
            )
        kind = "sigmoid" if self.image.head_bias else "softmax"  # a sigmoid loss alone gives the head a first bias
        return self.classes, lambda logits: probabilities(logits, kind), "logits"

    def _size(self, max_tokens: int | None, enlarge: bool) -> Sizing:
        cfg = self.image
        return Sizing(
            patch=cfg.patch_size,
            channels=cfg.channels,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            multiple=getattr(cfg, "grid_multiple", 1),
            longest=longest_side(cfg),
            enlarge=enlarge,
            **self._sizing,
        )

    def _answer(self, images: Iterable, kind: str, read: Callable, max_tokens: int | None, enlarge: bool) -> Any:
        sizing = self._size(max_tokens, enlarge)
        return many(images, lambda images: self._answers(images, kind=kind, read=read, sizing=sizing))

    def _answers(self, images: Iterable, *, kind: str, read: Callable, sizing: Sizing) -> Iterator:
        """Of each image, in order."""
        platform, ahead = self.device.platform, 4 * self.threads + 16
        found = enumerate(in_threads(sizing, images, threads=self.threads, ahead=ahead))
        steps = rows.steps(found, sizing.max_tokens, platform=platform, enlarged=sizing.enlarge)
        return rows.in_order(rows.run(steps, functools.partial(self._launch, kind), read))

    def _launch(self, kind: str, packed: Packed) -> tuple[jax.Array, ...]:
        """The program of this kind and these shapes, compiled where it is new, on rows."""
        key = (kind, packed.values.dtype, packed.segment_ids.shape, packed.grids.shape)
        with self._compiling:
            if key not in self._programs:
                run = jax.jit(functools.partial(_forward, self.graphdef, kind))
                with jax.default_device(self.device):
                    self._programs[key] = run.lower(self.params, packed).compile()
        return self._programs[key](self.params, packed)

    def _grid_of_tokens(self, arrays: list[np.ndarray], place: Place) -> np.ndarray:
        merged = getattr(self.image, "grid_multiple", 1)  # patches a side that became one token
        here = slice(place.start // merged**2, place.stop // merged**2)
        sides = (side // merged for side in place.grid)
        return np.array(arrays[0][place.row, here], np.float32).reshape(*sides, -1)


def _forward(graphdef: nnx.GraphDef, kind: str, params: dict, packed: Packed) -> tuple[jax.Array, ...]:
    """What an answer of this kind is read from, one array."""
    model = navit.merge(graphdef, params)
    two_towers = isinstance(model, contrastive.TwoTowers)
    image = model.image if two_towers else model
    match kind:
        case "texts":
            return (model.encode_texts(packed),)
        case "tokens":
            return (image.tokens(packed).astype(jnp.float32),)
        case "heat":
            return (heat_logits(image, packed),)
        case "vectors" if two_towers:
            return (model.encode_images(packed),)
    logits_BKC, extra = image(packed)
    return (logits_BKC if kind == "logits" else extra["pooled"],)


def _vector(arrays: list[np.ndarray], place: Place) -> np.ndarray:
    return np.array(arrays[0][place.row, place.slot], np.float32)
