"""A contrastive run is a run like any other: it learns, resumes bit for bit, and is the same on any topology."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import test_train
from test_processes import finish, start
from test_topology import MESHES, ROOT, devices
from test_train import lines, losses, run

from configs import navit_clip_quickstart
from input_pipeline import text
from input_pipeline.errors import UserError
from navit_jax import checkpoint, objectives, optim
from navit_jax.plan import hlo

# The default set has this of classes: test_train.py, test_topology.py; another tokenizer: test_compatibility.py.
pytestmark = pytest.mark.slow


def tiny(**fields):
    config = navit_clip_quickstart.get_config()
    config.text.update(width=32, depth=2, heads=2, mlp_dim=64)
    config.contrastive.update(embed_dim=16, block=16)
    config.packing.rows_per_group = 1  # whole on each of eight devices, so that all attend alike
    return test_train.shrink(config, 8, **fields)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(tiny(), workdir)


def scores(records):
    return {
        k: v for r in records for k, v in r.items() if k.startswith(("zeroshot/", "retrieval/")) and "per_s" not in k
    }


def test_a_run_learns_and_leaves_its_scores(whole):
    workdir, records = whole
    seen = losses(records)
    assert set(seen) == set(range(1, 13)) and np.median([seen[step] for step in range(7, 13)]) < 0.95 * seen[1]
    wanted = {"retrieval/i2t_r1@9", "retrieval/t2i_r10@16", "zeroshot/top1@9", "zeroshot/top5@16", "zeroshot/ece@16"}
    assert wanted <= set(scores(records))
    assert scores(records)["retrieval/images"] == 40
    for name in ("retrieval.csv", "retrieval_over_tokens.png", "zeroshot_over_tokens.png", "loss.png"):
        assert (workdir / name).stat().st_size > 0


def test_resuming_gives_the_same_losses_bit_for_bit(whole, tmp_path):
    run(tiny(total_steps=12), tmp_path)
    subprocess.run(["rm", "-r", tmp_path / "checkpoints" / "12"], check=True)
    assert losses(run(tiny(), tmp_path)) == losses(whole[1])


def test_another_tokenizer_is_noticed(whole, monkeypatch):
    monkeypatch.setattr(text.ByteTokenizer, "fingerprint", lambda self: "other bytes")
    with pytest.raises(UserError, match="had the tokenizer bytes, these have other bytes"):
        run(tiny(), whole[0], eval_only=True)
    with pytest.raises(UserError, match="tokenizer"):
        run(tiny(), whole[0])


def test_towers_that_see_parts_train_alike(whole, tmp_path):
    parts = run(tiny(contrastive__cache_parts=4), tmp_path)
    for step, loss in losses(whole[1]).items():
        assert losses(parts)[step] == pytest.approx(loss, rel=1e-4), step


def assert_same(got, expected):
    ours, theirs = losses(got), losses(expected)
    assert sorted(ours) == sorted(theirs)
    np.testing.assert_allclose([ours[s] for s in ours], [theirs[s] for s in ours], rtol=1e-5)
    ours, theirs = scores(got), scores(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:  # one image of 40 may fall on the other side of a tie
        assert ours[name] == pytest.approx(theirs[name], abs=0.03), name


def test_eight_devices_train_as_one_and_send_vectors_not_rows(whole, tmp_path):
    command = [sys.executable, "tests/eight_devices.py", str(tmp_path), tiny().to_json_best_effort(), *MESHES]
    out = subprocess.run(command, cwd=ROOT, env=devices(8), capture_output=True, text=True, timeout=400)
    assert out.returncode == 0, out.stderr[-3000:]
    for mesh in MESHES:
        assert_same(lines(tmp_path / mesh), whole[1])
        collectives = hlo.collectives((tmp_path / f"{mesh}.hlo").read_text())
        assert "collective-permute" in {c.kind for c in collectives}  # the ring
        gathered = {c.bytes for c in collectives if c.kind == "all-gather"}
        assert gathered <= weights(int(mesh[-1])) | {4 * 8 * 3}  # and which examples there are, of 3 slots a row


def weights(tensor):
    """Bytes of the weights that are gathered, layer by layer, over fsdp; they may be split over tensor, too."""
    shapes = objectives.make(tiny(), 0, vocab_size=257).shapes
    sizes = [4 * (x.size // x.shape[0] if optim.is_stacked(optim.name_of(path)) else x.size)
             for path, x in jax.tree_util.tree_leaves_with_path(shapes)]  # fmt: skip
    query = 4 * 32 * 2  # of attention pooling, of which the product with the keys' weights is gathered
    return {size // part for size in [*sizes, query] for part in {1, tensor}}


def test_two_processes_train_as_one(whole, tmp_path):
    status, out = finish(start(tmp_path, 2, recipe=navit_clip_quickstart, wanted=tiny()))
    assert status == 0, out[-3000:]
    assert_same(lines(tmp_path), whole[1])


def test_a_locked_image_tower_starts_from_an_image_run(whole, tmp_path):
    """LiT: the tower of a supervised run, which stays as it is while texts learn."""
    image = test_train.tiny(data__source="shapes", total_steps=2, eval__max_examples=8)
    run(image, tmp_path / "image")
    config = tiny(init_from=str(tmp_path / "image"), optim__freeze=("^image/",), total_steps=3, eval__max_examples=8)
    config.model = image.model
    run(config, tmp_path / "lit")
    before = checkpoint.restore_params(tmp_path / "image")[0]
    after = checkpoint.restore_params(tmp_path / "lit")[0]
    before.pop("head")
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after["image"]), strict=True):
        np.testing.assert_array_equal(a, b)
    new = objectives.make(config, 0, vocab_size=257).init(config.seed)
    assert np.abs(after["text"]["table"] - new["text"]["table"]).max() > 0
