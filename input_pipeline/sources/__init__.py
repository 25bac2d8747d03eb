"""Where images come from: `open_source` turns one string of the config into random access to (bytes, label) and text.

Kinds are a plain dict: a new one is a function here and a file beside this one. Sources decode nothing and know nothing
of training, and their libraries are imported when a kind is opened, so no user needs all of them.
"""

import difflib
import os

from input_pipeline.errors import UserError
from input_pipeline.sources import captions, datasets, embedded, records, shapes, tar
from input_pipeline.sources.base import Record, Source, refuse_multi_label

__all__ = ["Record", "Source", "open_source"]

EMBEDDED = {"digits": embedded.DigitsSource, "shapes": shapes.ShapesSource, "photos": embedded.PhotosSource}
STORED = {
    "tfds": datasets.TfdsSource,
    "array_record": records.ArrayRecordSource,
    "tar": tar.TarSource,
    "hf": datasets.HuggingFaceSource,
}
CHOICES = "digits | shapes | photos | folder=PATH | tfds=NAME | array_record=GLOB | tar=GLOB | hf=PATH"
KINDS = (*EMBEDDED, "folder", *STORED)


def open_source(
    spec: str,
    split: str,
    *,
    image_field: str = "image",
    label_field: str = "label",
    text_field: str = "",
    multi_label: bool = False,
    hold_out: bool = True,
) -> Source:
    """The images of one split.

    spec: digits | shapes | photos | folder=PATH | tfds=NAME | array_record=GLOB | tar=GLOB | hf=PATH.
    split: train or validation; TFDS and Hugging Face data take their own names, TFDS also slices.
    image_field, label_field, text_field: in TFDS, ArrayRecord, Hugging Face and the JSON of tar shards; the latter two
    in captions files as well. label_field "": no labels; text_field "": text or caption, if there is one.
    hold_out: whether data without splits is split by a hash, a tenth for validation; False: every split is all of it,
    for a run whose evaluation data is named separately. Raises UserError.
    """
    kind, _, where = spec.partition("=")
    fields = records.Fields(image_field, label_field, multi_label, text_field)
    if kind in EMBEDDED and not where:
        refuse_multi_label(multi_label, kind)
        return EMBEDDED[kind](split)
    if kind == "folder" and where:
        refuse_multi_label(multi_label, kind)
        return captions.open_folder(where, split, fields, hold_out)
    if kind in STORED and where:
        return STORED[kind](where, split, fields, hold_out)
    raise UserError(f"data.source={spec!r}: {_hint(spec, kind)}expected one of {CHOICES}")


def _hint(spec: str, kind: str) -> str:
    if kind in KINDS and kind not in EMBEDDED:
        return f"{kind} needs to know where, "
    if kind in EMBEDDED:
        return f"{kind} takes no value, "
    if os.path.exists(spec):
        return f"a folder of images is given as folder={spec}; "
    near = difflib.get_close_matches(kind, KINDS, n=1)
    return f"did you mean {near[0]}? " if near else ""
