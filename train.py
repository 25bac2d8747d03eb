"""Train, resume or evaluate a packed NaViT: `python train.py --config configs/navit_b16.py`.

Joins the two halves, rows (`input_pipeline`) and model (`navit_jax`), and holds the loop; no maths. A step is
dispatched before the one before it is looked at, so the device never waits for the host's bookkeeping; a step is
saved only once its loss was seen finite.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from input_pipeline import checks, shots, stream
from input_pipeline.errors import UserError
from input_pipeline.size_index import cache_dir
from navit_jax import checkpoint, cli, console, losses, metrics, navit, optim, sharding, train_step, writers
from navit_jax.evaluators import classification, fewshot, outputs

WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; resumed where it exists. Default: runs/<config>-<time>."
)
EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate the run in --workdir (or config.init_from) and stop.")


def main(config: ConfigDict) -> None:
    workdir = console.open_workdir(WORKDIR.value, config.name, must_exist=EVAL_ONLY.value and not config.init_from)
    jax.config.update("jax_compilation_cache_dir", str(cache_dir("compilation")))
    checks.check(config)
    run = build(config, workdir)
    if not EVAL_ONLY.value:
        return train(run)
    if not run.start and not config.init_from:
        raise UserError(
            f"--eval_only found no checkpoint in {workdir}. Give --workdir of a run or --config.init_from=RUN."
        )
    writer = writers.MetricWriter(workdir, resume_step=None)
    evaluate(run, run.start, writer)
    writer.close()


def build(config: ConfigDict, workdir: Path) -> SimpleNamespace:
    """Everything a run needs: data, model, optimizer, compiled functions, and the state to start from."""
    navit.variant(config.model.variant)
    mesh = sharding.make_mesh(config.packing.rows_per_step)
    train_images = stream.open_images(config, "train")
    eval_images = stream.match_classes(train_images, stream.open_images(config, "eval"))
    rows, classes = stream.train_stream(config, train_images), train_images.classes
    total = stream.total_steps(config, rows)
    console.fit_schedule(config.optim, total)
    head_bias = -float(np.log(classes)) if config.loss.kind == "sigmoid" else 0.0
    model = navit.from_config(config.model, channels=config.data.channels, num_classes=classes, head_bias=head_bias)
    graph, shapes = navit.abstract(model)
    tx, schedule = optim.make_optimizer(config.optim, shapes, total)
    options = dict(accumulate=config.optim.accumulate_steps, ema_decay=config.optim.ema_decay, seed=config.seed)
    best = "map" if config.data.multi_label else "top1"
    best = config.best_metric or f"eval/{best}@{max(config.eval.token_budgets)}"
    console.describe(config, rows, len(eval_images.sizes), model, total)
    run = SimpleNamespace(
        config=config,
        workdir=workdir,
        mesh=mesh,
        rows=rows,
        model=model,
        total=total,
        schedule=schedule,
        evaluations=prepare_evaluations(config, train_images, eval_images, mesh),
        forward=train_step.make_forward(graph, mesh),
        step=train_step.make_train_step(graph, tx, losses.make_loss(config.loss), mesh, **options),
        meta=dict(config=json.loads(config.to_json_best_effort()), data=stream.fingerprint(train_images)),
        checkpoints=checkpoint.Checkpoints(workdir / "checkpoints", config.keep_checkpoints, best),
    )
    restore(run, tx, shapes)
    return run


def restore(run: SimpleNamespace, tx: object, shapes: dict) -> None:
    """The state of the newest checkpoint, or a new one (from `init_from` where that is set)."""
    config, latest = run.config, run.checkpoints.latest()
    place, ema = sharding.replicated(run.mesh), bool(config.optim.ema_decay)
    if latest is None:
        run.start, run.snapshot = 0, None
        params = navit.init_params(run.model, config.seed)
        if config.init_from:
            loaded, _ = checkpoint.restore_params(config.init_from)
            params, notes = checkpoint.init_from(params, loaded)
            if notes and EVAL_ONLY.value:
                raise UserError(f"--eval_only needs the whole model of {config.init_from}: {' '.join(notes)}")
            for note in [f"parameters from {config.init_from}", *notes]:
                tqdm.write(note)
        run.state = jax.device_put(train_step.init_state(params, tx, ema), place)
        return
    meta = run.checkpoints.restore_meta(latest)
    if not EVAL_ONLY.value:
        checkpoint.check_compatible(meta, run.meta)
    like = jax.eval_shape(lambda p: train_step.init_state(p, tx, ema), shapes)
    like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), like)
    run.state, _ = run.checkpoints.restore(latest, like)
    run.start, run.snapshot = latest, meta["snapshot"]
    tqdm.write(f"resumed at step {latest}")


def train(run: SimpleNamespace) -> None:
    """Train to the last step, or to a signal; what was begun to be saved is saved also when something fails."""
    if run.start >= run.total:
        return print(f"nothing to do: {run.workdir} is at step {run.start} of {run.total}; --eval_only evaluates it")
    writer, stop = writers.MetricWriter(run.workdir, resume_step=run.start), console.StopSignal()
    bar = tqdm(total=run.total, initial=run.start, unit="step", dynamic_ncols=True, mininterval=1.0)
    try:
        console.write_config(run.workdir, run.config)
        step = loop(run, writer, stop, bar)
    finally:
        bar.close()
        stop.release()
        run.checkpoints.close()
        writer.close()
    writers.plot_loss(run.workdir / "metrics.jsonl", run.workdir / "loss.png")
    console.finish(run.workdir, step, run.total)


def loop(run: SimpleNamespace, writer: writers.MetricWriter, stop: console.StopSignal, bar: tqdm) -> int:
    """Dispatch a step, then look at the one before; log, evaluate and save where due. Returns the last step."""
    config, total, mesh, count = run.config, run.total, run.mesh, run.config.packing.rows_per_step
    peak, peak_name = metrics.peak_flops(jax.devices()[0], run.model.compute_dtype)
    tqdm.write(f"MFU is against {peak_name}")
    meter, step, pending, compiled = metrics.Meter(peak * jax.device_count()), run.start, None, None
    for batch, info in run.rows.loader(
        total, start=run.start, snapshot=run.snapshot, local=sharding.local_rows(mesh, count)
    ):
        host, batch_on_device = host_numbers(run.model, batch, info), sharding.put(mesh, batch, count)
        if compiled is None:
            compiled = console.compile_step(run.step, run.state, batch_on_device)
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
        pending, scores = None, {}
        writer.write(step, meter.flush() | {"train/lr": float(run.schedule(step - 1))})
        try:
            if due["eval"]:
                scores = evaluate(run, step, writer)
        finally:  # an evaluation that fails must not cost the training; the best one can only be kept if it is saved
            if due["checkpoint"] or due["eval"] or stop.requested:
                run.checkpoints.save(step, run.state, run.meta | dict(snapshot=info.snapshot), scores)
        meter.restart()
        if stop.requested:
            break
    return step


def settle(
    run: SimpleNamespace, meter: metrics.Meter, bar: tqdm, step: int, index: np.ndarray, host: dict, sums: dict
) -> None:
    """Look at a dispatched step: numbers that are not finite stop the run before anything of it is saved."""
    sums = {name: float(value) for name, value in jax.device_get(sums).items()}
    if not np.isfinite([sums["loss"], sums["grad_norm"]]).all():
        run.checkpoints.wait()
        names, last = run.rows.images.source.describe, run.checkpoints.latest()
        raise console.non_finite(run.workdir, step, index, sums, names, last)
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


def prepare_evaluations(config: ConfigDict, train_images: stream.Images, images: stream.Images, mesh: object) -> list:
    """Functions of (forward, params), each giving scores; planned before training, so that mistakes show before it."""
    budgets, classes = sorted(set(config.eval.token_budgets)), images.classes
    put = outputs.putter(mesh, stream.eval_rows(config))
    loaders = stream.eval_loaders(config, [(images, budget, None) for budget in budgets])
    options = dict(multi_label=config.data.multi_label, probabilities=config.loss.kind, num_classes=classes)
    at = dict(zip(budgets, loaders, strict=True))
    runs = [
        lambda forward, params, workdir: classification.at_budgets(forward, params, at, put, workdir=workdir, **options)
    ]
    if config.eval.fewshot_shots:
        chosen_CS = shots.choose_shots(train_images, max(config.eval.fewshot_shots), config.seed)
        wanted = [(train_images, budgets[-1], np.sort(chosen_CS.ravel())), (images, budgets[-1], None)]
        pair = stream.eval_loaders(config, wanted)
        probe = dict(chosen_CS=chosen_CS, shots=config.eval.fewshot_shots, ridge=config.eval.fewshot_ridge)
        runs.append(lambda forward, params, _: fewshot.run(forward, params, *pair, put, num_classes=classes, **probe))
    return runs


def evaluate(run: SimpleNamespace, step: int, writer: writers.MetricWriter) -> dict:
    """Accuracy at every token budget and the few-shot probe where asked for, of the average where one is kept."""
    params, scores = run.state.get("ema", run.state["params"]), {}
    for evaluation in run.evaluations:
        scores |= evaluation(run.forward, params, run.workdir)
    writer.write(step, scores)
    tqdm.write(f"step {step}: " + "  ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in scores.items()))
    return scores


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cli.run(main)
