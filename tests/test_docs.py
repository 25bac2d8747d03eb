"""docs/: the blocks of extending.md do what they say, links lead somewhere, tables of options are as the code."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fast_jit, random_packed, random_params
from memory_source import MemorySource
from PIL import Image

from benchmarks import pictures
from configs import base
from input_pipeline import sources, stream
from input_pipeline.packed import Batch
from navit_jax import convert, navit, objectives, pooling, weights

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def sections():
    """{heading: its blocks} of docs/extending.md."""
    parts = re.split(r"^## ", (ROOT / "docs/extending.md").read_text(), flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: BLOCK.findall(part) for part in parts}


def run(heading):
    """The names that a section's blocks define."""
    names = {"__name__": "extending"}
    for block in sections()[heading]:
        exec(compile(block, f"docs/extending.md, {heading}", "exec"), names)
    return names


def test_every_example_is_short_and_run_here():
    lines = {heading: [len(block.splitlines()) for block in blocks] for heading, blocks in sections().items()}
    assert list(lines) == ["A source", "An objective", "An evaluator", "An encoder"]
    assert max(max(counts) for counts in lines.values()) < 40, lines


def test_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "STORED", dict(sources.STORED))
    monkeypatch.setenv("NAVIT_JAX_CACHE", str(tmp_path / "cache"))
    rng, lines = np.random.default_rng(0), ["image,label"]
    (tmp_path / "flowers").mkdir()
    for i in range(80):
        pixels = np.full((*rng.integers(40, 90, 2), 3), 3 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"flowers/{i}.png")
        lines.append(f"{i}.png,{('tulip', 'rose')[i % 2]}")
    (tmp_path / "flowers/labels.csv").write_text("\n".join(lines))
    config = run("A source")["get_config"]()
    config.augment.flip = False
    config.packing.update(rows_per_step=2, row_length=256)
    train, held_out = (stream.open_images(config, split) for split in ("train", "eval"))
    assert train.source.class_names == ("rose", "tulip")
    assert len(train.source) + len(held_out.source) == 80 and len(held_out.source) > 0
    assert not set(train.source.names) & set(held_out.source.names)
    batch, info = next(iter(stream.train_stream(config, train).loader(1)))
    seen = np.argwhere(batch.index >= 0)
    assert len(seen) and not info.bad
    for row, slot in seen:  # the pixels of the image that the label belongs to
        number = int(Path(train.source.names[batch.index[row, slot]]).stem)
        assert (batch.images.values[row][batch.images.segment_ids[row] == slot + 1] == 3 * number).all()
        assert batch.labels[row, slot] == 1 - number % 2


def small_config():
    config = base.get_config()
    config.model.update(variant="Ti/8", width=32, depth=2, heads=2, mlp_dim=64)
    config.data.channels = 1
    return config


class Pixels(nnx.Module):
    """Logits that are linear in an image's mean patch: a model that compiles in no time."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.zeros((64, 5)))

    def __call__(self, images, *, key=None):
        mean_BKP = pooling.mean_pool(images.values / 255, images.segment_ids, images.grids.shape[1])
        return mean_BKP @ self.kernel, {"pooled": mean_BKP}


def test_an_objective(monkeypatch):
    found = run("An objective")
    logits = np.array([[[0.0, 0.0, 50.0], [50.0, 0.0, 0.0], [np.nan] * 3]])
    loss = found["squared_distance"](logits, np.array([[0, 1, 0]]), np.array([[True, True, False]]))
    np.testing.assert_allclose(loss, [[4.0, 1.0, 0.0]], atol=1e-5)

    graph, params = navit.split(Pixels())
    monkeypatch.setattr(navit, "for_classes", lambda config, classes: (None, graph, None))
    empty = objectives.Objective(*[None] * len(objectives.Objective._fields))
    gradient = fast_jit(found["ordinal"](base.get_config(), 5, empty).gradient(None))
    images = random_packed(np.random.default_rng(0), [[5, 9], [12]], L=16, K=2, P=64)
    batch = Batch(images, np.array([[4, 0], [2, -1]], np.int32), np.array([[0, 1], [2, -1]], np.int32))
    before = gradient(params, batch, jax.random.key(0))[1]
    assert before["images"] == 3 and np.isclose(before["loss"], 2.0**2 + 2.0**2 + 0)  # logits of 0: 2 is expected
    for _ in range(30):
        slope, after = gradient(params, batch, jax.random.key(0))
        params = {"kernel": params["kernel"] - 0.1 * slope["kernel"]}
    assert after["loss"] < 0.7 * before["loss"]


def test_an_evaluator():
    found, config = run("An evaluator"), small_config()
    config.data.update(num_threads=1, channels=3)
    config.packing.update(row_length=64, rows_per_step=2)
    config.eval.token_budgets = (16,)
    source = MemorySource(count=60, classes=3, low=10, high=60)
    images = stream.Images(source, source.known_sizes(), 3)
    (loader,) = stream.eval_loaders(config, [(images, 16, None)])
    height, width = source.known_sizes().T
    logits = np.eye(3, dtype=np.float32)[np.where(width > 1.25 * height, np.arange(60), np.arange(60) + 1) % 3]

    def forward(params, batch):  # right on wide images alone
        return logits[batch.index], logits[batch.index]

    place = SimpleNamespace(put=lambda batch: batch)
    (evaluation,) = found["evaluations"](forward, {4: None, 16: loader}, place, 3)
    scores = evaluation({})
    assert (scores["aspect/tall"], scores["aspect/square"], scores["aspect/wide"]) == (0, 0, 1)
    assert scores["aspect/wide_images"] == (width > 1.25 * height).sum()
    assert sum(scores[f"aspect/{name}_images"] for name in found["ASPECTS"]) == 60


def test_an_encoder():
    found, config = run("An encoder"), small_config()
    cfg = navit.from_config(config.model, channels=1, num_classes=3)
    graph, shapes = found["abstract"](cfg)
    assert "mlp_norm" not in shapes["blocks"] and shapes["blocks"]["mlp"]["up"]["kernel"].shape == (2, 32, 64)
    params, rng = random_params(shapes), np.random.default_rng(0)
    images = random_packed(rng, [[5, 9]], L=16, K=2, P=64)
    forward = fast_jit(lambda images: navit.merge(graph, params)(images)[0])
    logits, values = np.asarray(forward(images)), images.values.copy()
    values[images.segment_ids == 2] = rng.integers(0, 256, (9, 64))
    other = np.asarray(forward(images._replace(values=values)))
    np.testing.assert_allclose(logits[0, 0], other[0, 0], atol=1e-5)
    assert np.abs(logits[0, 1] - other[0, 1]).max() > 1e-3
    fake = SimpleNamespace(attn_norm=lambda x: 2 * x, attn=lambda y, groups, rope: y + groups, mlp=lambda y: 3 * y)
    assert found["ParallelBlock"].__call__(fake, 1.0, 0.5, None, lambda y, i: y) == 1 + (2 + 0.5) + 3 * 2


def load(name):
    """A module of docs/hooks, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/hooks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_options_are_as_the_config():
    options, groups = load("options"), set()
    for page in PAGES:
        text = page.read_text()
        assert options.render(text) == text, f"{page.name} is old: python docs/hooks/options.py"
        groups |= {found[2] for found in options.MARKED.finditer(text)}
    made = {"get_config", "evaluation", *(name for name in base.get_config() if hasattr(base, name))}
    assert groups == made, "each group of fields has its table in a page"
    for group in groups:
        config = base.get_config() if group == "get_config" else getattr(base, group)()
        names = {name for names, *_ in options.fields(group) for name in re.findall(r"`(\w+)[\w.]*`", names)}
        wanted = {name for name in config if group != "get_config" or name not in groups | {"eval"}}
        assert names == wanted and all(comment for *_, comment in options.fields(group)), group


def test_every_format_is_in_the_table():
    text = (ROOT / "docs/weights.md").read_text()
    names = [module.__name__.split(".")[-1] for module in weights.formats()]
    assert len(names) > 8 and all(f"[{name}](../navit_jax/weights/{name}.py)" in text for name in names)
    assert all(f"`{name}`" in text for name in (*convert.FOLDERS, "stablehlo"))


@pytest.mark.slow
def test_the_build_fails_for_what_is_broken(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install -r requirements-docs.txt")
    ignored = shutil.ignore_patterns("__pycache__", "tests", "benchmarks")
    for name in ("docs", "navit_jax", "input_pipeline", "configs", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("mkdocs.yml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("tests/test_topology.py", "tests/test_isolation.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    breaks = {
        "docs/index.md": ("(data.md)", "(dato.md)"),
        "docs/data.md": ("#a-source", "#a-sauce"),
        "docs/training.md": ("../launch)", "../lunch)"),
        "input_pipeline/patches.py": ("def patchify(", "def undocumented():\n    pass\n\n\ndef patchify("),
        "configs/base.py": ("c.width, c.depth", "c.breadth, c.depth"),
    }
    for name, (old, new) in breaks.items():
        text = (tmp_path / name).read_text()
        assert old in text, name
        (tmp_path / name).write_text(text.replace(old, new, 1))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode != 0
    for words in ("dato.md", "a-sauce", "lunch", "input_pipeline.patches.undocumented", "model.md: a table of options"):
        assert words in found.stderr, (words, found.stderr)


def test_pictures_are_drawn_from_the_committed_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    pictures.speed(tmp_path / "speed.png")
    pictures.tokens(tmp_path / "tokens.png")
    for name, committed in (("speed", "images_per_second"), ("tokens", "accuracy_over_tokens")):
        sizes = [Image.open(path).size for path in (tmp_path / f"{name}.png", ROOT / f"docs/{committed}.png")]
        assert sizes[0] == sizes[1]
    assert max((ROOT / "docs" / file).stat().st_size for _, file in pictures.PICTURES.values()) < 150_000


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    names = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name.lower()).strip().replace(" ", "-") for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_without_mkdocs(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}"
