"""Which training images a few-shot probe learns from.

The seed and the source decide, not the training run: the probes of two models see the same images, and their scores
can be compared.
"""

import dataclasses

import numpy as np

from input_pipeline import keys
from input_pipeline.errors import DecodeError, UserError
from input_pipeline.stream import Images, match_classes


def choose_shots(images: Images, held_out: Images, shots: int, seed: int) -> np.ndarray:
    """Images a class, [C, shots] int64: the first of each in a shuffle of the source that only the seed decides.

    Labels are read along the shuffle until every class has enough: about 30 thousand of ImageNet's 1.28 million for 10
    shots. Raises UserError naming a class with fewer readable images, for multi-label data, and where the two have no
    classes or not the same: a probe needs them also where the objective does not.
    """
    _check_classes(images, held_out)
    source = images.source
    names, size = source.class_names, len(source)
    chosen, files = [[] for _ in names], np.arange(size) if images.files is None else images.files
    used, missing = set(), len(names)
    for start in range(0, size, 1024):
        position = np.arange(start, min(size, start + 1024))
        for i in keys.permute(position, size, seed, np.zeros_like(position)).tolist():
            if not missing:
                return np.array(chosen)
            label = _label(images, i)
            if label >= 0 and len(chosen[label]) < shots and files[i] not in used:  # an image may have several texts
                chosen[label].append(i)
                used.add(files[i])
                missing -= len(chosen[label]) == shots
    if missing:
        label = min(range(len(names)), key=lambda c: len(chosen[c]))
        raise UserError(
            f"{shots} shots a class are asked for, but {names[label]!r} has {len(chosen[label])} readable training "
            f"images. Set --config.eval.fewshot_shots={max(1, len(chosen[label]))}, or () for no probe."
        )
    return np.array(chosen)


def _label(images: Images, i: int) -> int:
    """The class of image i; -1 where it has none or cannot be read."""
    if images.sizes[i].min() == 0:
        return -1
    try:
        label = images.source[i].label
    except (DecodeError, OSError):
        return -1
    if isinstance(label, tuple):
        raise UserError(
            "the few-shot probe needs one class an image: set --config.eval.fewshot_shots=() for multi-label"
        )
    return int(label)


def _check_classes(images: Images, held_out: Images) -> None:
    try:
        match_classes(dataclasses.replace(images, texts=None), held_out)  # as of a run that learns classes
        if not held_out.source.class_names:
            raise UserError("the held-out images have none")
    except UserError as error:
        raise UserError(
            "the few-shot probe needs the classes that --config.data.label_field names; "
            f"--config.eval.fewshot_shots=() turns it off: {error}"
        ) from None
