"""The state that a run starts from: of its newest whole checkpoint, of another run's parameters, or random.

It is made where it will lie: each device computes or reads its own part, so a model that no single device can hold
starts as one that fits everywhere does.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from input_pipeline.errors import UserError
from navit_jax import checkpoint, like, navit, sharding, train_step
from navit_jax.compatibility import other_tokenizer, without_other_classes


class Start(NamedTuple):
    """state: placed arrays. step: how many were trained. snapshot: of the planner behind them; None: a new run."""

    state: train_step.State
    step: int
    snapshot: dict | None


def shapes(params: dict, tx: optax.GradientTransformation, ema: bool, mesh: Mesh) -> train_step.State:
    """The state's shapes, each with its sharding; params: shapes of the parameters."""
    like = jax.eval_shape(lambda p: train_step.init_state(p, tx, ema), params)
    places = sharding.state_shardings(mesh, like)
    return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), like, places)


def restore(checkpoints: checkpoint.Checkpoints, like: train_step.State, meta: dict, evaluate: bool) -> Start | None:
    """From the newest whole checkpoint; None where there is none.

    meta: of this run, which the checkpoint's must allow to go on; to evaluate, only its tokenizer must be the same.
    Raises UserError.
    """

    def check(found: dict) -> None:
        if not evaluate:
            checkpoint.check_compatible(found, meta)
        elif other := other_tokenizer(found, meta["data"]):
            raise UserError(other)

    found = checkpoints.restore_newest(like, check, read_only=evaluate)
    if found is None:
        return None
    step, state, meta_then = found
    tqdm.write(f"resumed at step {step}")
    return Start(state, step, meta_then["snapshot"])


def fresh(
    config: ConfigDict,
    init: Callable[[int], dict],
    tx: optax.GradientTransformation,
    shardings: train_step.State,
    meta: dict,
    whole: bool,
) -> Start:
    """Step 0, `init(seed)` or from `config.init_from`: a run, one of its checkpoints, or whatever `weights.read` takes.

    meta: of this run. whole: the latter must bring every parameter, or UserError.
    """
    params = functools.partial(init, config.seed)
    if config.init_from:
        params = jax.jit(params, out_shardings=shardings["params"])()
        found = _loaded(config)
        notes = [*found.notes, *filter(None, [other_tokenizer(found.meta, meta.get("data", {}))])]
        loaded, note = without_other_classes(found.params, found.meta.get("classes"), meta.get("classes"))
        params, more = checkpoint.init_from(params, loaded)
        notes += [note, *(m for m in more if not m.startswith("The head"))] if note else more
        if notes and whole:
            raise UserError(f"--eval_only needs the whole model of {config.init_from}: {' '.join(notes)}")
        for note in [f"parameters from {found.source or config.init_from}", *notes]:
            tqdm.write(note)
    return Start(train_step.new_state(params, tx, bool(config.optim.ema_decay), shardings), 0, None)


class _Loaded(NamedTuple):
    """params: nested dict. meta: of the run that made them, as far as known. source: a line on them. notes: to say."""

    params: dict
    meta: dict
    source: str = ""
    notes: Sequence[str] = ()


def _loaded(config: ConfigDict) -> _Loaded:
    """The parameters of `config.init_from`."""
    path = config.init_from
    if "://" in path or checkpoint.is_run(path):
        return _Loaded(*checkpoint.restore_params(path))
    from navit_jax import weights  # formats that most runs do not need

    found = weights.read(path)
    tower = getattr(found.cfg, "image", found.cfg)
    here = navit.from_config(config.model, channels=config.data.channels, num_classes=0)
    notes = like.differences(here, tower)
    if notes:
        notes = [f"These weights are of another model, {'; '.join(notes)}: --config.model.like={path} takes theirs."]
    if config.objective == "contrastive" and found.tokenizer not in ("", config.text.tokenizer):
        notes.append(f"Their texts had the tokenizer {found.tokenizer}: set --config.text.tokenizer to it.")
    return _Loaded(found.params, dict(classes=found.classes), found.source, notes)
