"""Train, resume or evaluate a packed NaViT: `python train.py --config configs/navit_b16.py`.

Joins the two halves, rows (`input_pipeline`) and model (`navit_jax`), and holds the loop; no maths. A step is
dispatched before the one before it is looked at, so the device never waits for the host's bookkeeping; a step is
saved only once its loss was seen finite.
"""

import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from input_pipeline import shots, stream
from input_pipeline.errors import UserError
from input_pipeline.size_index import cache_dir
from navit_jax import checkpoint, cli, losses, metrics, navit, optim, sharding, startup, train_step, writers
from navit_jax.evaluators import classification, fewshot, outputs

WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; one that exists is resumed. Default: runs/<config>-<time>."
)
EVAL_ONLY = flags.DEFINE_bool(
    "eval_only", False, "Evaluate the checkpoint in --workdir (or config.init_from) and stop."
)

log = logging.getLogger(__name__)


def main(config: ConfigDict) -> None:
    workdir = Path(WORKDIR.value or f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    startup.prepare(workdir, new=not WORKDIR.value)
    jax.config.update("jax_compilation_cache_dir", str(cache_dir("compilation")))
    run = build(config, workdir)
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=1))
    if EVAL_ONLY.value:
        if not run.start and not config.init_from:
            raise UserError(
                f"--eval_only found no checkpoint in {workdir}. Give --workdir of a run, or --config.init_from=PATH."
            )
        evaluate(run, run.start, writers.MetricWriter(workdir, resume_step=None))
    else:
        train(run)


def build(config: ConfigDict, workdir: Path) -> SimpleNamespace:
    """Everything a run needs: data, model, optimizer, compiled functions, and the state to start from."""
    mesh = sharding.make_mesh(config.packing.rows_per_step)
    train_images, eval_images = stream.open_images(config, "train"), stream.open_images(config, "eval")
    stream.check_classes(train_images, eval_images)
    rows = stream.train_stream(config, train_images)
    classes = len(train_images.source.class_names)
    total = stream.total_steps(config, rows)
    head_bias = -float(np.log(classes)) if config.loss.kind == "sigmoid" else 0.0
    model = navit.from_config(config.model, channels=config.data.channels, num_classes=classes, head_bias=head_bias)
    startup.describe(config, rows, len(eval_images.sizes), model, total)
    graph, shapes = navit.abstract(model)
    tx, schedule = optim.make_optimizer(config.optim, shapes, total)
    run = SimpleNamespace(
        config=config,
        workdir=workdir,
        mesh=mesh,
        rows=rows,
        train_images=train_images,
        eval_images=eval_images,
        model=model,
        graph=graph,
        total=total,
        schedule=schedule,
        start=0,
        snapshot=None,
        forward=train_step.make_forward(graph, mesh),
        meta=dict(config=json.loads(config.to_json_best_effort()), data=stream.fingerprint(train_images)),
        checkpoints=checkpoint.Checkpoints(workdir / "checkpoints", config.keep_checkpoints, best_metric(config)),
    )
    run.step = train_step.make_train_step(
        graph,
        tx,
        losses.make_loss(config.loss),
        mesh,
        accumulate=config.optim.accumulate_steps,
        ema_decay=config.optim.ema_decay,
        seed=config.seed,
    )
    restore(run, tx, shapes)
    return run


def restore(run: SimpleNamespace, tx: object, shapes: dict) -> None:
    """The state of the newest checkpoint, or a new one (from `init_from` where that is set)."""
    config, latest = run.config, run.checkpoints.latest()
    place = sharding.replicated(run.mesh)
    if latest is None:
        params = navit.init_params(run.model, config.seed)
        if config.init_from:
            loaded, _ = checkpoint.restore_params(config.init_from)
            params, notes = checkpoint.init_from(params, loaded)
            for note in [f"parameters from {config.init_from}", *notes]:
                tqdm.write(note)
        run.state = jax.device_put(train_step.init_state(params, tx, bool(config.optim.ema_decay)), place)
        return
    meta = run.checkpoints.restore_meta(latest)
    if not EVAL_ONLY.value:
        checkpoint.check_compatible(meta, run.meta)
    like = jax.eval_shape(lambda p: train_step.init_state(p, tx, bool(config.optim.ema_decay)), shapes)
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), like)
    run.state, _ = run.checkpoints.restore(latest, like)
    run.start, run.snapshot = latest, meta["snapshot"]
    tqdm.write(f"resumed at step {latest}")


def train(run: SimpleNamespace) -> None:
    """The loop: dispatch a step, then look at the one before; log, evaluate and save where they are due."""
    config, total, mesh = run.config, run.total, run.mesh
    if run.start >= total:
        return print(f"nothing to do: {run.workdir} is at step {run.start} of {total}; --eval_only evaluates it")
    stop, count = startup.StopSignal(), config.packing.rows_per_step
    loader = run.rows.loader(total, start=run.start, snapshot=run.snapshot, local=sharding.local_rows(mesh, count))
    writer = writers.MetricWriter(run.workdir, resume_step=run.start)
    peak, peak_name = metrics.peak_flops(jax.devices()[0], run.model.compute_dtype)
    print(f"MFU is against {peak_name}", flush=True)
    meter = metrics.Meter(peak * jax.device_count())
    bar = tqdm(total=total, initial=run.start, unit="step", dynamic_ncols=True, mininterval=1.0)
    step, pending, compiled = run.start, None, None
    for batch, info in loader:
        host, batch_on_device = host_numbers(run.model, batch, info), sharding.put(mesh, batch, count)
        if compiled is None:
            compiled = startup.compile_step(run.step, run.state, batch_on_device)
            meter.restart()
        run.state, sums = compiled(run.state, batch_on_device)
        if pending:
            settle(run, meter, bar, *pending)
        step += 1
        pending = (step, batch.index, host, sums)
        due = {k: step == total or _every(step, config[f"{k}_every_steps"]) for k in ("log", "checkpoint", "eval")}
        if not (any(due.values()) or stop.requested):
            continue
        # Also at a checkpoint, so that no mean in metrics.jsonl spans one: a resumed run writes the same lines.
        settle(run, meter, bar, *pending)
        pending = None
        writer.write(step, meter.flush() | {"train/lr": float(run.schedule(step - 1))})
        scores = evaluate(run, step, writer) if due["eval"] else {}
        if due["checkpoint"] or stop.requested:
            run.checkpoints.save(step, run.state, run.meta | dict(snapshot=info.snapshot), scores)
        meter.restart()
        if stop.requested:
            break
    bar.close()
    stop.release()
    run.checkpoints.close()
    writer.close()
    writers.plot_loss(run.workdir / "metrics.jsonl", run.workdir / "loss.png")
    startup.finish(run.workdir, step, total)


def settle(
    run: SimpleNamespace, meter: metrics.Meter, bar: tqdm, step: int, index: np.ndarray, host: dict, sums: dict
) -> None:
    """Look at a dispatched step: numbers that are not finite stop the run before anything of it is saved."""
    sums = {name: float(value) for name, value in jax.device_get(sums).items()}
    if not np.isfinite([sums["loss"], sums["grad_norm"]]).all():
        raise UserError(non_finite(run, step, index, sums))
    meter.add(sums, **host)
    bar.set_postfix_str(metrics.line(meter.peek()), refresh=False)
    bar.update()


def _every(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def host_numbers(model: navit.NaViTConfig, batch: object, info: object) -> dict:
    """What a step's rows hold: slots of tokens, useful training FLOPs, unusable images."""
    ids = batch.images.segment_ids
    lengths = np.bincount((ids + np.arange(len(ids))[:, None] * (ids.max() + 1))[ids > 0])
    flops = 3 * navit.flops_forward(model, lengths[lengths > 0])  # backward is two forwards' products
    return dict(slots=ids.size, flops=flops, skipped=len(info.bad))


def evaluate(run: SimpleNamespace, step: int, writer: writers.MetricWriter) -> dict:
    """Accuracy at every token budget, and the few-shot probe where it is asked for."""
    config, train_images, images = run.config, run.train_images, run.eval_images
    params, classes = run.state.get("ema", run.state["params"]), len(images.source.class_names)
    put = outputs.putter(run.mesh, stream.eval_rows(config))
    budgets = sorted(set(config.eval.token_budgets))
    loaders = stream.eval_loaders(config, [(images, budget, None) for budget in budgets])
    scores = classification.at_budgets(
        run.forward,
        params,
        dict(zip(budgets, loaders, strict=True)),
        put,
        num_classes=classes,
        multi_label=config.data.multi_label,
        probabilities=config.loss.kind,
        workdir=run.workdir,
    )
    if config.eval.fewshot_shots:
        chosen_CS = shots.choose_shots(train_images, max(config.eval.fewshot_shots), config.seed)
        wanted = [(train_images, budgets[-1], np.sort(chosen_CS.ravel())), (images, budgets[-1], None)]
        scores |= fewshot.run(
            run.forward,
            params,
            *stream.eval_loaders(config, wanted),
            put,
            chosen_CS=chosen_CS,
            shots=config.eval.fewshot_shots,
            num_classes=classes,
            ridge=config.eval.fewshot_ridge,
        )
    writer.write(step, scores)
    tqdm.write(f"step {step}: " + "  ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in scores.items()))
    return scores


def best_metric(config: ConfigDict) -> str:
    kind = "map" if config.data.multi_label else "top1"
    return config.best_metric or f"eval/{kind}@{max(config.eval.token_budgets)}"


def non_finite(run: SimpleNamespace, step: int, index: np.ndarray, sums: dict) -> str:
    images = index[index >= 0].tolist()
    names = [run.train_images.source.describe(i) for i in images[:3]]
    return (
        f"step {step}: loss {sums['loss']:g}, gradient norm {sums['grad_norm']:g}: not finite, nothing of it was "
        "saved. The last "
        f"checkpoint is step {run.checkpoints.latest()}. Images of the batch (index in the source): {images}, the "
        "first of "
        f"them {names}. Lower --config.optim.lr, raise warmup_steps, or set clip_norm, and resume."
    )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cli.run(main)
