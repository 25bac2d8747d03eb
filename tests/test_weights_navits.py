"""NaViT of vit-pytorch and of MONAI: the same logits as theirs, for five images in one packed row."""

import json

import numpy as np
import parity
import pytest

from input_pipeline.errors import UserError
from navit_jax import weights
from navit_jax.weights import files

PATCH = 8


def saved(model, folder):
    """The file of a state dict, as its users save one."""
    folder.mkdir(exist_ok=True)
    parity.library("safetensors.torch").save_file(model.state_dict(), folder / "navit.safetensors")
    return folder / "navit.safetensors"


def lucid(image_size=(80, 96), **options):
    sizes = dict(image_size=image_size, patch_size=PATCH, num_classes=5, dim=64, depth=3, heads=3, mlp_dim=96)
    return full_size(parity.library("vit_pytorch.na_vit").NaViT(**sizes, dim_head=24, **options))


def monai(image_size=(80, 96), **options):
    sizes = dict(image_size=image_size, patch_size=PATCH, num_classes=5, hidden_size=64, mlp_dim=96, num_layers=3)
    options = dict(in_channels=3, spatial_dims=2, num_heads=4) | options
    return full_size(parity.library("monai.networks.nets.navit").NaViT(**sizes, **options))


def full_size(model):
    """Random, and what is learned of positions and of the pool's query as large as what it is added to."""
    torch = parity.library("torch")
    parity.randomise(model)
    with torch.no_grad():
        for part, tensor in model.named_parameters():
            if "pos_embed" in part or part.startswith("attn_pool_quer"):
                tensor.copy_(0.7 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(part))))
            elif part.endswith("gamma"):
                tensor.mul_(1.5)
    return model


def theirs(model, images):
    """(tokens, logits) of images, each on its own; tokens are what the pool reads."""
    torch = parity.library("torch")
    tokens, logits = [], []
    norm = model.norm if hasattr(model, "norm") else model.transformer.norm
    handle = norm.register_forward_hook(lambda module, args, out: tokens.append(out[0]))
    with torch.no_grad():
        for image in images:
            logits.append(model([[parity.as_torch(image, 0.0, 1.0)[0]]])[0])
    handle.remove()
    shapes = [[side // PATCH for side in image.shape[:2]] for image in images]
    return [x.reshape(*shape, -1) for x, shape in zip(tokens, shapes)], logits


CASES = [
    (lucid, {}),
    (lucid, dict(channels=4)),
    (monai, dict(in_channels=1, qkv_bias=True)),
    (monai, dict(dim_head=24, num_heads=2)),
]


@pytest.mark.slow
@pytest.mark.parametrize("make, options", CASES)
def test_the_same_tokens_and_logits(make, options, tmp_path):
    model = make(**options)
    channels = options.get("channels") or options.get("in_channels", 3)
    path = saved(model, tmp_path)
    if channels == 4:  # 64 * 4 values are a square of one channel, too
        (tmp_path / "config.json").write_text(json.dumps({"channels": 4}))
    images = parity.five_images(np.random.default_rng(0), PATCH, channels=channels)
    found = weights.read(path)
    assert found.cfg == weights.config_of(path) and found.cfg.channels == channels
    ours = parity.outputs(found, parity.packed(images, PATCH))
    tokens, logits = theirs(model, images)
    parity.assert_close(ours.tokens, tokens, atol=2e-5)
    parity.assert_close(ours.logits, logits, atol=2e-5)


def lucid_names(width=8, heads=2, size=4, values=3 * 2 * 2, layers=2):
    """Names and shapes of vit-pytorch's state dict."""

    def norm(name, *shape):
        return {f"{name}.gamma": shape, f"{name}.beta": shape}

    def attention(name):
        inner = heads * size
        heads_norms = {f"{name}.{x}_norm.gamma": (heads, 1, size) for x in "qk"}
        maps = {f"{name}.to_q.weight": (inner, width), f"{name}.to_kv.weight": (2 * inner, width)}
        return norm(f"{name}.norm", width) | heads_norms | maps | {f"{name}.to_out.0.weight": (width, inner)}

    names = {"pos_embed_height": (5, width), "pos_embed_width": (3, width), "attn_pool_queries": (width,)}
    names |= norm("to_patch_embedding.0", values) | norm("to_patch_embedding.2", width)
    names |= {"to_patch_embedding.1.weight": (width, values), "to_patch_embedding.1.bias": (width,)}
    for start in (f"transformer.layers.{i}" for i in range(layers)):
        names |= attention(f"{start}.0") | norm(f"{start}.1.0", width)
        names |= {f"{start}.1.1.weight": (12, width), f"{start}.1.1.bias": (12,)}
        names |= {f"{start}.1.4.weight": (width, 12), f"{start}.1.4.bias": (width,)}
    names |= norm("transformer.norm", width) | attention("attn_pool") | norm("mlp_head.0", width)
    return names | {"mlp_head.1.weight": (5, width)}


def written(folder, names):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    files.write_safetensors(folder / "navit.safetensors", arrays)
    return folder / "navit.safetensors", arrays


def test_every_number_of_vit_pytorch_finds_its_place(tmp_path):
    path, arrays = written(tmp_path, lucid_names())
    cfg, params = weights.read(path)[:2]
    assert (cfg.patch_size, cfg.channels, cfg.depth, cfg.heads, cfg.head_dim, cfg.num_classes) == (2, 3, 2, 2, 4, 5)
    assert (cfg.mean, cfg.std, cfg.posemb_max) == ((0.0,), (1.0,), 5)
    kernel = arrays["to_patch_embedding.1.weight"].reshape(8, 3, 2, 2)  # (channel, row, column)
    for row, column, channel in np.ndindex(2, 2, 3):
        ours = params["embed"]["kernel"][(row * 2 + column) * 3 + channel]
        np.testing.assert_array_equal(ours, kernel[:, channel, row, column])
    np.testing.assert_array_equal(params["embed"]["bias"], arrays["to_patch_embedding.1.bias"])
    scale = params["blocks"]["attn"]["q_norm"]["scale"]
    np.testing.assert_array_equal(scale[1], arrays["transformer.layers.1.0.q_norm.gamma"][:, 0] * 2)  # sqrt(4)
    np.testing.assert_array_equal(params["posemb"]["x"][2:], arrays["pos_embed_width"][[2, 2, 2]])
    k = arrays["attn_pool.to_kv.weight"][:8].T.reshape(8, 2, 4)
    np.testing.assert_array_equal(params["pool"]["k"]["kernel"], k)
    assert not params["blocks"]["attn"]["q"]["bias"].any()


@pytest.mark.parametrize(
    "change, config, words",
    [
        (lambda names: names.pop("transformer.layers.1.0.to_kv.weight"), {}, "lacks .*layers.1.0.to_kv.weight"),
        (lambda names: names.pop("mlp_head.1.weight"), {}, "lacks the tensor mlp_head.1.weight"),
        (lambda names: names.update({"transformer.layers.0.0.to_gate.weight": (2,)}), {}, "layers.0.0.to_gate.weight"),
        (lambda names: names.pop("transformer.layers.0.0.q_norm.gamma"), {}, "na_vit_nested_tensor"),
        (lambda names: names.update({"transformer.layers.0.0.to_q.weight": (8, 9)}), {}, r"to_q.weight is \[8, 9\]"),
        (lambda names: None, {"channels": 2}, "12 values, no square of 2 channels"),
    ],
)
def test_what_is_not_that_model_is_refused_by_name(change, config, words, tmp_path):
    names = lucid_names()
    change(names)
    path, _ = written(tmp_path, names)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        weights.read(path)


def test_volumes_are_refused(tmp_path):
    names = {f"pos_embed_axes.{i}": (4, 8) for i in range(3)} | {"attn_pool_query": (8,)}
    path, _ = written(tmp_path, names | {"blocks.0.attn.q_norm.gamma": (2, 1, 4)})
    with pytest.raises(UserError, match="spatial_dims=3; only 2"):
        weights.read(path)
