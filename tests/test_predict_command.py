"""The predict command as a user calls it: lines and JSON in order, pictures, and mistakes in one line."""

import json
import subprocess
import sys

import jax
import matplotlib.image
import numpy as np
import pytest
from helpers import random_params
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image as PillowImage

import configs.base
import navit_jax
from input_pipeline.errors import UserError
from navit_jax import arguments, checkpoint, host_memory, navit, weights
from navit_jax.predict import command, picture
from navit_jax.predict.picture import Shown
from navit_jax.weights import Weights, ours

CFG = dict(width=32, depth=1, heads=2, mlp_dim=64, patch_size=4)
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def memory_as_it_is(monkeypatch):
    monkeypatch.setattr(host_memory, "keep", lambda: None)  # it would hold for every test of this process


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders of a model with a head, and of one without."""
    folders = []
    for classes in (CLASSES, ()):
        cfg, folder = navit.NaViTConfig(**CFG, num_classes=len(classes)), tmp_path_factory.mktemp("model")
        ours.write(Weights(cfg, random_params(navit.abstract(cfg)[1]), classes), folder)
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder: b/2.png, a.jpg, broken.png, notes.txt."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "b").mkdir()
    for name in ("b/2.png", "a.jpg"):
        PillowImage.fromarray(rng.integers(0, 256, (30, 50, 3), np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (folder / "notes.txt").write_text("no image")
    return folder


def call(*words):
    command.main([str(word) for word in words])


def test_lines_and_json_are_in_the_order_of_the_arguments(exported, photos, capsys):
    named = [photos / "b" / "2.png", "missing.png", photos]
    call(exported[0], *named, "--max-tokens", 16)
    lines, said = capsys.readouterr()
    call(exported[0], *named, "--max-tokens", 16, "--json", "--top-k", 2)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [photos / "b/2.png", "missing.png", photos / "a.jpg", photos / "b/2.png", photos / "broken.png"]
    assert (
        [x["image"] for x in found] == [line.split("  ")[0] for line in lines.splitlines()] == list(map(str, expected))
    )
    assert found[1]["error"] == "No such file or directory" and "PNG" in found[4]["error"]
    assert "2 of 5 images could not be read" in said
    model = navit_jax.load(exported[0])
    for answer, line, path in zip(found, lines.splitlines(), expected, strict=True):
        if "error" in answer:
            assert f"cannot be read: {answer['error']}" in line
            continue
        (wanted,) = model.classify([path], 2, 16)
        assert answer["labels"] == list(wanted.labels) and answer["tokens"] == wanted.tokens
        assert np.allclose(answer["probabilities"], wanted.probabilities, atol=1e-6)
        assert f"{wanted.labels[0]} {100 * wanted.probabilities[0]:.1f} %" in line


def test_patterns_vectors_and_cascades(exported, photos, capsys):
    call(exported[0], photos / "**" / "*.png", "--max-tokens", 16, "--json", "--embed")
    good, bad = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert len(good["embedding"]) == 32 and "error" in bad
    call(exported[0], photos / "a.jpg", "--budgets", "12,16", "--escalate", 1, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["spent"] > found["tokens"] > 12


@pytest.mark.parametrize("headless", [False, True])
def test_pictures_are_drawn_with_heat(exported, photos, tmp_path, capsys, headless):
    out = tmp_path / "new" / "grid.png"
    call(exported[headless], photos, "--max-tokens", 16, "--out", out, "--heatmap")
    pixels = matplotlib.image.imread(out)
    assert pixels.shape[1] == round(1200 * picture.SCALE) and pixels[..., :3].std() > 0.05
    assert len(capsys.readouterr().out.splitlines()) == (0 if headless else 3)


def test_a_picture_shows_heat_where_it_is():
    pixels, heat = np.full((40, 60, 3), 90, np.uint8), np.zeros((2, 3))
    heat[1, 2] = 1.0
    seen = picture.overlay(pixels, heat).astype(int)
    height, width = seen.shape[:2]
    hot, cold = seen[-height // 4, -width // 6], seen[height // 4, width // 6]
    top, bottom = (np.array(to_rgb(picture.colormaps[picture.MAP](x))) * 255 for x in (1.0, 0.0))
    assert (
        np.abs(hot - top).max() < np.abs(hot - bottom).max() and np.abs(cold - bottom).max() < np.abs(cold - top).max()
    )
    assert hot.sum() > cold.sum() + 100


def test_nothing_of_a_picture_overlaps_or_leaves_it():
    rng, long = np.random.default_rng(0), "a_very_long_name_of_an_image_" * 4
    images = [
        Shown(
            long, rng.integers(0, 256, (h, w, 3), np.uint8), "2x3: 6 tokens", [long, "b"], [0.9, 0.1], np.ones((2, 3))
        )
        for h, w in ((10, 400), (400, 10), (64, 64), (1, 1), (300, 200))
    ]
    figure = picture.draw([*images, Shown("bad.png", None, "why it could not be read " * 8)], long, "about")
    renderer, axes = FigureCanvasAgg(figure).get_renderer(), figure.axes[0]
    left, right, bottom, top = *axes.get_xlim(), *axes.get_ylim()
    pictures = [image.get_extent() for image in axes.images]
    assert len(pictures) == 2 * len(images)
    for i, (a, b, low, high) in enumerate(pictures):
        assert left <= a < b <= right and top <= high < low <= bottom
        for c, d, under, above in pictures[:i]:
            assert b <= c or d <= a or low <= above or under <= high
    for text in axes.texts:
        box = axes.transData.inverted().transform_bbox(text.get_window_extent(renderer))
        assert left <= box.x0 and box.x1 <= right and top <= min(box.y0, box.y1), text.get_text()
        assert max(box.y0, box.y1) <= bottom, text.get_text()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--heatmap"], "--out=grid.png"),
        (["--out", "grid"], "expected a picture's name"),
        (["--out", "grid.pong"], "expected a picture's name"),
        (["--out", "/proc/new/grid.png"], "cannot write /proc/new/grid.png"),
        (["--budgets", "a,b"], "such as 64,256"),
        (["--budgets", "12,16"], "escalate=0.3"),
        (["--max-tokens", "many"], "invalid int value: 'many'"),
        (["--max-tokens", "0"], "at least 1"),
        (["--embed", "--classes", "a,b"], "leave one out"),
        (["--classes", "a,b"], "no text tower"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["nothing*.jpg"], "no file matches"),
    ],
)
def test_mistakes(exported, photos, words, said):
    with pytest.raises(UserError) as error:
        call(exported[0], photos / "a.jpg", *words)
    assert said in str(error.value)


def test_more_mistakes(exported, photos, tmp_path, capsys):
    for words, said in (
        ([tmp_path / "no", photos / "a.jpg"], "There is no"),
        ([exported[0]], "required: images"),
        ([exported[0], tmp_path], "no image in the folder"),
        ([exported[1], photos / "a.jpg"], "no head"),
    ):
        with pytest.raises(UserError) as error:
            call(*words)
        assert said in str(error.value)
    assert not capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        call(exported[0], "missing.png", "--max-tokens", 16)
    assert ended.value.code == 2 and "cannot be read" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_2_and_a_traceback_only_with_debug(capsys):
    def mistaken(arguments):
        raise UserError("found, expected, what to do")

    with pytest.raises(SystemExit) as ended:
        arguments.run(mistaken, [])
    assert ended.value.code == 2 and capsys.readouterr().err == "error: found, expected, what to do\n"
    with pytest.raises(UserError):
        arguments.run(mistaken, ["--debug"])


def test_who_reads_the_output_may_leave():
    code = "from navit_jax import arguments; arguments.run(lambda _: [print(i, flush=True) for i in range(10**6)], [])"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1


def test_help_is_quick():
    code = "import sys; from navit_jax.predict import command; print({'jax', 'flax', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
    run = [sys.executable, "-m", "navit_jax", "predict", "--help"]
    helped = subprocess.run(run, capture_output=True, text=True)
    assert helped.returncode == 0 and "--heatmap" in helped.stdout and "MODEL is a run" in helped.stdout


def test_a_run_says_how_its_images_were_made(tmp_path):
    """Of its largest training images, and bits, background and shape as there; said otherwise, as said."""
    cfg = navit.NaViTConfig(**CFG, num_classes=3)
    config = configs.base.get_config()
    config.model.update(variant="Ti/8", **CFG)
    config.resolution.max_side = 24
    config.data.update(bits=16, background=(1, 2, 3), squash=True)
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints", 1, "")
    params = jax.tree.map(jax.numpy.asarray, random_params(navit.abstract(cfg)[1]))
    state = dict(params=params, step=np.int32(1), opt={})
    meta = dict(config=json.loads(config.to_json_best_effort()), data={}, classes=list(CLASSES))
    checkpoints.save(1, state, meta)
    checkpoints.close()
    ours.write(weights.read(tmp_path), tmp_path / "export")
    for path in (tmp_path, tmp_path / "export"):
        model = navit_jax.load(str(path))
        sizing = model._size(None, True)
        assert model.classes == CLASSES and (sizing.max_tokens, sizing.patch) == (36, 4)
        assert (sizing.bits, sizing.background, sizing.squash) == (16, (1, 2, 3), True)
    other = navit_jax.load(str(tmp_path), max_tokens=9, bits=8, squash=False)._size(None, True)
    assert (other.max_tokens, other.bits, other.squash) == (9, 8, False)
