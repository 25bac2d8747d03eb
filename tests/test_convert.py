"""`python -m navit_jax convert`: what it writes is read back as the same model, and mistakes cost nothing."""

import json

import jax
import numpy as np
import pytest
from helpers import random_params

from input_pipeline.errors import UserError
from navit_jax import __main__ as commands
from navit_jax import convert, navit, weights
from navit_jax.compatibility import named_leaves
from navit_jax.weights import ours

SMALL = dict(width=32, depth=2, heads=2, mlp_dim=48, patch_size=4, bias=True, qk_norm=False, num_classes=3)


def random_weights(classes=("ant", "bee", "cat"), **fields):
    cfg = navit.NaViTConfig(**SMALL | fields)
    return weights.Weights(cfg, jax.tree.map(np.asarray, random_params(navit.abstract(cfg)[1])), classes)


@pytest.fixture
def source(tmp_path):
    """An export: (its weights, its folder)."""
    found = random_weights(posemb="rope", registers=1)
    ours.write(found, tmp_path / "source")
    return found, str(tmp_path / "source")


def same(one, two):
    one, two = named_leaves(one.params), named_leaves(two.params)
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_to_ours_and_back_is_exact(source, tmp_path, capsys):
    convert.main([source[1], str(tmp_path / "copy"), "--to", "ours"])
    found = weights.read(tmp_path / "copy")
    assert found.cfg == source[0].cfg and same(found, source[0]) and found.classes == ("ant", "bee", "cat")
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'copy'}: {source[1]} as ours"


@pytest.mark.parametrize(
    "target, fields",
    [
        ("siglip2", dict(posemb="table", pool="map", num_classes=0)),
        ("timm", dict(posemb="table", pool="first", registers=1, mlp="gelu", posemb_resize="bicubic_antialias")),
    ],
)
def test_to_other_libraries_and_back_is_exact(tmp_path, target, fields):
    before = random_weights(classes=(), **fields)
    ours.write(before, tmp_path / "source")
    convert.main([str(tmp_path / "source"), str(tmp_path / target), "--to", target])
    assert same(weights.read(tmp_path / target), before)


@pytest.mark.parametrize("target", ["siglip2", "timm"])
def test_what_another_library_has_no_word_for_is_refused_by_name(tmp_path, target):
    ours.write(random_weights(posemb="fourier"), tmp_path / "source")
    with pytest.raises(UserError, match="posemb.*fourier"):
        convert.main([str(tmp_path / "source"), str(tmp_path / target), "--to", target])
    assert not list(tmp_path.glob(f"{target}/*.safetensors"))


def test_to_stablehlo(source, tmp_path):
    out = tmp_path / "served.stablehlo"
    convert.main([source[1], str(out), "--to", "stablehlo", "--length", "16", "--slots", "3", "--platforms", "cpu"])
    about = json.loads((tmp_path / "served.json").read_text())
    assert about["inputs"]["values"]["shape"] == [1, 16, 48] and about["platforms"] == ["cpu"]
    assert about["classes"] == ["ant", "bee", "cat"] and out.stat().st_size > 10_000


def test_info_says_what_is_known(source, capsys):
    convert.main([source[1], "--info"])
    out = capsys.readouterr().out
    for words in ("navit_jax", "a classifier of 3 classes", "width 32", "patch_size 4", "posemb rope", "registers 1"):
        assert words in out
    assert "classes: ant, bee, cat" in out and "mlp " not in out  # of the fields those that are not the default


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "required: source"),
        (["{source}"], "give a TARGET and --to FORMAT, or --info"),
        (["{source}", "out"], "give a TARGET and --to FORMAT"),
        (["{source}", "--to", "ours"], "give a TARGET"),
        (["{source}", "out", "--to", "onnx"], "'onnx'.*ours.*siglip2.*timm.*stablehlo"),
        (["{source}", "{source}", "--to", "ours"], "is there already.*--overwrite"),
        (["{source}", "out", "--to", "stablehlo", "--length", "many"], "--length.*'many'"),
        (["{source}/nowhere", "--info"], "nowhere"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(source, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=words):
        convert.main([argument.format(source=source[1]) for argument in arguments])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_ends_in_one_message(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["navit_jax", "convert", "/no/such/model", "--info"])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "/no/such/model" in said.err and said.out == ""
