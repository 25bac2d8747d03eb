"""Every recipe plans its rows and builds its model on every kind of data it takes; settings out of range are named."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import configs
from configs import base
from input_pipeline import checks, stream
from input_pipeline.errors import UserError
from navit_jax import console, objectives, optim

OTHERS = ("__init__", "base", "recipes", "finetune")  # test_finetune.py has the last one
RECIPES = sorted(p.stem for p in Path(configs.__file__).parent.glob("*.py") if p.stem not in OTHERS)
OF_CLASSES = [name for name in RECIPES if "clip" not in name]


def get(name, arg):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def dry(config):
    checks.check(config)
    images = stream.open_images(config, "train")
    held_out = stream.match_classes(images, stream.open_images(config, "eval"))
    rows = stream.train_stream(config, images)
    total = stream.total_steps(config, rows)
    console.fit_schedule(config.optim, total)
    objective = objectives.make(config, images.classes, images.tokenizer and images.tokenizer.vocab_size)
    optim.make_optimizer(config.optim, objective.shapes, total)
    stream.eval_loaders(config, [(held_out, budget, None) for budget in config.eval.token_budgets])
    return rows.report


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("arg", ["", "shapes"])
def test_embedded_sets(name, arg):
    assert dry(get(name, arg)).fill > 0.95


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for i in range(40):
        place = root / f"class{i % 2}"
        place.mkdir(exist_ok=True)
        h, w = rng.integers(20, 200, 2)
        Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(place / f"{i}.png")
    Image.new("RGB", (2000, 30)).save(root / "class0" / "banner.png")
    return root


@pytest.mark.parametrize("name", OF_CLASSES)
def test_a_small_folder(name, folder):
    dry(get(name, f"folder={folder}"))


@pytest.mark.parametrize("name", sorted(set(RECIPES) - set(OF_CLASSES)))
def test_a_small_folder_with_captions(name, folder, tmp_path):
    with pytest.raises(UserError, match="text"):
        dry(get(name, f"folder={folder}"))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    lines = [f"{p.relative_to(tmp_path)},picture {p.stem} of {p.parent.name}" for p in tmp_path.rglob("*.png")]
    (tmp_path / "captions.csv").write_text("\n".join(["file_name,text", *lines]))
    dry(get(name, f"folder={tmp_path}"))


@pytest.mark.parametrize("name", OF_CLASSES)
def test_the_imagenet_recipe_on_stand_in_sizes(name):
    config = get(name, "imagenet2012")
    assert config.data.source == "tfds=imagenet2012"
    sizes = np.load(Path(__file__).parent / "data" / "sizes_100k.npz")["sizes"].astype(int)[:20_000]
    source = type("Source", (), {"class_names": ("a", "b")})()
    rows = stream.train_stream(config, stream.Images(source, sizes, 2))
    assert rows.report.fill > 0.995 and stream.total_steps(config, rows) > 1000


def test_every_wrong_field_is_named_at_once():
    config = base.get_config()
    config.data.decode, config.data.bits, config.drop.rate = "slow", 12, 1.5
    config.optim.accumulate_steps = 3
    config.eval.token_budgets = ()
    with pytest.raises(UserError) as error:
        checks.check(config)
    for words in (
        "data.decode is 'slow'; expected fast or full",
        "data.bits is 12",
        "drop.rate",
        "accumulate_steps",
        "token_budgets",
    ):
        assert words in str(error.value)


def contrastive():
    config = base.get_config()
    config.objective = "contrastive"
    return config


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("optim.accumulate_steps", 2, r"only their own negatives.*cache_parts=2"),
        ("text.pool", "first", "text.pool is 'first'; expected last, map or mean"),
        ("contrastive.embed_dim", 0, "contrastive.embed_dim is 0; expected 1 or more"),
        ("contrastive.init_scale", 101.0, "contrastive.init_scale is 101.0; expected above 0, to .*max_scale=100"),
        ("contrastive.init_scale", 0.0, "contrastive.init_scale is 0.0"),
        ("contrastive.max_scale", 9.0, "contrastive.init_scale is 10.0; .*max_scale=9"),
        ("loss.label_smoothing", 0.1, "loss.label_smoothing is 0.1; expected 0"),
        ("eval.prompts", "/no/such/file.txt", "eval.prompts is '/no/such/file.txt'; expected a file that exists"),
        ("data.source", "tfds=imagenet2012", "has labels and no texts"),
        ("best_metric", "eval/top1@256", "a score of this run, contrastive, such as retrieval/t2i_r1@256"),
    ],
)
def test_what_a_contrastive_run_cannot_do_is_refused_before_anything_is_read(name, value, message):
    config = contrastive()
    checks.check(config)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=message):
        checks.check(config)
    config.objective = "supervised"
    if not name.startswith(("text.", "contrastive.")):
        checks.check(config)


def test_best_metrics_are_those_of_the_objective(tmp_path):
    (tmp_path / "prompts.txt").write_text("a {}")
    ours = {
        "supervised": ["eval/top1@64", "eval/top5@256"],
        "contrastive": ["retrieval/i2t_r5@128", "retrieval/t2i_r10@64", "zeroshot/top5@256"],
    }
    config = base.get_config()
    config.eval.update(prompts=str(tmp_path / "prompts.txt"), fewshot_shots=(10,))
    for config.objective in ours:
        for objective, names in ours.items():
            for config.best_metric in [*names, "fewshot/top1@10shot"]:
                if objective == config.objective or "fewshot" in config.best_metric:
                    checks.check(config)
                    continue
                with pytest.raises(UserError, match=f"best_metric is .*{config.objective}, such as"):
                    checks.check(config)
        unknown = ("eval/top1@9", "eval/map@256", "retrieval/t2i_r2@64", "zeroshot/top1", "fewshot/top1@5shot")
        for config.best_metric in unknown:
            with pytest.raises(UserError, match="best_metric is"):
                checks.check(config)


def test_counted_classes_may_end_earlier_in_the_held_out_set():
    def images(*names):
        return stream.Images(type("Source", (), {"class_names": names})(), np.ones((1, 2)), len(names))

    assert stream.match_classes(images("0", "1", "2"), images("0", "1")).classes == 3
    for ours, theirs in ((("0", "1"), ("0", "1", "2")), (("cat", "dog"), ("cat",)), ((), ())):
        with pytest.raises(UserError, match="class"):
            stream.match_classes(images(*ours), images(*theirs))


def test_a_rising_drop_schedule_gets_slots_for_its_end():
    config = base.get_config()
    config.drop.update(kind="scheduled", min_rate=0.2, end_rate=0.8, midpoint_examples=1e6, tau_examples=2e5)
    sizes = np.load(Path(__file__).parent / "data" / "sizes_100k.npz")["sizes"].astype(int)
    source = type("Source", (), {"class_names": ("a",)})()
    config.model.posemb_beyond = "interpolate"
    rising = stream.train_stream(config, stream.Images(source, sizes, 1)).plan["slots"]
    config.drop.update(kind="constant", rate=0.8)
    falling = stream.train_stream(config, stream.Images(source, sizes, 1)).report
    assert rising >= 1.5 * falling.images / falling.rows
