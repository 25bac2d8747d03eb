"""Train, resume, evaluate or plan a packed NaViT: `python train.py --config configs/navit_b16.py`.

Joins the two halves, rows (`input_pipeline`) and model (`navit_jax`), and holds the loop; no maths. A step is
dispatched before the one before it is looked at, so the device never waits for the host's bookkeeping; a step is
saved only once its loss was seen finite.
"""

# ruff: noqa: E402
from navit_jax import host_memory

host_memory.keep()  # before numpy and jax start threads

import contextlib
import functools
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
from navit_jax import (
    checkpoint,
    cli,
    console,
    distributed,
    like,
    metrics,
    navit,
    objectives,
    optim,
    plan,
    profiling,
    sharding,
    start,
    train_step,
    writers,
)
from navit_jax.checkpoint_integrity import failed_everywhere
from navit_jax.evaluators import suite

WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; resumed where it exists. Default: runs/<config>-<time>."
)
CHECKPOINTS = flags.DEFINE_string(
    "checkpoints", "", "Folder of the run's checkpoints, shared by all processes, or gs://...; default: in the workdir."
)
PLAN = flags.DEFINE_string(
    "plan", "", "Compile the step for machines that are not here, v5e:16x16 or cpu:8, say what it will cost, and stop."
)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "Write a trace of these steps into the run: 10:13.")
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "HOST:PORT of process 0, where the processes of a run are not found by themselves."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", -1, "How many processes the run has; with --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "The number of this process, from 0; with --coordinator.")
EVAL_ONLY = flags.DEFINE_bool("eval_only", False, "Evaluate the run in --workdir (or config.init_from) and stop.")


def main(config: ConfigDict) -> None:
    if PLAN.value:
        like.resolve(config)
        return plan.main(config, PLAN.value)
    with distributed.session(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, debug=cli.DEBUG.value):
        run_config(config)


def run_config(config: ConfigDict) -> None:
    """Train or evaluate, as one of the run's processes."""
    workdir = console.open_workdir(WORKDIR.value, config.name, EVAL_ONLY.value and not config.init_from)
    jax.config.update("jax_compilation_cache_dir", str(cache_dir("compilation")))
    like.resolve(config, workdir / "config.json")
    checks.check(config)
    run = build(config, workdir)
    if not EVAL_ONLY.value:
        return train(run)
    if not run.start and not config.init_from:
        raise UserError(
            f"--eval_only found no checkpoint in {workdir}. Give --workdir of a run or --config.init_from=RUN."
        )
    with contextlib.closing(writers.open_writer(workdir, resume_step=None)) as writer:
        evaluate(run, run.start, writer)


def build(config: ConfigDict, workdir: Path) -> SimpleNamespace:
    """Everything a run needs: data, model, optimizer, compiled functions, and the state to start from."""
    navit.variant(config.model.variant)
    profile = profiling.Profile(PROFILE_STEPS.value, workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_rows(mesh, config.packing.rows_per_step, parts=objectives.parts(config))
    sharding.check_rows(mesh, stream.eval_rows(config), "eval.rows_per_step")
    train_images, held_out = (stream.open_images(config, split, distributed.group()) for split in ("train", "eval"))
    eval_images = stream.match_classes(train_images, held_out)
    rows, classes = stream.train_stream(config, train_images), train_images.classes
    total = stream.total_steps(config, rows)
    console.fit_schedule(config.optim, total)
    objective = objectives.make(config, classes, train_images.tokenizer and train_images.tokenizer.vocab_size)
    tx, schedule = optim.make_optimizer(config.optim, objective.shapes, total)
    state = start.shapes(objective.shapes, tx, bool(config.optim.ema_decay), mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    options = dict(limit=objective.limit, ema_decay=config.optim.ema_decay, seed=config.seed)
    best = config.best_metric or f"{suite.default_metric(config, eval_images)}@{max(config.eval.token_budgets)}"
    console.announce(workdir, WORKDIR.value)
    console.describe(config, rows, len(eval_images.sizes), objective, total, mesh)
    meta = dict(config=json.loads(config.to_json_best_effort()), data=stream.fingerprint(train_images))
    meta["classes"] = list(train_images.source.class_names)
    folder = CHECKPOINTS.value or workdir / "checkpoints"
    console.check_shared(folder)
    checkpoints = checkpoint.Checkpoints(folder, config.keep_checkpoints, best)
    begun = start.restore(checkpoints, state, meta, EVAL_ONLY.value)
    begun = begun or start.fresh(config, objective.init, tx, shardings, meta, whole=EVAL_ONLY.value)
    return SimpleNamespace(
        config=config,
        workdir=workdir,
        mesh=mesh,
        rows=rows,
        objective=objective,
        total=total,
        schedule=schedule,
        evaluations=prepare_evaluations(config, train_images, eval_images, objective, shardings["params"], workdir),
        step=train_step.make_train_step(objective.gradient(mesh), tx, mesh, shardings, **options),
        meta=meta,
        checkpoints=checkpoints,
        profile=profile,
        state=begun.state,
        start=begun.step,
        snapshot=begun.snapshot,
    )


def train(run: SimpleNamespace) -> None:
    """Train to the last step, or to a signal; what was begun to be saved is saved also when something fails."""
    if run.start >= run.total:
        return print(f"nothing to do: {run.workdir} is at step {run.start} of {run.total}; --eval_only evaluates it")
    run.profile.check(run.start, run.total)
    writer, stop = writers.open_writer(run.workdir, resume_step=run.start), console.StopSignal()
    bar = console.progress(run.start, run.total)
    with contextlib.ExitStack() as ends:  # from the last to the first: a signal must not cut a save that was begun
        for end in (stop.release, writer.close, run.checkpoints.close, run.profile.close, bar.close):
            ends.callback(end)
        console.write_config(run.workdir, run.config)
        step = loop(run, writer, stop, bar)
    if distributed.is_lead():
        writers.plot_loss(run.workdir / "metrics.jsonl", run.workdir / "loss.png")
    console.finish(run.workdir, step, run.total)


def loop(run: SimpleNamespace, writer: writers.MetricWriter, stop: console.StopSignal, bar: tqdm) -> int:
    """Dispatch a step, then look at the one before; log, evaluate and save where due. Returns the last step.

    What one process alone knows (its share of the rows, a signal to stop) goes into the step and comes out summed, so
    that all processes read the same and leave the loop at the same step.
    """
    config, total, mesh, count = run.config, run.total, run.mesh, run.config.packing.rows_per_step
    peak, peak_name = metrics.peak_flops(jax.local_devices()[0], run.objective.dtype)
    tqdm.write(f"MFU is against {peak_name}")
    meter, step, pending, compiled = metrics.Meter(peak * jax.device_count()), run.start, None, None
    local, stopping = sharding.local_rows(mesh, count), False
    peers = jax.process_count() * len(local) / count  # processes that build the same rows
    run.profile.between(step)
    for batch, info in meter.waits(run.rows.loader(total, start=run.start, snapshot=run.snapshot, local=local)):
        with meter.timed("h2d"):
            flops, skipped = objectives.flops(run.objective, batch), len(info.bad)
            host = sharding.put_host(mesh, (flops / peers, skipped / peers, stop.requested))
            on_device = sharding.put(mesh, batch, count)
        if compiled is None:
            compiled = console.compile_step(run.step, run.state, on_device, host)
            meter.restart()
        step += 1
        with meter.timed("compute"), jax.profiler.StepTraceAnnotation("train", step_num=step):
            run.state, sums = compiled(run.state, on_device, host)
            if pending:
                stopping |= settle(run, meter, bar, *pending)
            pending = (step, batch.index, sums)
            every = {name: config[f"{name}_every_steps"] for name in ("log", "checkpoint", "eval")}
            due = {name: step == total or steps > 0 and step % steps == 0 for name, steps in every.items()}
            if not (any(due.values()) or stopping or run.profile.due(step)):
                continue
            # Also at a checkpoint, so that no mean in metrics.jsonl spans one: a resumed run writes the same lines.
            stopping |= settle(run, meter, bar, *pending)
        pending, scores, saves = None, {}, True
        writer.write(step, meter.flush() | {"train/lr": float(run.schedule(step - 1))})
        try:
            if due["eval"] and (not stopping or step == total):  # who sends a signal may not wait for an evaluation
                scores = evaluate(run, step, writer)
        except BaseException as error:  # must not cost the training; but where it failed here alone no other saves
            saves = failed_everywhere(error)
            raise
        finally:
            if saves and (due["checkpoint"] or due["eval"] or stopping):
                run.checkpoints.save(step, run.state, run.meta | dict(snapshot=info.snapshot), scores)
        run.profile.between(step)
        meter.restart()
        if stopping:
            break
    return step


def settle(run: SimpleNamespace, meter: metrics.Meter, bar: tqdm, step: int, index: np.ndarray, sums: dict) -> bool:
    """Look at a dispatched step: numbers that are not finite stop the run before anything of it is saved.

    Returns whether any process was asked to stop.
    """
    sums = jax.device_get(sums)
    flops, skipped, stop = (float(x) for x in sums.pop("host"))
    sums = {name: float(value) for name, value in sums.items()}
    if not np.isfinite([sums["loss"], sums["grad_norm"]]).all():
        run.checkpoints.wait()
        names, last = run.rows.images.source.describe, run.checkpoints.latest()
        raise console.non_finite(run.workdir, step, distributed.gather(index), sums, names, last)
    slots = run.config.packing.rows_per_step * run.rows.plan["length"]
    meter.add(sums, slots=slots, flops=flops, skipped=round(skipped))
    bar.set_postfix_str(metrics.line(meter.peek()), refresh=False)
    bar.update()
    return stop > 0


def prepare_evaluations(
    config: ConfigDict,
    train_images: stream.Images,
    images: stream.Images,
    objective: objectives.Objective,
    shardings: dict,
    workdir: Path,
) -> list[suite.Evaluation]:
    """The run's evaluations with their rows planned; shardings: of the parameters."""
    mesh, count = jax.tree.leaves(shardings)[0].mesh, stream.eval_rows(config)
    local = sharding.local_rows(mesh, count)
    place = suite.Place(functools.partial(sharding.put, mesh, count=count), count, local, workdir)
    forward = train_step.make_forward(objective.forward, mesh, shardings)
    budgets = sorted(set(config.eval.token_budgets))
    loaders = stream.eval_loaders(config, [(images, budget, None) for budget in budgets], local)
    at = dict(zip(budgets, loaders, strict=True))
    if objective.forward_texts:
        forward_texts = train_step.make_forward(objective.forward_texts, mesh, shardings)
        found = suite.contrastive(config, forward, forward_texts, at, images, place)
    else:
        found = suite.supervised(config, forward, at, images.classes, place)
    if config.eval.fewshot_shots:
        chosen_CS = shots.choose_shots(train_images, images, max(config.eval.fewshot_shots), config.seed)
        wanted = [(train_images, budgets[-1], np.sort(chosen_CS.ravel())), (images, budgets[-1], None)]
        pair = stream.eval_loaders(config, wanted, local)
        found.append(suite.few_shot(config, forward, pair, chosen_CS, place))
    return found


def evaluate(run: SimpleNamespace, step: int, writer: writers.MetricWriter) -> dict:
    """The scores of every evaluation, of the average where one is kept."""
    params, scores = run.state.get("ema", run.state["params"]), {}
    for evaluation in run.evaluations:
        scores |= evaluation(params)
    writer.write(step, scores)
    tqdm.write(f"step {step}: " + "  ".join(f"{k.removeprefix('eval/')} {v:.4g}" for k, v in scores.items()))
    return scores


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cli.run(main)
