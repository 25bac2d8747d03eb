"""The file for serving: it answers as the model does where neither flax nor this project is, and says what it takes."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import fast_jit, pack, random_image, random_packed, random_params
from jax import export

from input_pipeline.errors import UserError
from navit_jax import contrastive, navit, text_tower
from navit_jax.weights import Weights, stablehlo

SMALL = dict(width=32, depth=2, heads=2, mlp_dim=48, patch_size=4, mlp="swiglu", bias=True, mean=(0.4, 0.5, 0.6))
SERVE = """
import sys
sys.path = [p for p in sys.path if p]
import numpy as np
from jax import export
model = export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
rows = np.load("rows.npz")
found = model.call(*(rows[name] for name in ("values", "segment_ids", "coords", "grids")))
np.savez("found.npz", **found)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"flax", "navit_jax", "input_pipeline", "configs"}, loaded
print(sorted(found), model.platforms)
"""


def served(folder, rows):
    """Outputs of `model.stablehlo` in a process of its own."""
    np.savez(folder / "rows.npz", **dict(zip(rows._fields, rows.arrays, strict=False)))
    script = [sys.executable, "-I", "-c", SERVE]
    done = subprocess.run(script, cwd=folder, capture_output=True, text=True, env=dict(JAX_PLATFORMS="cpu"))
    assert done.returncode == 0, done.stderr
    with np.load(folder / "found.npz") as file:
        return dict(file), done.stdout


@pytest.fixture(scope="module")
def classifier():
    cfg = navit.NaViTConfig(**SMALL, num_classes=5, posemb="rope", registers=2, pool="first", norm_pooled=True)
    graph, shapes = navit.abstract(cfg)
    params = jax.tree.map(np.asarray, random_params(shapes))
    return Weights(cfg, params, ("ant", "bee", "cat", "dog", "eel"), source="a test"), navit.merge(graph, params)


def test_a_process_without_flax_and_this_project_gives_the_models_outputs(classifier, tmp_path):
    weights, model = classifier
    rng = np.random.default_rng(0)
    image, *others = (random_image(rng, n, 48) for n in (10, 20, 13))
    rows = pack([[image, others[0]], [image, others[1]], []], 40, 4, 48)
    rows.values[1][rows.segment_ids[1] == 0] = 200  # neither it nor a neighbour matters
    path = stablehlo.write(weights, tmp_path / "model", rows=3, length=40, slots=4)
    assert path == tmp_path / "model.stablehlo"
    logits_BKC, extra = fast_jit(lambda rows: model(rows))(rows)
    found, said = served(tmp_path, rows)
    assert said.strip() == "['logits', 'pooled'] ('cpu', 'cuda', 'tpu')"
    used = rows.grids.any(-1)
    assert np.abs(logits_BKC[used]).max() > 1
    np.testing.assert_allclose(found["logits"], logits_BKC, atol=2e-4)
    np.testing.assert_allclose(found["pooled"], extra["pooled"], atol=2e-4)
    np.testing.assert_allclose(found["logits"][0, 0], found["logits"][1, 0], atol=2e-4)

    about = json.loads((tmp_path / "model.json").read_text())
    assert {name: tuple(x["shape"]) for name, x in about["inputs"].items()} == {
        name: x.shape for name, x in zip(rows._fields, rows.arrays, strict=False)
    }
    assert all(about["inputs"][name]["dtype"] == str(x.dtype) for name, x in zip(rows._fields, rows.arrays))
    assert about["outputs"]["logits"]["shape"] == [3, 4, 5] and about["classes"][2] == "cat"
    assert (about["patch_size"], about["channels"], about["platforms"]) == (4, 3, ["cpu", "cuda", "tpu"])


def test_of_two_towers_the_image_tower_with_its_projection_is_written(tmp_path):
    image = navit.NaViTConfig(**SMALL, posemb="learned", posemb_max=8)
    text = text_tower.TextConfig(width=16, depth=1, heads=2, mlp_dim=16, vocab_size=9, max_tokens=4)
    cfg = contrastive.TwoTowersConfig(image=image, text=text, embed_dim=6, init_scale=10.0, max_scale=100.0)
    graph, shapes = contrastive.abstract(cfg)
    params = random_params(shapes)
    stablehlo.write(Weights(cfg, params), tmp_path / "model.stablehlo", rows=1, length=24, slots=3, platforms=("cpu",))
    rows = random_packed(np.random.default_rng(1), [[12, 7]], L=24, K=3, P=48, max_side=8)
    found = export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes())).call(*rows.arrays)
    expected = fast_jit(lambda rows: navit.merge(graph, params).encode_images(rows))(rows)
    np.testing.assert_allclose(found["embedding"], expected, atol=1e-5)
    assert set(found) == {"pooled", "embedding"} and not found["embedding"][0, 2].any()
    assert json.loads((tmp_path / "model.json").read_text())["largest_side"] == 8


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(platforms=("cpu", "rocm")), "rocm; expected one or more of cpu, cuda, tpu"),
        (dict(platforms=()), "platforms are none"),
        (dict(rows=0), "rows is 0; expected 1 or more"),
        (dict(slots=-1), "slots is -1"),
        (dict(dtype="float16"), "'float16'; expected one of float32, bfloat16"),
    ],
)
def test_mistakes_are_named(classifier, tmp_path, wrong, words):
    with pytest.raises(UserError, match=words):
        stablehlo.write(classifier[0], tmp_path / "x", **wrong)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(classifier, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/model.stablehlo"):
        stablehlo.write(classifier[0], tmp_path / "file" / "model.stablehlo", length=8, slots=2, platforms=("cpu",))
