"""SigLIP and SigLIP 2, both towers, against transformers: images, texts through its tokenizer and ours, logits."""

import dataclasses
import json

import jax
import numpy as np
import parity
import pytest
from helpers import random_params
from siglip_models import PATCH, build, load, run, same, some_images
from test_text_tower import pack

from input_pipeline import text
from input_pipeline.errors import UserError
from navit_jax import contrastive, navit, text_tower, weights
from navit_jax.weights import siglip

pytestmark = pytest.mark.slow

WORDS = (
    "A photo of a cat",
    "two DOGS",
    "z",
    "the quick brown fox jumps over the lazy dog",
    "a cat, or not?",
    "what? 7 of them",
)


def save_tokenizer(folder):
    """A small tokenizer of SigLIP 2's kind, whose texts end in <eos>; returns it."""
    transformers, tokenizers = parity.library("transformers"), parity.library("tokenizers")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = [*special, "▁", *"abcdefghijklmnopqrstuvwxyz?.,", "th", "the", "▁c", "at"]
    merges = [("t", "h"), ("th", "e"), ("▁", "c"), ("a", "t")]
    made = transformers.Siglip2Tokenizer({word: i for i, word in enumerate(vocabulary)}, merges)
    end = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    made.backend_tokenizer.post_processor = end
    made.save_pretrained(folder)
    return made


def save_siglips_tokenizer(folder):
    """The same of SigLIP's kind, which drops punctuation and fills with its end; its SentencePiece model has more."""
    transformers, sentencepiece = parity.library("transformers"), parity.library("sentencepiece")
    with open(folder / "spiece.model", "wb") as file:
        ends = dict(pad_id=-1, bos_id=-1, eos_id=1, unk_id=2)
        options = dict(vocab_size=45, hard_vocab_limit=False, minloglevel=2) | ends
        lines = [line.lower() for line in WORDS]
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(20 * lines), model_writer=file, **options)
    made = transformers.SiglipTokenizer(str(folder / "spiece.model"))
    made.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")  # another's conversion
    return made


def vectors(ours, method, packed):
    """What `TwoTowers.encode_images` or `encode_texts` gives, numpy."""
    graph = contrastive.abstract(ours.cfg)[0]
    return np.asarray(jax.jit(lambda params, x: getattr(navit.merge(graph, params), method)(x))(ours.params, packed))


def encode_texts(ours, lines):
    """Vectors of texts, packed in rows of two, by the tokenizer and the text tower of `Weights`."""
    tower = ours.cfg.text
    tokenizer = text.filled(text.open_tokenizer(ours.tokenizer), tower.pad, tower.max_tokens)
    ids = [np.array(text.encode(tokenizer, line, tower.max_tokens, True)[0]) for line in lines]
    rows = pack([ids[i : i + 2] for i in range(0, len(ids), 2)], length=2 * tower.max_tokens + 3, slots=3)
    z_BME = vectors(ours, "encode_texts", rows)
    return ids, z_BME[:, :2].reshape(-1, z_BME.shape[-1])[: len(lines)]


@pytest.mark.parametrize("name", ["Siglip2Model", "SiglipModel"])
def test_two_towers_in_and_out(name, tmp_path):
    torch, model = parity.library("torch"), build(name)
    with torch.no_grad():
        model.logit_scale.fill_(4.7), model.logit_bias.fill_(-12.0)
    model.save_pretrained(tmp_path / "theirs")
    theirs = (save_tokenizer if "2" in name else save_siglips_tokenizer)(tmp_path / "theirs")
    ours, images = weights.read(tmp_path / "theirs"), some_images()
    assert ours.cfg.text.pad == (0 if "2" in name else 1)

    options = dict(padding="max_length", padding_side="right", max_length=16, truncation=True, return_tensors="pt")
    wanted = theirs(list(WORDS), **options)["input_ids"]
    ids, z_NE = encode_texts(ours, WORDS)
    np.testing.assert_array_equal(ids, wanted)
    siglip.write(ours, tmp_path / "ours")
    again = weights.read(tmp_path / "ours")
    same(again, ours)
    assert again.tokenizer == ours.tokenizer.replace("theirs", "ours")
    np.testing.assert_array_equal(encode_texts(again, WORDS)[0], ids)
    z_KE = vectors(ours, "encode_images", parity.packed(images, PATCH))[0]
    assert np.all(z_KE[len(images) :] == 0)
    z_KE, towers = z_KE[: len(images)], navit.merge(contrastive.abstract(ours.cfg)[0], ours.params)
    for out in (run(model, images, input_ids=wanted), run(load(tmp_path / "ours", name), images, input_ids=wanted)):
        parity.assert_close(list(z_KE), [x.image_embeds[0] for x in out])
        parity.assert_close(list(z_NE), list(out[0].text_embeds))
        logits = float(towers.scale()) * z_KE @ z_NE.T + float(towers.bias())
        np.testing.assert_allclose(logits, np.concatenate([x.logits_per_image for x in out]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "settings, config, pad",
    [
        (None, {}, 0),  # their config says 1, which is right for SigLIP alone
        (None, dict(model_type="siglip"), 1),
        (None, dict(pad_token_id=5), 5),
        (None, dict(pad_token_id=None), -1),
        (dict(pad_token="<mask>"), {}, 4),
        (dict(pad_token="<pad>"), dict(pad_token_id=5), 5),  # a name without a number
        (dict(pad_token=dict(content="<mask>"), added_tokens_decoder={"3": dict(content="<mask>")}), {}, 3),
    ],
)
def test_what_texts_are_filled_with(settings, config, pad, tmp_path):
    build("SiglipModel" if config.get("model_type") == "siglip" else "Siglip2Model").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["text_config"] |= {k: v for k, v in config.items() if k != "model_type"}
    path.write_text(json.dumps(saved))
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(added_tokens=[dict(id=4, content="<mask>")])))
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert weights.config_of(tmp_path).text.pad == pad


OURS = dict(width=64, depth=2, heads=4, mlp_dim=96, qk_norm=False)
TABLE = dict(posemb="table", posemb_grid=(6, 6), patch_size=PATCH)


def two_towers(**options):
    tower = text_tower.TextConfig(**OURS, vocab_size=60, max_tokens=16, **options.pop("text", {}))
    image = navit.NaViTConfig(**OURS, **TABLE, **options.pop("image", {}))
    options = dict(embed_dim=64, init_scale=10.0, max_scale=100.0, project_image=False) | options
    cfg = contrastive.TwoTowersConfig(image=image, text=tower, **options)
    return weights.Weights(cfg, random_params(contrastive.abstract(cfg)[1], 5))


def test_two_towers_of_ours(tmp_path):
    """Without biases, and without one of the logits."""
    torch, ours = parity.library("torch"), two_towers(text=dict(pad=2))
    siglip.write(ours, tmp_path)
    images = some_images()
    row, ids = parity.packed(images, PATCH), np.random.default_rng(1).integers(0, 60, (4, 16))
    out = run(load(tmp_path, "Siglip2Model"), images, input_ids=torch.from_numpy(ids))
    z_KE, z_ME = vectors(ours, "encode_images", row)[0], vectors(ours, "encode_texts", pack([ids], 70, 4))[0]
    parity.assert_close(list(z_KE[: len(images)]), [x.image_embeds[0] for x in out])
    parity.assert_close(list(z_ME), list(out[0].text_embeds))
    assert weights.read(tmp_path).cfg.text == dataclasses.replace(ours.cfg.text, bias=True)


def test_towers_without_a_counterpart_are_refused_by_their_fields(tmp_path):
    with pytest.raises(UserError, match="text.pool is 'mean'.*contrastive.project_image is True"):
        siglip.write(two_towers(project_image=True, text=dict(pool="mean")), tmp_path)
