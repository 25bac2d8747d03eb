"""Promises of a model to call: the caller's order, answers that no neighbour changes, few programs, mistakes said."""

import functools
import itertools

import jax
import numpy as np
import pytest
from helpers import Image, pack, random_params
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.errors import UserError
from input_pipeline.patches import patchify, resize
from navit_jax import contrastive, navit, text_tower
from navit_jax.predict import Model, Unreadable
from navit_jax.predict.images import Tokens
from navit_jax.predict.rows import STEP_TOKENS, steps

SIZES = dict(width=32, depth=1, heads=2, mlp_dim=64, patch_size=4)
CLASSES = ("ant", "bee", "cat")


def make(classes=CLASSES, seed=0, **fields):
    cfg = navit.NaViTConfig(**{**SIZES, **fields}, num_classes=len(classes))
    return Model(cfg, random_params(navit.abstract(cfg)[1], seed), classes, max_tokens=16, threads=2)


def images(seed, count, low=2, high=60):
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(low), np.log(high), (count, 2))).astype(int)
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sides]


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """What a model compiles for itself, as `helpers.fast_jit` does."""
    quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick)
        yield


@pytest.fixture(scope="module")
def model():
    return make()


@functools.cache
def jitted(graphdef):
    def run(params, packed):
        model = navit.merge(graphdef, params)
        logits, extra = model(packed)
        return logits[0, 0], extra["pooled"][0, 0], model.tokens(packed)[0]

    return jax.jit(run)


def alone(model, image, max_tokens=16, enlarge=True):
    """The oracle: one image by itself in a row, through the model."""
    rows, columns = model._size(max_tokens, enlarge).grid(*image.shape[:2])
    values = patchify(resize(image, 4 * rows, 4 * columns), 4)
    coords = np.stack([0 * np.arange(len(values)), *np.divmod(np.arange(len(values)), columns)], axis=1)
    row = [Image(values, coords.astype(np.int32), (1, rows, columns))]
    logits, pooled, tokens = jitted(model.graphdef)(model.params, pack([row], 48, 1, values.shape[1]))
    return logits, pooled, np.asarray(tokens[: len(values)]).reshape(rows, columns, -1)


def check_alone(model, given_images, max_tokens, enlarge):
    said = model.classify(given_images, 3, max_tokens, enlarge=enlarge)
    for image, answer in zip(given_images, said, strict=True):
        shares = np.asarray(jax.nn.softmax(alone(model, image, max_tokens, enlarge)[0]))
        assert answer.labels == tuple(CLASSES[i] for i in np.argsort(-shares))
        assert np.allclose(answer.probabilities, np.sort(shares)[::-1], atol=1e-5)
        assert answer.tokens == answer.spent == np.prod(answer.grid) <= max_tokens


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20), st.sampled_from([12, 16]))
def test_an_answer_is_that_of_the_image_alone_in_the_callers_order(model, seed, count, max_tokens):
    check_alone(model, images(seed, count), max_tokens, True)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 300), st.sampled_from([12, 16, 40]), st.booleans())
def test_that_also_of_many_images_with_their_own_sizes(model, seed, count, max_tokens, enlarge):
    check_alone(model, images(seed, count), max_tokens, enlarge)


def test_vectors_and_tokens_are_those_of_the_image_alone(model):
    some = images(1, 9)
    answers = model.embed(some), model.tokens(some)
    for image, vector, grid in zip(some, *answers, strict=True):
        _, pooled, expected = alone(model, image)
        assert np.allclose(vector, pooled, atol=2e-5) and vector.dtype == grid.dtype == np.float32
        assert grid.shape == expected.shape and np.allclose(grid, expected, atol=2e-5)


def repeated_pool(model, tokens, heat):
    """The vector of a model of one head, in numpy."""
    pool = model.params["pool"]

    def dense(x, part):
        return x @ np.asarray(part["kernel"]).reshape(x.shape[-1], -1) + np.ravel(part.get("bias", 0))

    y = dense((heat[:, :, None] * dense(tokens, pool["v"])).sum((0, 1)), pool["out"])
    if model.cfg.pool == "query":
        return y + np.asarray(pool["query"])
    x = (y - y.mean()) / np.sqrt(y.var() + 1e-6) * np.asarray(pool["norm"]["scale"]) + pool["norm"].get("bias", 0)
    return y + dense(np.asarray(jax.nn.gelu(dense(x, pool["mlp"]["up"]))), pool["mlp"]["down"])


@pytest.mark.slow
@pytest.mark.parametrize("fields", [dict(pool="map"), dict(pool="map", bias=True), dict(pool="query", bias=True)])
def test_heat_is_the_weight_that_pooling_gives_each_token(fields):
    """Pooling repeated in numpy, from the image's tokens and the heat, gives the model's own vector."""
    model, some = make(heads=1, seed=3, **fields), images(1, 6)
    for image, heat in zip(some, model.heatmaps(some), strict=True):
        _, vector, tokens = alone(model, image)
        assert heat.shape == tokens.shape[:2] and heat.sum() == pytest.approx(1, abs=1e-5) and (heat >= 0).all()
        assert np.allclose(vector, repeated_pool(model, tokens, heat), atol=1e-4)


@pytest.mark.slow
def test_heat_of_several_heads_is_their_mean():
    two, some = make(seed=3), images(1, 3)
    halves = []
    for head in range(2):  # the same pooling weights in both heads
        params = jax.tree.map(np.asarray, two.params)
        for name in ("q", "k"):
            kernel = params["pool"][name]["kernel"]
            params["pool"][name]["kernel"] = np.repeat(kernel[:, head : head + 1], 2, axis=1)
        halves.append(Model(two.cfg, params, CLASSES, max_tokens=16).heatmaps(some))
    for heat, *parts in zip(two.heatmaps(some), *halves, strict=True):
        assert np.allclose(heat, np.mean(parts, axis=0), atol=1e-6)
        assert not np.allclose(parts[0], parts[1], atol=1e-3)


def test_what_cannot_be_read_is_said_in_its_place_and_the_others_are_answered(model):
    good, bad = images(7, 5), [b"", None, "missing.png", np.zeros((4, 4, 3)), b"%PDF"]
    for mixed in (list(itertools.chain(*zip(bad, good, strict=True))), bad, [*good, *bad], []):
        found = model.classify(mixed)
        assert len(found) == len(mixed)
        for given_image, answer in zip(mixed, found, strict=True):
            if any(given_image is x for x in bad):
                assert isinstance(answer, Unreadable) and answer.image is given_image and answer.reason
            else:
                (expected,) = model.classify([given_image])
                assert answer.labels == expected.labels


def test_an_iterator_gives_a_generator_that_holds_a_bounded_number_of_images(model, monkeypatch):
    monkeypatch.setitem(STEP_TOKENS, "cpu", 256)
    read, some = [], images(9, 20)

    def endless():
        for i in itertools.count():
            read.append(i)
            yield some[i % 20] if i % 7 else b"broken"

    answers, expected, held = model.classify(endless()), model.classify(some), 0
    assert not read
    for i, answer in enumerate(itertools.islice(answers, 1500)):
        if i % 7 == 0:
            assert isinstance(answer, Unreadable)
        else:
            assert np.allclose(answer.probabilities, expected[i % 20].probabilities, atol=1e-5)
        held = max(held, len(read) - i)
    assert held < 700
    answers.close()
    assert len(read) < 2200


@pytest.fixture
def compiled():
    """What XLA compiled, by its own count."""
    seen = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: seen.append(name))
    return lambda: seen.count("/jax/core/compile/backend_compile_duration")


def test_two_programs_whatever_comes(compiled):
    model = make(seed=2)
    model.embed(images(0, 1))
    one = compiled()
    for seed in range(4):
        model.embed(images(seed, 1 + 9 * seed))
    assert compiled() == one and model.compiled == 1
    model.embed(images(4, 300))
    model.embed(iter(images(5, 700)))
    model.embed(images(6, 170))
    assert compiled() == one + 1 and model.compiled == 2


@pytest.mark.parametrize("enlarged", [True, False])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_every_image_is_in_one_row_once_and_rows_are_full(enlarged, platform):
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 257, 3000) if enlarged else rng.integers(16, 257, 3000)
    stream = ((i, Tokens(np.full((n, 1), i % 251, np.uint8), (1, n))) for i, n in enumerate(lengths))
    shapes, seen, filled = set(), [], []
    for step in steps(stream, 256, platform=platform, enlarged=enlarged):
        packed = step.images
        shapes.add((packed.segment_ids.shape, packed.grids.shape))
        for place in step.places:
            here = slice(place.start, place.stop)
            assert place.stop - place.start == lengths[place.number]
            assert (packed.values[place.row, here] == place.number % 251).all()
            assert (packed.segment_ids[place.row] == place.slot + 1).sum() == lengths[place.number]
            assert (packed.segment_ids[place.row, here] == place.slot + 1).all()
            assert np.array_equal(packed.coords[place.row, here, 2], np.arange(lengths[place.number]))
        seen += [place.number for place in step.places]
        filled.append((packed.segment_ids > 0).mean())
    assert sorted(seen) == list(range(3000)) and len(shapes) <= 2
    assert np.mean(filled[:-1]) > (0.88 if enlarged else 0.95)  # all but what is left at the end


MISTAKES = [
    (lambda m: m.embed(images(0, 1), 37), "at most 36"),
    (lambda m: m.tokens(iter(images(0, 1)), 0), "at least 1"),
    (lambda m: m.embed("a.png"), "write [image]"),
    (lambda m: m.classify(images(0, 1), 0), "top_k"),
    (lambda m: m.classify(images(0, 1), classes=["a"]), "no text tower"),
    (lambda m: m.classify(images(0, 1), escalate=0.3), "budgets"),
    (lambda m: m.classify(images(0, 1), budgets=(4, 9)), "escalate=0.3"),
    (lambda m: m.classify(images(0, 1), budgets=(4, 9), escalate=0.3, confidence=0.5), "either"),
    (lambda m: m.classify(images(0, 1), budgets=(9, 4), escalate=0.3), "ascend"),
    (lambda m: m.classify(images(0, 1), budgets=(4, 99), escalate=0.3), "at most 36"),
    (lambda m: m.classify(images(0, 1), budgets=(4, 9), escalate=3), "from 0 to 1"),
    (lambda m: m.classify(images(0, 1), max_tokens=9, budgets=(4, 9), escalate=0.3), "not both"),
    (lambda m: m.embed_texts(["a"]), "no text tower"),
    (lambda m: make(classes=(), seed=1).classify(images(0, 1)), "no head"),
    (lambda m: make(pool="mean").heatmaps(images(0, 1)), "count alike"),
    (lambda m: Model(m.cfg, m.params, ("a",)), "the head has 3"),
]


def test_mistakes_are_said_before_any_image_is_read():
    model = make(posemb_max=6)
    for mistake, said in MISTAKES:
        with pytest.raises(UserError) as error:
            mistake(model)
        assert said in str(error.value)
    assert not model.compiled


@pytest.mark.slow
def test_classes_without_names_are_numbers_and_sigmoid_models_do_not_share_probability():
    cfg = navit.NaViTConfig(**SIZES, num_classes=3, head_bias=-1.1)
    model = Model(cfg, random_params(navit.abstract(cfg)[1]), max_tokens=16)
    (said,) = model.classify(images(0, 1))
    logits = np.asarray(alone(model, images(0, 1)[0])[0])
    assert sorted(said.labels) == ["0", "1", "2"]
    assert np.allclose(said.probabilities, np.sort(1 / (1 + np.exp(-logits)))[::-1], atol=1e-5)


@pytest.mark.slow
def test_merged_tokens_have_halved_grids():
    model, some = make(posemb="rope", merge=16, pool="mean"), images(0, 7)
    for image, found in zip(some, model.tokens(some, 40), strict=True):
        rows, columns = model._size(40, True).grid(*image.shape[:2])
        assert found.shape == (rows // 2, columns // 2, 16) and np.isfinite(found).all()
        (again,) = model.tokens([image], 40)
        assert np.allclose(found, again, atol=1e-5)


@pytest.mark.parametrize("as_iterator", [False, True])
def test_a_cascade_asks_the_least_confident_again(model, as_iterator):
    some = images(11, 20)
    some[3] = b"broken"
    first, second = model.classify(some, max_tokens=12), model.classify(some, max_tokens=16)
    usable = [i for i in range(20) if i != 3]
    least = sorted(usable, key=lambda i: first[i].probabilities[0])[: round(0.3 * 19)]
    found = model.classify(iter(some) if as_iterator else some, budgets=(12, 16), escalate=0.3)
    for i, answer in enumerate(found):
        if i == 3:
            assert isinstance(answer, Unreadable)
            continue
        expected = second[i] if i in least else first[i]
        assert answer.labels == expected.labels and np.allclose(answer.probabilities, expected.probabilities, atol=1e-5)
        assert answer.tokens == expected.tokens
        assert answer.spent == first[i].tokens + (second[i].tokens if i in least else 0)


@pytest.mark.slow
def test_a_cascade_of_three_by_confidence(model):
    some, level, used = images(12, 30), 0.8, []
    stages = [model.classify(some, max_tokens=n) for n in (4, 9, 16)]
    for i, answer in enumerate(model.classify(some, budgets=(4, 9, 16), confidence=level)):
        last = next((n for n in range(2) if stages[n][i].probabilities[0] >= level), 2)
        assert np.allclose(answer.probabilities, stages[last][i].probabilities, atol=1e-5)
        used.append(last)
    assert set(used) == {0, 1, 2}


def towers(**fields):
    image = navit.NaViTConfig(**SIZES)
    text = text_tower.TextConfig(width=32, depth=1, heads=2, mlp_dim=64, vocab_size=257, max_tokens=32)
    cfg = contrastive.TwoTowersConfig(image=image, text=text, embed_dim=24, init_scale=10.0, max_scale=100.0, **fields)
    return Model(cfg, random_params(contrastive.abstract(cfg)[1]), tokenizer="bytes", max_tokens=16)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [-2.0, None])
def test_two_towers_tell_classes_apart_that_are_given_in_words(bias):
    model, some = towers(init_bias=bias), images(13, 5)
    z, classes = np.stack(model.embed(some)), ["a red_fox", "b"]
    assert np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5) and z.shape == (5, 24)
    texts = model.embed_texts(["photo of a red fox", "a red fox!", "photo of b", "b!"])
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    assert np.allclose(model.embed_texts(["b!"]), texts[3:], atol=1e-5)
    means = texts.reshape(2, 2, -1).mean(1)
    logits = np.exp(model.params["logit_scale"]) * z @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    logits = logits + float(model.params.get("logit_bias", 0))
    shares = np.asarray(jax.nn.softmax(logits) if bias is None else jax.nn.sigmoid(logits))
    found = model.classify(some, classes=classes, templates=["photo of {}", "{}!"])
    for answer, share in zip(found, shares, strict=True):
        assert answer.labels == tuple(classes[i] for i in np.argsort(-share))
        assert np.allclose(answer.probabilities, np.sort(share)[::-1], atol=1e-5)


def test_mistakes_with_texts():
    model = towers()
    mistakes = [
        (lambda: model.classify(images(0, 1)), "classes=['cat', 'dog']"),
        (lambda: model.classify(images(0, 1), classes="cat"), "classes=['cat', 'dog']"),
        (lambda: model.classify(images(0, 1), classes=["cat"], templates=["a photo"]), "{}"),
        (lambda: model.classify(images(0, 1), classes=["", "cat"]), "without any token"),
        (lambda: model.embed_texts("cat"), "list of texts"),
        (lambda: Model(model.cfg, model.params).embed_texts(["cat"]), "name no tokenizer"),
    ]
    for mistake, said in mistakes:
        with pytest.raises(UserError) as error:
            mistake()
        assert said in str(error.value)
