"""notebooks/: as they are committed, their install cell on machines of several kinds, and, slow, each run whole."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import optional
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
library = partial(optional.library, variable="NOTEBOOKS", requirements="requirements-notebooks.txt")
# What a run must print, and the least that the number in it may be; pictures in it.
PRINTED = {
    "quickstart": (r"top1@9 (0\.\d+)", 0.85, 6),
    "train_on_tpu": (r"resumed at step (\d+)", 30, 1),
    "contrastive": (r"colour +8 classes, ([\d.]+)% right", 90, 4),
    "pretrained": (r"fine-tuned: +([\d.]+)%", 70, 4),
}
# Devices that the notebook's own process has: a TPU belongs to one process, so none while a command still needs it.
HELD = 'getattr(__import__("sys").modules.get("jax._src.xla_bridge"), "_backends", None)'


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == sorted(PRINTED)


@every_notebook
def test_as_committed(path):
    notebook, cells = json.loads(path.read_text()), code_cells(path)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells), "strip the outputs"
    assert source(cells[0]) == source(code_cells(NOTEBOOKS[0])[0]), "the install cell is the same in all notebooks"
    assert cells[0]["metadata"] == {"cellView": "form"} and not any(cell["metadata"] for cell in cells[1:])
    assert not any(re.search("requirements|git clone", source(cell)) for cell in cells[1:]), "one install cell"
    assert source(cells[1]).startswith("# SMALL")
    assert max(len(source(cell).splitlines()) for cell in cells[1:]) <= 30, "a long cell is not read"
    assert max(len(line) for cell in notebook["cells"] for line in source(cell).splitlines()) <= 120
    meta = notebook["metadata"]
    assert meta["colab"]["name"] == path.name and meta["kernelspec"]["name"] == "python3"
    assert meta["accelerator"] == ("TPU" if "tpu" in path.stem else "GPU")


@every_notebook
def test_what_is_mentioned_is_there(path):
    text = "".join(source(cell) for cell in json.loads(path.read_text())["cells"])
    for name in re.findall(r"\b(?:docs|configs|launch)/\w+\.\w+", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\b\w+\.ipynb", text):
        assert (ROOT / "notebooks" / name).is_file(), name


@every_notebook
def test_valid(path):
    nbformat = library("nbformat")
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))


@pytest.fixture
def machine(tmp_path):
    """A function that runs the install cell in an empty folder, with a git, pip and jax that only say what they do."""
    fake = tmp_path / "fake"
    project = tmp_path / "project"
    for name, content in {
        "fake/jax/__init__.py": "default_backend = lambda: 'cpu'\ndevice_count = lambda: 3\n",
        "fake/pip/__init__.py": "",
        "fake/pip/__main__.py": "import sys\nprint('pip', *sys.argv[1:])\n",
        "project/navit_jax/__init__.py": "",
        "project/train.py": "",
        "bin/git": f'#!/bin/sh\necho "git $@"\nfor to; do :; done\ncp -r {project} "$to"\n',
        "here/.keep": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "bin/git").chmod(0o755)

    def run(requirements, repository="https://example.org/us/navit_jax", smi=""):
        (project / "requirements.txt").write_text(requirements)
        if smi:
            (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\necho '{smi}'\n")
            (tmp_path / "bin/nvidia-smi").chmod(0o755)
        cell = source(code_cells(NOTEBOOKS[0])[0]).replace('REPOSITORY = ""', f'REPOSITORY = "{repository}"')
        cell += "\nprint(os.getcwd(), sys.path[0], DEVICE, COUNT)"
        env = dict(os.environ, PATH=f"{tmp_path / 'bin'}:/bin:/usr/bin", PYTHONPATH=str(fake))
        done = subprocess.run(
            [sys.executable, "-c", cell], cwd=tmp_path / "here", env=env, capture_output=True, text=True
        )
        return done.stdout + done.stderr

    return run


def test_install_clones_once_and_installs_what_is_missing(machine, tmp_path):
    said = machine("# comment\nnumpy>=1\nno_such_package_of_ours>=1  # why\n")
    root = str(tmp_path / "here/navit_jax")
    assert f"git clone --quiet --depth=1 https://example.org/us/navit_jax {root}" in said
    assert "pip install --quiet -r requirements.txt\n" in said and f"{root} {root} cpu 3" in said
    assert "git clone" not in machine("numpy>=1\n"), "it is there already"


@pytest.mark.parametrize("cuda, extra", [("12.4", "cuda12"), ("13.0", "cuda13")])
def test_install_for_the_gpu(machine, cuda, extra):
    smi = f"| NVIDIA-SMI 550.54   Driver Version: 550.54   CUDA Version: {cuda} |"
    assert f"pip install --quiet -r requirements.txt jax[{extra}]\n" in machine("numpy>=99\n", smi=smi)


def test_nothing_is_installed_where_all_is_there(machine):
    assert "pip" not in machine("numpy>=1\n\n# comment\npillow\n", smi="CUDA Version: 12.4")


def test_install_asks_for_the_repository(machine):
    said = machine("numpy>=1\n", repository="")
    assert "Which repository?" in said and "Traceback" not in said


@pytest.mark.slow
@every_notebook
def test_runs_whole(path, tmp_path):
    nbformat, nbclient, _ = (library(name) for name in ("nbformat", "nbclient", "ipykernel"))
    env = dict(os.environ, JAX_PLATFORMS="cpu", NAVIT_JAX_SMALL="1", TMPDIR=str(tmp_path))
    for name in ("MPLBACKEND", "XLA_FLAGS"):  # of the tests, and no reader's
        env.pop(name, None)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search("^ *!", cell.source, re.MULTILINE):
            cell.source = f"assert not {HELD}, 'on a TPU this command would find it taken'\n{cell.source}"
    notebook.cells.append(nbformat.v4.new_code_cell(f"assert {HELD}, 'the check above sees nothing'"))
    resources = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute(env=env)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert not re.search(r"Traceback|^error:", text, re.MULTILINE), text[-3000:]
    pattern, least, pictures = PRINTED[path.stem]
    assert float(re.search(pattern, text)[1]) >= least, re.search(pattern, text)[0]
    drawn = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) >= pictures
    for picture in drawn:
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L")).std() > 5, "an empty picture"
