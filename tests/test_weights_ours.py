"""Our own export, runs, and names on the hub."""

import dataclasses
import fnmatch
import json
import sys
import types
from pathlib import Path

import jax
import numpy as np
import parity
import pytest
from helpers import random_params
from parity import refused, same

import configs.base
from navit_jax import checkpoint, contrastive, navit, text_tower, weights
from navit_jax.weights import files, hub, ours

ONE = navit.NaViTConfig(
    width=16, depth=2, heads=2, mlp_dim=24, patch_size=4, num_classes=3, head_bias=-0.5, posemb="table",
    posemb_grid=(3, 5), mean=(0.1, 0.2, 0.3), registers=1, bias=True,
)  # fmt: skip
TWO = contrastive.TwoTowersConfig(
    image=dataclasses.replace(ONE, num_classes=0, head_bias=0.0),
    text=text_tower.TextConfig(width=16, depth=1, heads=2, mlp_dim=24, vocab_size=257, max_tokens=8, pad=0),
    embed_dim=12,
    init_scale=10.0,
    max_scale=100.0,
    init_bias=-10.0,
)


def model_of(cfg, **fields):
    params = jax.tree.map(np.asarray, random_params(ours.shapes_of(cfg)))
    return weights.Weights(cfg, params, **fields)


@pytest.mark.parametrize("cfg", [ONE, TWO], ids=["one tower", "two towers"])
def test_our_export_comes_back_exactly(cfg, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    model = model_of(cfg, classes=("cat", "dog", "Katze"), tokenizer=str(tmp_path / "tokenizer.json"), source="here")
    model = model._replace(inputs=dict(max_tokens=16, squash=True))
    ours.write(model, tmp_path / "out")
    found = weights.read(tmp_path / "out")
    assert (found.cfg, found.classes) == (cfg, model.classes)
    assert found.tokenizer == str(tmp_path / "out" / "tokenizer.json") and Path(found.tokenizer).read_text() == "{}"
    assert same(found.params, model.params) and found.inputs == model.inputs
    assert weights.config_of(tmp_path / "out" / "model.safetensors") == cfg


def test_an_export_that_this_version_does_not_know_is_refused(tmp_path):
    ours.write(model_of(ONE), tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    for change, said in (
        ({"config": about["config"] | {"colour": 3}}, "unknown fields colour=3"),
        ({"inputs": {"colour": 3}}, "unknown inputs, colour"),
        ({"config": {k: v for k, v in about["config"].items() if k != "width"}}, "lacks the fields width"),
        ({"config": about["config"] | {"pool": "middle"}}, "model.pool is 'middle'"),
        ({"config": about["config"] | {"depth": 3}}, ", expected [3, 2, 8]"),
        ({"kind": "ThreeTowers"}, "kind is 'ThreeTowers'"),
    ):
        path.write_text(json.dumps(about | change))
        refused(tmp_path, said)
    del about["config"]["mlp"]  # of before there was a choice
    path.write_text(json.dumps(about))
    assert weights.read(tmp_path).cfg == ONE


def run_of(cfg, folder, config, **meta):
    """A run's folder with one checkpoint of random parameters, whose average is twice as large."""
    params = model_of(cfg).params
    meta = dict(config=json.loads(config.to_json_best_effort()), data={}, **meta)
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", 1, "")
    state = dict(params=params, ema=jax.tree.map(lambda x: 2 * x, params), step=np.int32(1), opt={})
    checkpoints.save(1, jax.tree.map(jax.numpy.asarray, state), meta)
    checkpoints.close()
    return params


def config_like(cfg, objective):
    config = configs.base.get_config().unlock()
    config.objective, config.data.channels = objective, cfg.channels
    for name in (*navit.OVERRIDES, *navit.CONFIG_FIELDS):
        config.model[name] = getattr(cfg, name)
    return config


def test_a_run_is_read_with_its_config_classes_and_average(tmp_path):
    config = config_like(ONE, "supervised")
    params = run_of(ONE, tmp_path, config, classes=["a", "b", "c"])
    expected = dataclasses.replace(ONE, head_bias=-float(np.log(3)))  # what a sigmoid loss starts from
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "1", str(tmp_path)):
        assert weights.config_of(path) == expected
    found = weights.read(tmp_path)
    assert (found.cfg, found.classes, found.tokenizer) == (expected, ("a", "b", "c"), "")
    assert same(found.params, jax.tree.map(lambda x: 2 * x, params))


def test_a_run_from_before_a_field_was_there_has_what_it_meant_then(tmp_path):
    cfg = dataclasses.replace(TWO, text=dataclasses.replace(TWO.text, depth=2, pad=-1, bias=True))
    config = config_like(cfg.image, "contrastive")
    config.contrastive.loss, config.contrastive.embed_dim, config.text.max_tokens = "sigmoid", 12, 8
    del config.model.norm, config.model.mlp, config.text.pad, config.contrastive.project_image
    params = run_of(cfg, tmp_path, config)
    found = weights.read(tmp_path)
    assert (found.cfg, found.classes, found.tokenizer) == (cfg, (), "bytes")
    assert found.params["logit_scale"] == 2 * params["logit_scale"]


def test_a_run_whose_config_is_of_another_model_is_refused(tmp_path):
    run_of(ONE, tmp_path, config_like(dataclasses.replace(ONE, mlp_dim=32), "supervised"))
    refused(tmp_path, "does not fit the model that its config describes", "blocks/mlp/up/kernel: [2, 16, 24]")


class Hub(types.ModuleType):
    """huggingface_hub with one repository; `network` False: from its cache only."""

    def __init__(self, folder, files, network=True):
        super().__init__("huggingface_hub")
        self.folder, self.files, self.network, self.asked = folder, files, network, []

    def snapshot_download(self, repo, *, revision, allow_patterns, ignore_patterns):
        self.asked.append((repo, revision))
        if not self.network and not self.folder.exists():
            raise FileNotFoundError("no snapshot in the cache")
        self.folder.mkdir(exist_ok=True)
        for name, data in self.files.items() if self.network else ():
            if any(fnmatch.fnmatch(name, p) for p in allow_patterns) and not fnmatch.fnmatch(name, *ignore_patterns):
                (self.folder / name).write_bytes(data)
        return str(self.folder)


def test_a_hub_name_brings_the_weights_and_what_is_beside_them_and_no_more(tmp_path, monkeypatch):
    ours.write(model_of(ONE), tmp_path / "here")
    (tmp_path / "here" / "other.safetensors").write_bytes(b"")
    contents = {p.name: p.read_bytes() for p in (tmp_path / "here").iterdir()} | {
        "pytorch_model.bin": b"",
        "a/b.json": b"",
    }
    library = Hub(tmp_path / "cache", contents)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    assert weights.read("org/name@v1.0").cfg == ONE
    assert set(library.asked) == {("org/name", "v1.0")}
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["config.json", "model.safetensors"]
    library.network = False
    assert weights.read("org/name").source == "navit_jax, org/name"
    refused_hub = Hub(tmp_path / "empty", contents, network=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", refused_hub)
    refused("org/name", "There is no path org/name", "no snapshot in the cache", "hf download org/name --local-dir")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path / "bare", {"config.json": b"{}"}))
    refused("org/name", "has no weights")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("org/name", "pip install huggingface_hub")


def test_shards_of_the_hub_are_those_of_the_index(tmp_path, monkeypatch):
    index = {"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
    files.write_safetensors(tmp_path / "x", {"a": np.zeros(1, np.float32)})
    data = (tmp_path / "x").read_bytes()
    contents = {"model.safetensors.index.json": json.dumps(index).encode(), "consolidated.safetensors": data}
    contents |= {"consolidated.safetensors.index.json": b"{}", "spiece.model": b""}
    library = Hub(tmp_path / "cache", contents | {"m-1.safetensors": data, "m-2.safetensors": data})
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    hub.fetch("org/name")
    found = {p.name for p in (tmp_path / "cache").iterdir()}
    assert found == library.files.keys() - {"consolidated.safetensors"}


@pytest.mark.slow
def test_the_library_of_the_hub_without_a_network(tmp_path, monkeypatch):
    parity.library("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("org/some-name", "There is no path org/some-name", "give that folder")
