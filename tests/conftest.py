"""One compilation cache for all tests of a session, a fresh one: equal programs compile once, and none is stale."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["NAVIT_JAX_CACHE"] = tempfile.mkdtemp(prefix="navit_jax_tests_")

import jax
import pytest

jax.config.update("jax_compilation_cache_dir", str(Path(os.environ["NAVIT_JAX_CACHE"]) / "compilation"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """The metrics of the run that every topology must repeat, on one device in this process."""
    from test_topology import config
    from test_train import run

    return run(config(), tmp_path_factory.mktemp("alone"))
