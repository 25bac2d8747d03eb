"""Oracles of the paper: beta drop rates, target grids by exhaustive search, resolution and schedule formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import base
from input_pipeline import budget
from input_pipeline.errors import UserError

BETA_ORACLE = {  # d_max: {d_mean: percent of rates below 0.1}
    0.4: {0.10: 60.3, 0.25: 11.5, 0.35: 1.3},
    0.7: {0.10: 66.9, 0.25: 27.3, 0.50: 2.3, 0.65: 0.1},
    0.9: {0.10: 70.4, 0.25: 33.5, 0.50: 5.9, 0.70: 0.9, 0.85: 0.1},
}


@pytest.mark.parametrize(
    ("top", "mean", "percent"), [(t, m, p) for t, row in BETA_ORACLE.items() for m, p in row.items()]
)
def test_beta_rates_match_the_paper(top, mean, percent):
    cfg = base.drop()
    cfg.update(kind="beta", mean_rate=mean, max_rate=top)
    u = (np.arange(100_000) + 0.5) / 100_000
    rate = budget.drop_rate(cfg, u, None, None, None)
    assert abs(100 * np.mean(rate < 0.1) - percent) < 0.6
    assert abs(rate.mean() - mean) < 0.002 and rate.max() <= top


def _largest_grid(h, w, tokens, patch):
    """Every scale at which a side's patch count changes, tried from the largest."""
    scales = sorted({k * patch / side for side in (h, w) for k in range(1, tokens + 1)}, reverse=True)
    for s in (x * (1 - 1e-9) for x in scales if x <= 100):
        rows, columns = (max(1, int(np.ceil(side * s / patch))) for side in (h, w))
        if rows * columns <= tokens:
            return rows, columns
    return 1, 1


@given(
    h=st.integers(1, 3000), w=st.integers(1, 3000), tokens=st.integers(1, 300), patch=st.sampled_from([8, 14, 16, 32])
)
@settings(deadline=None, max_examples=150)
def test_target_grid_is_the_largest_that_fits(h, w, tokens, patch):
    rows, columns = budget.target_grid(np.array([[h, w]]), np.array([tokens]), patch)[0]
    assert 1 <= rows * columns <= tokens
    best = np.prod(_largest_grid(h, w, tokens, patch))
    if max(h, w) / patch > 3:  # below that the scale limit of 100 decides
        assert best - rows * columns <= max(1, 0.02 * best)


def test_grid_keeps_the_aspect():
    sizes = np.random.default_rng(0).integers(100, 1000, (2000, 2))
    grid = budget.target_grid(sizes, np.full(2000, 256), 16)
    off = np.abs(np.log(grid[:, 0] / grid[:, 1] / (sizes[:, 0] / sizes[:, 1])))
    assert np.median(off) < 0.05 and np.percentile(off, 95) < 0.25


def test_resolution_distributions():
    u = (np.arange(200_000) + 0.5) / 200_000
    cfg = base.resolution()
    side = np.sqrt(budget.token_budget(cfg, u, 1))
    assert abs(side.mean() - 160) < 0.5 and abs(np.percentile(side, 25) - 112) < 1
    cfg.on = "area"
    assert abs(budget.token_budget(cfg, u, 1).mean() - (64**2 + 256**2) / 2) < 50
    cfg.update(on="side", distribution="truncated_normal")
    draws = np.random.default_rng(0).normal(-0.5, 1, 2_000_000)
    draws = draws[np.abs(draws) <= 1]
    expected = 64 + (draws + 1) / 2 * 192
    got = np.sqrt(budget.token_budget(cfg, u, 1))
    for q in (5, 25, 50, 75, 95):
        assert abs(np.percentile(got, q) - np.percentile(expected, q)) < 0.7


def test_resolution_dependent_and_scheduled_rates():
    cfg = base.drop()
    cfg.update(kind="resolution", min_rate=0.2, max_rate=0.8)
    u = (np.arange(1000) + 0.5) / 1000
    for tokens, mu in ((16, 0.2), (136, 0.5), (256, 0.8)):
        rate = budget.drop_rate(cfg, u, np.full(1000, tokens), (16, 256), None)
        assert abs(rate.mean() - mu) < 1e-3 and np.abs(rate - mu).max() <= 0.04 + 1e-9 and rate.std() > 0.015
    cfg.update(kind="scheduled", min_rate=0.2, end_rate=0.8, midpoint_examples=1000, tau_examples=-100.0)
    seen = np.array([0, 900, 1000, 1100, 2000])
    expected = 0.2 + 0.6 / (1 + np.exp((seen - 1000) / 100))
    assert np.allclose(budget.drop_rate(cfg, None, None, None, seen), expected)


@given(rate=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_one_token_is_always_kept_and_evaluation_drops_none(rate, seed):
    config = base.get_config()
    config.drop.update(kind="constant", rate=rate)
    config.seed = seed
    config.model.posemb_beyond = "interpolate"
    sizes = np.random.default_rng(seed).integers(1, 500, (50, 2))
    drawn = budget.Sampler(config, sizes, 16)(np.arange(200))
    assert (drawn.keep >= 1).all() and (drawn.keep <= drawn.grid.prod(1)).all()
    seen = budget.Sampler(config, sizes, 16, 64)(np.arange(50))
    assert (seen.keep == seen.grid.prod(1)).all() and (seen.keep <= 64).all() and (seen.index == np.arange(50)).all()


@pytest.mark.parametrize("kind", ["none", "constant", "beta", "resolution", "scheduled"])
def test_no_image_keeps_more_than_the_bound_that_rows_are_checked_with(kind):
    config = base.get_config()
    config.drop.update(kind=kind, rate=0.6, min_rate=0.05, max_rate=0.9, midpoint_examples=1e4, tau_examples=1e3)
    sampler = budget.Sampler(config, np.random.default_rng(0).integers(200, 300, (1000, 2)), 16)
    kept = sampler(np.arange(20_000)).keep.max()
    assert 0.75 * sampler.largest_kept <= kept <= sampler.largest_kept <= sampler.largest


def test_draws_are_a_function_of_position():
    config = base.get_config()
    config.augment.update(crop_min_area=0.3, crop_max_aspect=2.0)
    config.drop.kind = "beta"
    sampler = budget.Sampler(config, np.random.default_rng(0).integers(60, 500, (77, 2)), 16)
    whole = sampler(np.arange(500))
    for a, b in zip(whole, sampler(np.arange(200, 300)), strict=True):
        assert np.array_equal(a[200:300], b)
    top, left, h, w = whole.crop.T
    assert ((top >= 0) & (left >= 0) & (top + h <= 1 + 1e-9) & (left + w <= 1 + 1e-9)).all()
    assert np.min(h * w) > 0.25 and h.std() > 0.05


def test_positions_outside_the_table_are_refused_with_the_numbers():
    config = base.get_config()
    config.model.posemb_max = 20
    with pytest.raises(UserError, match=r"16x1600.*20 rows.*posemb_max=\d+"):
        budget.Sampler(config, np.array([[16, 1600]]), 16)
    config.model.posemb_beyond = "interpolate"
    assert budget.Sampler(config, np.array([[16, 1600]]), 16)(np.arange(10)).grid[:, 1].max() > 20
