"""Rules between a foreign format and ours: the same linear maps, both ways, and every tensor accounted for."""

import jax
import numpy as np
import pytest
from parity import same

from input_pipeline.errors import UserError
from navit_jax.weights import files, mapping, reader

RULES = [
    *mapping.qkv("blocks/attn", "layers.{i}.qkv", then=lambda x: x[..., ::-1], back=lambda x: x[..., ::-1]),
    *mapping.linear("blocks/attn/out", "layers.{i}.out", ins=2),
    *mapping.norm("norm", "norm", bias=False),
    *mapping.zeros("norm/bias"),
    *mapping.conv_patch("embed", "patches", patch=2, bias=False),
    mapping.Rule("probe", ("one", "two"), lambda a, b, shape: mapping.expect(a, *shape) + b, lambda y: (y, 0 * y)),
]


def theirs_and_shapes():
    """A torch model of two layers, two heads of 3 values and width 6, and the shapes of ours."""
    rng, shapes = np.random.default_rng(0), {"layers.{i}.qkv": (18, 6), "layers.{i}.out": (6, 6)}
    theirs = {f"{name}.weight".replace("{i}", str(i)): s for name, s in shapes.items() for i in range(2)}
    theirs |= {name.replace("weight", "bias"): s[:1] for name, s in theirs.items()}
    theirs |= {"norm.weight": (6,), "patches.weight": (6, 3, 2, 2), "one": (4,), "two": (4,)}
    attn = {name: {"kernel": (2, 6, 2, 3), "bias": (2, 2, 3)} for name in "qkv"}
    attn["out"] = {"kernel": (2, 2, 3, 6), "bias": (2, 6)}
    mine = {
        "blocks": {"attn": attn},
        "norm": {"scale": (6,), "bias": (6,)},
        "embed": {"kernel": (12, 6)},
        "probe": (4,),
    }
    zeros = jax.tree.map(np.zeros, mine, is_leaf=lambda x: isinstance(x, tuple))
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in theirs.items()}, zeros


def test_rules_mean_the_same_linear_maps_and_lead_back(tmp_path):
    theirs, shapes = theirs_and_shapes()
    theirs["two"][:] = 0
    files.write_safetensors(tmp_path / "x.safetensors", theirs)
    tensors = reader.open_tensors(tmp_path)
    params = mapping.load(RULES, tensors, shapes)
    tensors.finish()
    attn, x = params["blocks"]["attn"], np.random.default_rng(1).normal(size=6).astype(np.float32)
    q, k, v = np.split(theirs["layers.1.qkv.weight"] @ x + theirs["layers.1.qkv.bias"], 3)
    for name, y in (("q", q.reshape(2, 3)[:, ::-1]), ("k", k.reshape(2, 3)[:, ::-1]), ("v", v.reshape(2, 3))):
        made = np.einsum("D,DNH->NH", x, attn[name]["kernel"][1]) + attn[name]["bias"][1]
        np.testing.assert_allclose(made, y, rtol=1e-5)
    made = np.einsum("NH,NHD->D", x.reshape(2, 3), attn["out"]["kernel"][0])
    np.testing.assert_allclose(made, theirs["layers.0.out.weight"] @ x, rtol=1e-5, atol=1e-6)
    patch = np.random.default_rng(2).normal(size=(2, 2, 3)).astype(np.float32)  # row, column, channel
    whole = np.einsum("dcij,ijc->d", theirs["patches.weight"], patch)
    np.testing.assert_allclose(patch.ravel() @ params["embed"]["kernel"], whole, rtol=1e-5)
    assert not params["norm"]["bias"].any()
    assert same(mapping.save(RULES, params), theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("layers.1.out.bias"), ("lacks the tensor layers.1.out.bias",)),
        (lambda t: t.update({"layers.2.out.bias": np.zeros(6)}), ("layers.2.out.bias [6]", "no place")),
        (lambda t: t.update({"layers.1.qkv.bias": np.zeros(17)}), ("layers.1.qkv.bias is [17]", "3 equal parts")),
        (lambda t: t.update({"patches.weight": np.zeros((6, 2, 2, 3))}), ("[6, 2, 2, 3]", "expected [6, 3, 2, 2]")),
        (lambda t: t.update({"one": np.zeros((2, 2))}), ("one is [2, 2], two is [4]", "expected [4]", "probe")),
    ],
)
def test_a_tensor_that_is_missing_extra_or_misshapen_is_named(change, said, tmp_path):
    theirs, shapes = theirs_and_shapes()
    change(theirs)
    files.write_safetensors(tmp_path / "x.safetensors", {name: x.astype(np.float32) for name, x in theirs.items()})
    tensors = reader.open_tensors(tmp_path)
    with pytest.raises(UserError) as error:
        mapping.load(RULES, tensors, shapes)
        tensors.finish()
    assert all(part in str(error.value) for part in said), str(error.value)


def test_a_transposed_matrix_of_as_many_values_is_refused(tmp_path):
    files.write_safetensors(tmp_path / "x.safetensors", {"up.weight": np.zeros((4, 6), np.float32)})
    with pytest.raises(UserError, match=r"up.weight is \[4, 6\]; expected \[6, 4\] for up/kernel"):
        rules = mapping.linear("up", "up", bias=False)
        mapping.load(rules, reader.open_tensors(tmp_path), {"up": {"kernel": np.zeros((4, 6))}})


def test_rules_that_do_not_cover_the_model_are_a_defect(tmp_path):
    theirs, shapes = theirs_and_shapes()
    files.write_safetensors(tmp_path / "x.safetensors", theirs)
    for rules in (RULES[1:], [*RULES, RULES[0]], [*RULES, *mapping.zeros("other")]):
        with pytest.raises(ValueError, match="cover the model"):
            mapping.load(rules, reader.open_tensors(tmp_path), shapes)


def test_ignored_tensors_need_no_place_and_patterns_mean_whole_names(tmp_path):
    files.write_safetensors(tmp_path / "x.safetensors", {n: np.zeros(1, np.float32) for n in ("a", "ab", "head.a")})
    tensors = reader.open_tensors(tmp_path)
    tensors.ignore("a")
    tensors.ignore(r"head\..*")
    with pytest.raises(UserError, match="1 tensors") as error:
        tensors.finish()
    assert "ab [1]" in str(error.value) and "head" not in str(error.value)
    files.write_safetensors(tmp_path / "x.safetensors", {f"t{n}": np.zeros(1, np.float32) for n in range(23)})
    with pytest.raises(UserError, match=r"23 tensors[\s\S]*t19 \[1\]\n  and 3 more"):
        reader.open_tensors(tmp_path).finish()
    with pytest.raises(UserError, match=r"ab is \[1\], expected \[2\]"):
        tensors.take("ab", (2,))
