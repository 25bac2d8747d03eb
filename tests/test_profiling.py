"""A trace holds the steps that were asked for, and a request that no step can meet is refused."""

import gzip
import json

import pytest
from test_train import losses, run, tiny

import train
from input_pipeline.errors import UserError
from navit_jax import profiling


@pytest.mark.parametrize("steps", ["13:10", "0:3", "10", "a:b", "10-13"])
def test_anything_but_two_steps_in_order_is_refused(tmp_path, steps):
    with pytest.raises(UserError, match="10:13"):
        profiling.Profile(steps, tmp_path)


@pytest.mark.parametrize("start, total", [(10, 20), (0, 12), (15, 20)])
def test_steps_that_the_run_does_not_train_are_refused(tmp_path, start, total):
    with pytest.raises(UserError, match=f"{start + 1} to {total}"):
        profiling.Profile("10:13", tmp_path).check(start, total)


@pytest.mark.slow
def test_the_trace_of_a_run_holds_its_steps_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "PROFILE_STEPS", type("Flag", (), {"value": "6:8"}))
    records = run(tiny(log_every_steps=4, checkpoint_every_steps=0), tmp_path)
    (path,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    assert [int(e["args"]["step_num"]) for e in events if e.get("name") == "train"] == [6, 7, 8]
    assert sorted(losses(records)) == [4, 5, 8, 12]  # the means around the trace are apart from it
