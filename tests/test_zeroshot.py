"""Promises of zero-shot classification and of the pass over texts: each text once, classes in order, honest files."""

import csv
import itertools
import logging
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_text_tower import text_tower, text_vector
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluators import Labelled, make_config, open_images, same, table_forward

from input_pipeline import stream, text, text_index
from input_pipeline.errors import UserError
from input_pipeline.pairing import text_batches
from input_pipeline.sources import embedded, shapes
from navit_jax.evaluators import classification, outputs, suite, texts, zeroshot

SETS = dict(shapes=shapes.ShapesSource, digits=embedded.DigitsSource, photos=embedded.PhotosSource)
TOKENIZE = partial(zeroshot.tokenize, tokenizer=text.open_tokenizer("bytes"), max_tokens=64, lower=True)


def random_ids(rng, count, longest=20):
    return [rng.integers(0, 200, n).astype(np.int32) for n in rng.integers(1, longest + 1, count)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 99))
def test_every_text_comes_once_and_in_order(count, rows, seed):
    ids = random_ids(np.random.default_rng(seed), count)
    seen = []

    def tower(params, packed):
        seen.append(int((packed.grids[:, :, 2] > 0).sum()))
        return text_tower(params, packed)

    got = texts.encode(tower, None, ids, same, rows=rows)
    assert got.dtype == np.float32 and sum(seen) == count
    np.testing.assert_array_equal(got, [text_vector(of_one) for of_one in ids])


def test_a_process_hands_over_its_rows_and_reads_all():
    ids = random_ids(np.random.default_rng(0), 500)
    steps = [packed for packed, _ in text_batches(ids, 4)]
    assert len(steps) > 2
    whole = iter(steps)

    def tower(params, here):  # as devices do: the rows of all processes make one result
        step = next(whole)
        for mine, all_rows in zip(here.arrays, step.arrays, strict=True):
            np.testing.assert_array_equal(mine, all_rows[[1, 3]])
        return text_tower(params, step)

    got = texts.encode(tower, None, ids, same, rows=4, local=[1, 3])
    np.testing.assert_array_equal(got, [text_vector(of_one) for of_one in ids])


def test_a_vector_that_is_not_finite_is_named():
    ids = random_ids(np.random.default_rng(1), 30)
    ids[17][0] = 999

    def tower(params, packed):
        z_BME, (row, token) = text_tower(params, packed), np.argwhere(packed.values == 999)[0]
        z_BME[row, packed.segment_ids[row, token] - 1, 2] = np.inf
        return z_BME

    with pytest.raises(RuntimeError, match="text 17"):
        texts.encode(tower, None, ids, same, rows=1)


@pytest.mark.parametrize("rows", [1, 3])
def test_class_vectors_are_normalised_means_in_the_order_of_the_classes(rows):
    sentences, names = ("{}", "a picture of {}", "the {}, nothing but {}"), ("old_cat", "dog", "ape", "emu")
    ids = TOKENIZE(zeroshot.prompts(sentences, names))
    tower = lambda params, packed: text_tower(params, packed) * packed.grids[:, :, 2:]  # noqa: E731
    got = zeroshot.class_vectors(tower, None, ids, same, num_classes=4, rows=rows)
    for c, name in enumerate(["old cat", "dog", "ape", "emu"]):
        words = [name, f"a picture of {name}", f"the {name}, nothing but {name}"]
        mean = sum(text_vector([1 + byte for byte in w.encode()] + [0]).astype(np.float64) for w in words)
        np.testing.assert_allclose(got[c], mean / np.linalg.norm(mean), atol=1e-6)


def zero_shot(logits_scale=7.0, bias=-3.0, kind="softmax", workdir=None, budgets=(9,)):
    """Scores of 40 images of 7 classes, and those of `classification.run` for logits made here."""
    rng = np.random.default_rng(2)
    labels = rng.integers(-1, 7, 40).tolist()
    ids = TOKENIZE(zeroshot.prompts(("{}", "a {}"), [f"class {c}" for c in range(7)]))
    classes_CE = np.stack([sum(text_vector(of_one) for of_one in ids[2 * c : 2 * c + 2]) for c in range(7)])
    classes_CE /= np.linalg.norm(classes_CE, axis=1, keepdims=True)
    z = rng.normal(size=(40, 6)) + 8 * classes_CE[np.array(labels)]
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    config, images = make_config(), open_images(Labelled(labels, 7, broken=(5,)))
    loaders = dict(zip(budgets, stream.eval_loaders(config, [(images, budget, None) for budget in budgets])))
    kinds = dict(num_classes=7, probabilities=kind)
    forward = lambda params, batch: (None, z[batch.index])  # noqa: E731
    got = zeroshot.run(
        {budget: outputs.vectors(forward, None, loader, same) for budget, loader in loaders.items()},
        *(text_tower, None, same, ids),
        **(kinds | dict(scale=logits_scale, bias=bias, multi_label=False, rows=2, workdir=workdir)),
    )
    logits = (logits_scale * z.astype(np.float64) @ classes_CE.T + bias).astype(np.float32)
    loader = stream.eval_loader(config, images, budgets[0])
    return got, classification.run(table_forward(logits), None, loader, same, **kinds)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_scores_are_those_of_the_same_logits(tmp_path, kind):
    got, expected = zero_shot(kind=kind, workdir=tmp_path)
    for name in ("top1", "top5", "ece", "tokens"):
        assert got[f"zeroshot/{name}@9"] == pytest.approx(expected[name], abs=1e-5), name
    assert 0.3 < got["zeroshot/top1@9"] < 1 and got["zeroshot/images"] == 39 and got["zeroshot/skipped"] == 1
    warmer, _ = zero_shot(logits_scale=1.0, kind=kind, workdir=tmp_path)
    assert warmer["zeroshot/top1@9"] == got["zeroshot/top1@9"]
    assert abs(warmer["zeroshot/ece@9"] - got["zeroshot/ece@9"]) > 0.01


def test_it_writes_files_of_its_own(tmp_path):
    got, _ = zero_shot(workdir=tmp_path, budgets=(4, 16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zeroshot_over_tokens.csv", "zeroshot_over_tokens.png"]
    table = list(csv.DictReader((tmp_path / "zeroshot_over_tokens.csv").open()))
    assert [float(row["top1"]) for row in table] == [got[f"zeroshot/top1@{budget}"] for budget in (4, 16)]
    assert not any(name.startswith("eval/") for name in got)


def test_prompts_of_shapes_are_captions_of_shapes_and_favour_nothing():
    sizes, places = ("large", "small"), ("on the left", "in the middle", "on the right")
    words = list(itertools.product(sizes, shapes.COLOURS, places))
    captions = {f"a {size} {colour} {{}} {place}": (size, colour, place) for size, colour, place in words}
    found = [captions[line] for line in zeroshot.templates("", "shapes")]
    assert len(set(found)) == len(found)
    for values in zip(*found, strict=True):
        assert len({values.count(value) for value in values}) == 1


@pytest.mark.parametrize("name", SETS)
def test_embedded_sets_have_prompts_as_their_captions_are_and_that_fit(name, caplog):
    sentences, source = zeroshot.templates("", name), SETS[name]("train")
    with caplog.at_level(logging.WARNING):
        ids = TOKENIZE(zeroshot.prompts(sentences, source.class_names))
    assert len(ids) == len(set(sentences)) * len(source.class_names) and not caplog.records
    captions = {source.text(i).lower() for i in range(min(len(source), 20_000))}
    assert captions & set(zeroshot.prompts(sentences, source.class_names))
    assert name == "photos" or captions >= set(zeroshot.prompts(sentences, source.class_names))


def test_prompt_files_are_part_of_the_package():
    root = Path(__file__).parents[1]
    globs = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path for glob in globs["navit_jax.evaluators"] for path in (root / "navit_jax/evaluators").glob(glob)}
    assert {path.stem for path in packed} == set(SETS)


def test_templates_of_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\ufeff# mine\n\n  a photo of a {}  \r\n{} in {style}\n  # {}\nein schönes {}\n", "utf-8")
    assert zeroshot.templates(str(path), "shapes") == ("a photo of a {}", "{} in {style}", "ein schönes {}")
    assert zeroshot.prompts(("{} in {style}", "a {}"), ("{0}", "b_c")) == [
        "{0} in {style}",
        "a {0}",
        "b c in {style}",
        "a b c",
    ]


def test_zero_shot_can_be_off():
    assert zeroshot.templates("none", "shapes") == zeroshot.templates("", "folder=shapes") == ()
    assert zeroshot.prompts((), ("a",)) == zeroshot.prompts(("a {}",), ()) == []


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        (b"", "holds no sentence"),
        (b"# {}\n\n", "holds no sentence"),
        (b"# first\na {}\na photo\n", "line 3: 'a photo' lacks {}"),
        (b"a {} \xff\n", "cannot be read"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        zeroshot.templates(str(path), "shapes")
    assert message in str(error.value) and str(path) in str(error.value)


def test_cut_prompts_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        ids = TOKENIZE(["a b", "c" * 64, "d" * 63, "e" * 90])
    assert [len(of_one) for of_one in ids] == [4, 64, 64, 64]
    assert "2 of 4" in caplog.text and "cccc" in caplog.text


PARAMS = dict(logit_scale=np.log(5.0), logit_bias=np.array(-2.0))


def contrastive(workdir, *, texts=True, names=None, prompts="", files=None, source="shapes"):
    """(the evaluations of 40 images of 6 classes, how often the image tower was asked, the images, the loaders)."""
    config, rng, calls = make_config(source=source), np.random.default_rng(3), []
    config.eval.update(prompts=prompts, token_budgets=(4, 16))
    config.objective = "contrastive"
    images = open_images(Labelled([i % 6 for i in range(40)], 6, broken=(5,)))
    images.source.class_names = shapes.ShapesSource("train").class_names if names is None else names
    ids = random_ids(rng, 40)
    starts = np.cumsum([0, *map(len, ids)])
    found = text_index.Texts(np.concatenate(ids), starts, np.arange(40), 0) if texts else None
    held_out = SimpleNamespace(source=images.source, texts=found, files=files, tokenizer=text.open_tokenizer("bytes"))
    loaders = dict(zip((4, 16), stream.eval_loaders(config, [(images, budget, None) for budget in (4, 16)])))
    z = rng.normal(size=(40, 6)).astype(np.float32)
    z /= np.linalg.norm(z, axis=1, keepdims=True)

    def forward(params, batch):
        calls.extend(batch.index[batch.index >= 0].tolist())
        return None, z[batch.index]

    place = suite.Place(same, 2, (0, 1), workdir)
    return suite.contrastive(config, forward, text_tower, loaders, held_out, place), calls, config, held_out


def steady(scores):
    return {name: value for name, value in scores.items() if "per_s" not in name}


@pytest.mark.parametrize("files", [None, np.arange(40, dtype=np.int32) // 2])
def test_both_scores_come_of_one_pass_a_budget(tmp_path, files):
    found, calls, _, _ = contrastive(tmp_path, files=files)
    (evaluation,) = found
    both = steady(evaluation(PARAMS))
    assert sorted(calls) == sorted(2 * [i for i in range(40) if i != 5])
    retrieval_alone = steady(contrastive(tmp_path, files=files, prompts="none")[0][0](PARAMS))
    zero_shot_alone = steady(contrastive(tmp_path, texts=False)[0][0](PARAMS))
    assert both == retrieval_alone | zero_shot_alone
    assert both["retrieval/images"] == (39 if files is None else 20) and both["zeroshot/images"] == 39


def test_what_is_evaluated_decides_the_best_checkpoint(tmp_path):
    for paired, expected in ((True, "retrieval/t2i_r1"), (False, "zeroshot/top1")):
        (evaluation,), _, config, held_out = contrastive(tmp_path, texts=paired)
        metric = suite.default_metric(config, held_out)
        assert metric == expected and f"{metric}@16" in evaluation(PARAMS)
    config.objective = "supervised"
    assert suite.default_metric(config, held_out) == "eval/top1"
    config.data.multi_label = True
    assert suite.default_metric(config, held_out) == "eval/map"


@pytest.mark.parametrize(
    "texts, names, prompts, source",
    [(True, (), "mine.txt", "shapes"), (False, (), "", "shapes"), (False, ("a",), "", "folder=x")],
)
def test_what_cannot_be_evaluated_names_the_field_of_the_classes(tmp_path, texts, names, prompts, source):
    (tmp_path / "mine.txt").write_text("a {}")
    with pytest.raises(UserError, match="data.label_field"):
        contrastive(tmp_path, texts=texts, names=names, prompts=prompts and str(tmp_path / prompts), source=source)
