"""Promises of the command line: a mistake ends in one message that says what to do, without a traceback, with 2."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from configs import quickstart

ROOT = Path(__file__).parent.parent
CONFIG, DEFAULT = "--config=configs/quickstart.py", quickstart.get_config()
PROGRAM = '''
"""A program for this test."""
from absl import flags
from navit_jax import cli
from input_pipeline.errors import UserError

MODE = flags.DEFINE_string("mode", "", "What goes wrong.")

def main(config):
    if MODE.value == "mistake":
        raise UserError("found this, expected that")
    if MODE.value == "interrupt":
        raise KeyboardInterrupt
    if MODE.value == "defect":
        raise ZeroDivisionError("a defect")
    print(config.total_steps, config.optim.lr, config.eval.token_budgets, config.augment.flip, config.data.source)

cli.run(main)
'''


def call(*arguments, cwd=ROOT):
    environment = os.environ | dict(PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return lambda *arguments, **options: call(str(path), *arguments, **options)


def assert_one_message(done, *parts):
    assert done.returncode == 2, done
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([CONFIG, "--config.optim.lrr=1"], ["'optim.lrr'", "Nearest: optim.lr."]),
        ([CONFIG, "--config.lr=1"], ["'lr'", "optim.lr"]),
        ([CONFIG, "--config.optm.lr=1"], ["'optm.lr'", "optim.lr"]),
        ([CONFIG, "--config.optim.lr.x=1"], ["'optim.lr.x'", "optim.lr"]),
        (["--config", "configs/nope.py"], ["configs/nope.py", "configs/navit_b16.py", "configs/quickstart.py"]),
        (["--config=configs/nope.py", "--config.seed=1"], ["configs/nope.py", "configs/navit_b16.py"]),
        (["--config=configs/quickstar.py"], ["Did you mean configs/quickstart.py?"]),
        (["--config=README.md"], ["no Python file", "configs/navit_b16.py"]),
        ([], ["--config=FILE", "configs/navit_b16.py"]),
        ([CONFIG, "--config.total_steps=abc"], ["total_steps=abc", "whole number", str(DEFAULT.total_steps)]),
        ([CONFIG, "--config.optim.lr=fast"], ["optim.lr=fast", "a number", str(DEFAULT.optim.lr)]),
        ([CONFIG, "--config.augment.flip=maybe"], ["true or false"]),
        ([CONFIG, "--config.eval.token_budgets=a,b"], ["eval.token_budgets", "'a,b'", str(DEFAULT.eval.token_budgets)]),
        ([CONFIG, "--config.optim.weight_decay=0.1"], ["optim.weight_decay", "kernel"]),
        ([CONFIG, "--config.optim=1"], ["--config.optim=1", "one of its fields"]),
        (["--config.seed=1", CONFIG], ["Put --config=FILE before"]),
        ([CONFIG, "--mod=x"], ["'mod'", "Did you mean: mode?"]),
        ([CONFIG, "digits"], ["unexpected argument 'digits'"]),
        ([CONFIG, "--config.seed"], ["Missing value", "seed"]),
        ([CONFIG, "--mode=mistake"], ["found this, expected that"]),
    ],
)
def test_mistakes(program, arguments, parts):
    assert_one_message(program(*arguments), *parts)


def test_a_config_files_own_mistake_is_shown_plainly_and_its_defect_with_a_traceback(program, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from input_pipeline.errors import UserError\ndef get_config(arg):\n    raise UserError(f'not {arg}')\n"
    )
    assert_one_message(program(f"--config={path}:here"), "not here")
    path.write_text("def get_config():\n    return 1 / 0\n")
    assert_one_message(program(f"--config={path}:here"), "takes no argument", "'here'")
    done = program(f"--config={path}")
    assert done.returncode == 1 and "own.py" in done.stderr and "ZeroDivisionError" in done.stderr


def test_overrides_arrive(program):
    fields = ["--config.optim.lr=1", "--config.total_steps", "7", "--config.eval.token_budgets=64,128"]
    done = program("--config", "configs/quickstart.py:shapes", *fields, "--config.augment.flip")
    assert (done.returncode, done.stdout) == (0, "7 1.0 (64, 128) True shapes\n"), done


def test_debug_shows_the_traceback(program):
    for arguments in (["--mode=mistake"], ["--config.optim.lrr=1"]):
        done = program(CONFIG, "--debug", *arguments)
        assert done.returncode == 1 and "Traceback" in done.stderr and "UserError" in done.stderr


def test_a_defect_keeps_its_traceback_and_an_interrupt_is_quiet(program):
    done = program(CONFIG, "--mode=defect")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    done = program(CONFIG, "--mode=interrupt")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_help_lists_flags_and_configs_from_any_folder(program, tmp_path):
    done = program("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for part in ("A program for this test.", "--mode: What goes wrong.", "--config", "--debug", "navit_b16.py"):
        assert part in done.stdout


def test_commands():
    done = call("-m", "navit_jax", "--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in ("train", "predict", "show", "plan", "convert"))
    assert done.stdout == call("-m", "navit_jax").stdout
    assert_one_message(call("-m", "navit_jax", "shwo"), "'shwo'", "Did you mean show?")
    assert_one_message(call("-m", "navit_jax", "plan", CONFIG), "plan for which machines?", "v5e:16x16")


def test_train_and_plan_are_train_py():
    assert call("-m", "navit_jax", "train", "--help").stdout == call("train.py", "--help").stdout
    assert_one_message(call("-m", "navit_jax", "train", "--config=configs/no.py"), "configs/no.py")
    assert_one_message(call("-m", "navit_jax", "plan", "v9:1", CONFIG), "v9")


def test_show_draws_a_picture(tmp_path):
    out = tmp_path / "made" / "rows.png"
    done = call("-m", "navit_jax", "show", "--config", "configs/quickstart.py", "--rows=1", f"--out={out}")
    assert done.returncode == 0, done
    assert out.stat().st_size > 30_000 and str(out) in done.stdout and "% filled" in done.stdout
    assert_one_message(call("-m", "navit_jax", "show", CONFIG, "--rows=0"), "rows")
