import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline import keys


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_shuffle_is_a_permutation(size, seed, epoch):
    out = keys.permute(np.arange(size), size, seed, np.full(size, epoch))
    assert sorted(out) == list(range(size))


def test_shuffle_differs_by_epoch_and_seed_and_mixes():
    n, here = 20_000, np.arange(20_000)
    a, b, c = (keys.permute(here, n, seed, np.full(n, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0)))
    for x, y in ((a, b), (a, c), (a, here)):
        assert np.mean(x == y) < 0.001
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03


def test_uniform_is_uniform_and_streams_are_independent():
    u, v = (keys.uniform(7, name, np.arange(200_000)) for name in ("budget", "drop"))
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, 50)[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 100  # chi-square of 49 degrees: p = 2e-5
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.01
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.01


def test_a_draw_depends_on_its_counter_alone():
    assert np.array_equal(keys.uniform(3, "x", np.arange(100))[50:], keys.uniform(3, "x", np.arange(50, 100)))


def test_generators_in_turn_are_the_generators():
    counters = np.array([3, 70_000, 2**40])
    for counter, rng in zip(counters, keys.generators(5, "tokens", counters), strict=True):
        again = keys.generator(5, "tokens", int(counter))
        assert np.array_equal(rng.permutation(100), again.permutation(100)) and rng.random() == again.random()
        rng.integers(0, 100, 3, np.uint32)  # leaves half a word behind
