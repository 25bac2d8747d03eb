"""Promises of the trainer, seen through its files: it learns, resumes bit for bit, refuses what would break that."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags

import train
from configs import quickstart
from input_pipeline.errors import UserError
from navit_jax import checkpoint, console

ROOT = Path(train.__file__).parent


def shrink(config, rows, **fields):
    """A recipe as a run of seconds, with these fields changed, named as data__source."""
    config.model.update(width=32, depth=2, heads=2, mlp_dim=64)
    config.packing.update(row_length=32, rows_per_step=rows)
    config.optim.update(lr=1e-3, schedule="constant", warmup_steps=2, cooldown_steps=0)
    config.update(total_steps=12, log_every_steps=1, checkpoint_every_steps=4)
    config.eval.update(token_budgets=(9, 16), max_examples=40, rows_per_step=rows)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def tiny(**fields):
    return shrink(quickstart.get_config(), 2, **fields)


def changed(old, new, prefix=""):
    """The fields of a config that differ from another's, by their dotted names."""
    for name, value in new.items():
        if hasattr(value, "items"):
            yield from changed(old[name], value, f"{prefix}{name}.")
        elif value != old[name]:
            yield prefix + name, value


def run(config, workdir, eval_only=False):
    if not flags.FLAGS["config"].present:  # parsed they may be, without one, for Grain's worker processes
        flags.FLAGS(["train.py", "--config", str(ROOT / "configs/quickstart.py")])
    flags.FLAGS.workdir, flags.FLAGS.eval_only = str(workdir), eval_only
    train.main(config)
    return lines(workdir)


def lines(workdir):
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def losses(records):
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and metrics."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(tiny(), workdir)


def test_a_run_leaves_what_a_person_looks_at(whole):
    workdir, records = whole
    assert set(losses(records)) == set(range(1, 13))
    wanted = {"train/loss", "train/images_per_s", "train/tokens_per_s", "train/mfu", "data/fill", "data/skipped"}
    assert wanted <= set(records[0])
    last = {k: v for r in records for k, v in r.items() if k.startswith("eval/")}
    assert {"eval/top1@9", "eval/top5@9", "eval/ece@16", "eval/top1@16"} <= set(last)
    for name in ("accuracy_over_tokens.csv", "accuracy_over_tokens.png", "loss.png", "config.json"):
        assert (workdir / name).stat().st_size > 0
    assert list(workdir.glob("tensorboard/events.out.tfevents*"))


def test_resuming_gives_the_same_losses_bit_for_bit(whole, tmp_path):
    half = run(tiny(), tmp_path / "a")  # the same again: nothing depends on the clock or the folder
    assert losses(half) == losses(whole[1])
    # a process that died after step 8 was saved, with metrics of later steps already written
    for step in (tmp_path / "a" / "checkpoints").iterdir():
        if step.name == "12":
            subprocess.run(["rm", "-r", step], check=True)
    resumed = run(tiny(), tmp_path / "a")
    assert losses(resumed) == losses(whole[1])
    steps = [r["step"] for r in resumed if "train/loss" in r]
    assert steps == sorted(set(steps))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [6])
def test_killed_at_random_moments_the_same_command_goes_on(whole, tmp_path, kills):
    config = tiny()
    overrides = [f"--config.{name}={value}" for name, value in changed(quickstart.get_config(), config)]
    command = [sys.executable, "train.py", "--config", "configs/quickstart.py", "--workdir", str(tmp_path), *overrides]
    rng = random.Random(kills)
    out = open(tmp_path / "out", "w")  # noqa: SIM115
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        # wait for the loop, then for a random moment of it (a save among them)
        deadline = time.time() + 120
        while not (tmp_path / "metrics.jsonl").exists() and time.time() < deadline and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True, stdout=out, stderr=out, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert losses(lines(tmp_path)) == losses(whole[1])
    assert config.total_steps == max(losses(lines(tmp_path)))


def test_sigterm_saves_and_says_so(tmp_path):
    command = [sys.executable, "train.py", "--config", "configs/quickstart.py", "--workdir", str(tmp_path)]
    command += ["--config.model.depth=2", "--config.model.width=32", "--config.log_every_steps=1"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    while not (tmp_path / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped at step" in out, out
    assert any(p.name.isdigit() for p in (tmp_path / "checkpoints").iterdir())


def test_a_signal_at_an_evaluation_saves_at_once_and_the_next_cannot_cut_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *args: pytest.fail("a machine that is taken back waits for nobody"))
    monkeypatch.setattr(console.StopSignal, "requested", property(lambda self: True, lambda self, _: None), False)
    at_close, close = [], checkpoint.Checkpoints.close

    def watched(checkpoints):
        at_close.append(signal.getsignal(signal.SIGTERM))
        close(checkpoints)

    monkeypatch.setattr(checkpoint.Checkpoints, "close", watched)
    assert max(losses(run(tiny(eval_every_steps=1), tmp_path))) == 1
    assert (tmp_path / "checkpoints" / "1").exists()
    assert signal.SIG_DFL not in at_close and len(at_close) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_evaluation_that_fails_costs_no_training(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no such image")

    monkeypatch.setattr(train, "evaluate", fail)
    with pytest.raises(RuntimeError, match="no such image"):
        run(tiny(eval_every_steps=3), tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_change_that_would_break_the_sequence_is_refused_by_name(whole):
    with pytest.raises(UserError, match=r"optim\.lr.*0\.001.*0\.002"):
        run(tiny(optim__lr=2e-3), whole[0])
    with pytest.raises(UserError, match=r"packing\.look_ahead"):
        run(tiny(packing__look_ahead=4), whole[0])


def test_eval_only_gives_the_scores_of_the_last_evaluation(whole):
    before = whole[1][-1]
    after = run(tiny(), whole[0], eval_only=True)[-1]
    assert after["step"] == before["step"] == 12
    for k, v in before.items():
        if k.startswith("eval/") and "per_s" not in k:
            assert after[k] == v, k


def test_eval_only_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        run(tiny(), tmp_path, eval_only=True)


def test_a_loss_that_is_not_finite_stops_with_the_images_and_keeps_the_checkpoint(tmp_path):
    config = tiny(optim__lr=1e30, optim__clip_norm=0.0, optim__warmup_steps=0, checkpoint_every_steps=1)
    with pytest.raises(UserError, match=r"step \d+: loss .*not finite.*index in the source\): \[\d+.*non_finite.json"):
        run(config, tmp_path)
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    finite = losses(lines(tmp_path))
    assert all(np.isfinite(v) for v in finite.values())
    assert max(saved, default=0) <= max(finite, default=0)


@pytest.mark.slow
def test_fine_tuning_from_a_run(whole, tmp_path, capsys):
    records = run(tiny(init_from=str(whole[0]), total_steps=2), tmp_path)
    assert losses(records)[1] < losses(whole[1])[1]
    run(tiny(init_from=str(whole[0]), data__source="shapes", total_steps=2, eval__max_examples=8), tmp_path / "head")
    assert "head" in capsys.readouterr().out
    with pytest.raises(UserError, match="blocks/.*kernel"):
        run(tiny(init_from=str(whole[0]), model__mlp_dim=96), tmp_path / "other")


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write.*--workdir"):
        run(tiny(), tmp_path / "file" / "run")


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    config = quickstart.get_config()
    config.total_steps = 150
    records = run(config, tmp_path)
    values = list(losses(records).values())
    assert np.mean(values[-2:]) < 0.7 * np.mean(values[:2])
