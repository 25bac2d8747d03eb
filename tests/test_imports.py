"""The two halves stay apart: the model knows what a batch is, not where it comes from; the data knows no model."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a batch is, its errors, its patches, its plan. Of the size index the folder of caches, and nothing else.
SHARED = {"packed", "capacity", "errors", "patches", "packing", "pairing", "text"}
SHARED_NAMES = {"input_pipeline.size_index.cache_dir"}
# Commands that read the stream as train.py does, to show its rows and to plan for its shapes; they live in navit_jax
# because the commands do. And what makes tokens of the images that a caller has.
COMMANDS = {"show.py", "row_picture.py", "plan/planner.py", "plan/step.py", "predict/images.py", "predict/rows.py"}


def imports(source):
    """Dotted names of everything imported absolutely, at any depth: `from a.b import c` is a.b.c."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_the_data(source):
    """What a model file imports of input_pipeline though it may not."""
    names = [name.split(".") for name in imports(source) if name.split(".")[0] == "input_pipeline"]
    return [".".join(n) for n in names if not SHARED & set(n[1:2]) and ".".join(n) not in SHARED_NAMES]


def packages(source):
    return {name.split(".")[0] for name in imports(source)}


def files(folder):
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def test_the_model_imports_of_the_data_only_what_a_batch_is():
    exempt = {ROOT / "navit_jax" / name for name in COMMANDS}
    found = files("navit_jax")
    assert exempt <= set(found)
    crossing = {str(path.relative_to(ROOT)): of_the_data(path.read_text()) for path in found if path not in exempt}
    assert not {path: names for path, names in crossing.items() if names}


def test_the_data_imports_no_model():
    crossing = {path.name: packages(path.read_text()) & {"jax", "navit_jax"} for path in files("input_pipeline")}
    assert not {path: names for path, names in crossing.items() if names}


def test_only_the_loader_imports_grain():
    found = [*files("input_pipeline"), *files("navit_jax"), *files("configs"), ROOT / "train.py"]
    using = [str(path.relative_to(ROOT)) for path in found if "grain" in packages(path.read_text())]
    assert using == ["input_pipeline/loader.py"]


@pytest.mark.parametrize(
    "line, refused",
    [
        ("from input_pipeline.loader import Loader", True),
        ("from input_pipeline import errors, stream", True),
        ("import input_pipeline.stream as s", True),
        ("import input_pipeline", True),
        ("from input_pipeline import *", True),
        ("def f():\n    from input_pipeline.keys import permute", True),
        ("from input_pipeline.size_index import cache_dir, sizes", True),
        ("from input_pipeline.size_index import cache_dir", False),
        ("from input_pipeline.packed import Batch", False),
        ("from input_pipeline import packing", False),
        ("from navit_jax import stream", False),
    ],
)
def test_the_check_itself(line, refused):
    assert bool(of_the_data(line)) == refused


def test_packages_are_seen_under_every_form_of_import():
    assert packages("import jax.numpy as jnp") == packages("from jax.sharding import Mesh") == {"jax"}
