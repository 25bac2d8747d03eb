"""The cascade's benchmark: what single budgets cost at an accuracy, and the picture; all from made-up points."""

import matplotlib.image
import numpy as np
import pytest

from benchmarks import cascade
from benchmarks.cascade import BUDGETS, CASCADES, SHARES, Point


def points():
    """Accuracies that rise, but for one budget that is no better than a smaller one; a cascade in between."""
    top1 = [0.6, 0.7, 0.65, 0.9, 0.9]
    singles = [Point((n,), 0.0, x, n / 10, float(n)) for n, x in zip(BUDGETS, top1, strict=True)]
    return singles + [Point(c, share, 0.8, 1.0, 20.0) for c in CASCADES for share in SHARES]


def test_what_a_single_budget_costs_at_an_accuracy():
    found = points()
    assert cascade.single_at(found, 0.7, "ms") == pytest.approx(0.9)
    assert cascade.single_at(found, 0.8, "ms") == pytest.approx(
        (0.9 + 2.5) / 2
    )  # between 9 and 25: 16 is no better than 9
    assert cascade.single_at(found, 0.9, "tokens") == pytest.approx(25)
    assert cascade.single_at(found, 0.91, "ms") == np.inf


def test_the_table_and_the_picture(tmp_path):
    lines = cascade.table(points()).splitlines()
    assert len(lines) == 2 + len(BUDGETS) + len(CASCADES) * len(SHARES)
    assert lines[-1] == "| 16 then 25 tokens, 50 % | 80.0 % | 20.0 | 1.00 | 0.85 | 1.70 |"
    cascade.draw(points(), 100, tmp_path / "new" / "a.png")
    assert matplotlib.image.imread(tmp_path / "new" / "a.png")[..., :3].std() > 0.02


def test_the_recipe_is_of_fields_that_exist():
    from configs import quickstart

    config = quickstart.get_config("shapes")
    for name in cascade.RECIPE | cascade.QUICK:
        group = config
        for part in name.split("."):
            group = group[part]
