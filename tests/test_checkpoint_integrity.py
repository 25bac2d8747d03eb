"""Damage to a checkpoint, of any file and of any kind, is seen, said, and the one before is used."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import assert_same, process, small

from input_pipeline.errors import UserError
from navit_jax import checkpoint_integrity as integrity
from navit_jax.checkpoint import Checkpoints, find_checkpoint, restore_params


def damage(file, how, rng):
    data = bytearray(file.read_bytes())
    if how == "delete":
        return file.unlink()
    if how == "truncate":
        data = data[: int(rng.integers(0, len(data)))]
    elif how == "flip":
        data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
    file.write_bytes(data)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run's folder with the checkpoints 1 and 2, of which 2 has the better score."""
    ours = Checkpoints(tmp_path_factory.mktemp("run") / "checkpoints", 2, "acc")
    for step in (1, 2):
        ours.save(step, small(step), {"step": step}, {"acc": step})
    ours.close()
    return Path(ours.root.parent)


NOT_READ = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.mark.parametrize("how", ["delete", "truncate", "flip"])
def test_damage_to_any_file_is_said_and_the_checkpoint_before_is_used(tmp_path, two_steps, how, capsys):
    rng = np.random.default_rng(len(how))
    names = sorted(p.relative_to(two_steps) for p in two_steps.glob("checkpoints/2/**/*") if p.is_file())
    assert len(names) > 12 and all(p.stat().st_size for p in two_steps.glob("checkpoints/2/**/*"))
    for i, name in enumerate(names):
        run = tmp_path / str(i)
        shutil.copytree(two_steps, run)
        damage(run / name, how, rng)
        params, meta = restore_params(run)
        step, state, newest_meta = Checkpoints(run / "checkpoints", 2, "acc").restore_newest(small(0))
        assert_same(state, small(step))
        assert_same(params, jax.tree.map(np.asarray, small(step)["params"]))
        assert newest_meta == meta == {"step": step}
        said = capsys.readouterr().out.splitlines()
        if name.name in NOT_READ:
            assert step == 2 and not said
            continue
        assert step == 1, (how, name)
        file = str(Path(*name.parts[2:]))
        for line, renamed in zip(said, ("", "renamed 2.damaged, "), strict=True):
            assert line.startswith(f"DAMAGED checkpoint {run / 'checkpoints' / '2'}: ") and file in line, (line, file)
            assert line.endswith(f"; {renamed}step 1 is used instead")
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2.damaged"]


def test_a_damaged_step_can_be_saved_again_and_pruning_leaves_the_damaged_alone(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    for again in range(2):
        (root / "2" / "state" / "params.w" / "0").unlink()
        ours = Checkpoints(root, 2, "acc")
        assert ours.restore_newest(small(0))[0] == 1 and ours.latest() == ours.best() == 1, again
        assert ours.save(2, small(2), {"step": 2}, {"acc": 2})
        ours.wait()
    (root / "1" / "meta" / "meta.json").write_text("")  # the best one is looked for when others are saved
    assert ours.save(3, small(3), {}) and ours.save(4, small(4), {})
    ours.close()
    assert sorted(p.name for p in root.iterdir()) == ["2", "2.damaged", "3", "4"]


def test_all_damaged_is_the_users_error_that_names_each_and_nothing_is_renamed(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    (root / "1" / "state" / "params.w" / "0").unlink()
    (root / "2" / "meta" / "meta.json").write_text("{")
    for use in (lambda: Checkpoints(root, 2, "").restore_newest(small(0)), lambda: restore_params(root.parent)):
        with pytest.raises(UserError) as error:
            use()
        assert error.match(r"Cannot read .*/1: state/params.w/0: missing") and error.match(r"/2: meta/meta.json")
        assert error.match("another --workdir")
    assert sorted(p.name for p in root.iterdir()) == ["1", "2"]


def test_reading_only_renames_nothing_and_says_what_it_uses(tmp_path, two_steps, capsys):
    shutil.copytree(two_steps, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    damage(root / "2" / "state" / "params.w" / "0", "flip", np.random.default_rng(0))
    assert Checkpoints(root, 2, "").restore_newest(small(0), read_only=True)[0] == 1
    assert find_checkpoint(root.parent).name == "1"
    assert capsys.readouterr().out.count("step 1 is used instead") == 2
    with pytest.raises(UserError, match=r"Cannot read .*/2: state/params.w/0: its bytes changed"):
        restore_params(root / "2")
    with pytest.raises(UserError, match=r"Cannot read .*/2: state/params.w/0: its bytes changed"):
        Checkpoints(root, 2, "").restore(2, small(0))
    assert sorted(p.name for p in root.iterdir()) == ["1", "2"]


def test_what_does_not_fit_is_no_damage(tmp_path, two_steps):
    shutil.copytree(two_steps, tmp_path / "run")
    ours = Checkpoints(tmp_path / "run" / "checkpoints", 2, "")
    with pytest.raises(UserError, match="params/w: .*does not fit|does not fit this run"):
        ours.restore_newest({"params": {"w": jnp.zeros(3)}})
    seen = []

    def refuse(meta):
        seen.append(meta)
        raise UserError("another run")

    with pytest.raises(UserError, match="another run"):
        ours.restore_newest(small(0), refuse)
    assert seen == [{"step": 2}]
    assert Checkpoints(tmp_path / "none", 2, "").restore_newest(small(0)) is None


def forget_record(path):
    """The checkpoint as the version before wrote it."""
    (path / "checksums.json").unlink()
    file = path / "meta" / "meta.json"
    text = json.loads(file.read_text())
    del text["checksums"]
    file.write_text(json.dumps(text))


def test_checkpoints_without_a_record_are_read_and_their_visible_damage_falls_back(tmp_path, two_steps, capsys):
    files = ["meta/meta.json", "state/_METADATA", "state/params.w/0", "state/params.w/.zarray"]
    for i, name in enumerate([None, *files]):
        run = tmp_path / str(i)
        shutil.copytree(two_steps, run)
        for step in ("1", "2"):
            forget_record(run / "checkpoints" / step)
        if name:
            damage(run / "checkpoints" / "2" / name, "truncate", np.random.default_rng(i))
        step, state, _ = Checkpoints(run / "checkpoints", 2, "").restore_newest(small(0))
        assert_same(state, small(step))
        assert step == (1 if name else 2) and ("DAMAGED" in capsys.readouterr().out) == bool(name), name


@pytest.mark.parametrize("writers", [1, 2, 5])
@pytest.mark.parametrize("readers", [1, 2, 3, 7])
def test_every_file_is_verified_by_exactly_one_reader(tmp_path, writers, readers):
    for i in range(11):
        (tmp_path / "state" / f"array{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "state" / f"array{i % 3}" / str(i)).write_text("x" * i)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "meta.json").write_text('{"meta": {}, "metrics": {}, "best_metric": "", "checksums": true}')
    (tmp_path / "state" / "_METADATA").write_text("{}")
    for i in range(writers if writers > 1 else 0):
        integrity.record_share(tmp_path, i, writers)
    integrity.record(tmp_path, writers)
    assert not any(integrity.problem(tmp_path, i, readers) for i in range(readers))
    for file in (tmp_path / "state").glob("*/*"):
        text = file.read_text()
        file.write_text(text + "y")
        found = list(filter(None, (integrity.problem(tmp_path, i, readers) for i in range(readers))))
        assert found == [f"{file.relative_to(tmp_path)}: {len(text) + 1} bytes, {len(text)} were written"]
        file.write_text(text)
    for share in tmp_path.glob("checksums.*.json"):
        text = share.read_text()
        share.unlink()
        assert any(integrity.problem(tmp_path, i, readers) == f"{share.name}: missing" for i in range(readers))
        share.write_text(text)


KILLED = """
    import os, signal, sys, jax.numpy as jnp
    from navit_jax import checkpoint_integrity as integrity
    from navit_jax.checkpoint import Checkpoints
    ours, record = Checkpoints(sys.argv[1], 2, ""), integrity.record
    ours.save(1, {"params": {"w": jnp.zeros(10)}}, {})
    ours.wait()
    def last(*args):
        if sys.argv[2] == "after":
            record(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    integrity.record = last
    ours.save(2, {"params": {"w": jnp.ones(10)}}, {})
    ours.close()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_around_the_record_leaves_the_checkpoint_before(tmp_path, when):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), when], **process())
    assert done.returncode == -signal.SIGKILL
    ours = Checkpoints(tmp_path, 2, "")
    assert len(list(tmp_path.iterdir())) == 2
    assert ours.restore_newest({"params": {"w": jnp.zeros(10)}})[0] == 1
    assert ours.save(2, {"params": {"w": jnp.ones(10)}}, {})
    ours.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
