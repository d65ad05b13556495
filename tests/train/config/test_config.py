"""What a run's YAML may hold, and the messages for mistakes in it."""

import pytest

from runtime.errors import UserError
from runtime.settings import declarations, flatten
from train.config.settings import RunConfig, load_settings, to_yaml


@pytest.fixture
def load(tmp_path):
    def read(text="", *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return load_settings(path, overrides)

    return read


def test_later_ones_win_and_what_was_set_is_known(load, tmp_path):
    (tmp_path / "base.yaml").write_text("optimizer: {lr: 1.0, weight_decay: 0.5}\nseed: 1")
    settings = load("base: base.yaml\noptimizer: {lr: 2.0}\nseed: 2", "seed=3", "splits=[]")
    assert (settings.config.optimizer.lr, settings.config.optimizer.weight_decay, settings.config.seed) == (2.0, 0.5, 3)
    assert settings.explicit == {"optimizer.lr", "optimizer.weight_decay", "seed", "splits"}


def test_references_and_environment(load, monkeypatch):
    monkeypatch.setenv("SOME_WHERE", "/data")
    config = load("data_root: ${oc.env:SOME_WHERE}/x\navailable_corpus: {a: '${data_root}/a'}", "train_corpus=a").config
    assert config.train_urls() == ["/data/x/a"]


def test_corpora_by_name_list_and_url(load):
    text = "available_corpus: {a: /d/a, b: s3://d/b, both: [a, b], all: [both, /d/c]}"
    assert load(text, "train_corpus=all").config.train_urls() == ["/d/a", "s3://d/b", "/d/c"]
    assert load(text, "train_corpus=[b,/x]").config.train_urls() == ["s3://d/b", "/x"]


def test_the_resolved_configuration_reads_back(load, tmp_path):
    config = load("optimizer: {lr: 1e-5}\ntest_corpus: {t: /d/t}", "wandb.entity=None").config
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    again = load_settings(tmp_path / "resolved.yaml")
    assert again.config == config
    assert {key for key in flatten(config) if not key.startswith(("test_corpus.",))} <= set(declarations(RunConfig))


WRONG = {
    "optimzer: {lr: 1}": "unknown key 'optimzer': nearest are optimizer",
    "optimizer: {lrate: 1}": "unknown key 'optimizer.lrate': nearest are optimizer.lr",
    "lr: 1": "unknown key 'lr': nearest is optimizer.lr",
    "vit_type: beit": "unknown key 'vit_type': here it is vision_encoder.type",
    "text_encoder: bert-base-uncased": "text_encoder is 'bert-base-uncased', but it is a section: set",
    "batch_size: {image: many}": r"batch_size.image is 'many' \(str\), must be a whole number",
    "batch_size: {image: 1.5}": r"batch_size.image is 1.5 \(float\), must be a whole number",
    "augment: 3": r"augment is 3 \(int\), must be true or false",
    "seed: true": r"seed is True \(bool\), must be a whole number",
    "image_res: null": "image_res is null, must be a whole number",
    "splits: val": r"splits is 'val' \(str\), must be a list, each item a text",
    "plugins: 5": r"plugins is 5 \(int\), must be a list",
    "plugins: [5]": "plugins names '5': write the name of a module",
    "plugins: my_losses": r"plugins is 'my_losses' \(str\), must be a list",
    "video_input: {sample_type: rnd}": "sample_type .*is 'rnd', must be one of rand",
    "video_input: {sample_type_test: middel}": "sample_type_test is 'middel', must be one of middle",
    "augmentations: [nothing]": "augmentations is 'nothing', must be one of ",
    "precision: int8": "precision is 'int8': must be one of bf16, fp16, fp32",
    "eval_frame_ensemble: median": "eval_frame_ensemble is 'median': must be one of concat",
    "label: ''": "label is '', must be the name of a folder within OUTPUT_DIR/evaluation",
    "label: ..": "label is '..', must be the name of a folder",
    "label: first/second": "label is 'first/second', must be the name of a folder",
    "test_corpus: {a/b: /d/b}": "test_corpus has a split 'a/b': must be a name that a file can have, without /",
    "test_corpus: {..: /d/b}": "test_corpus has a split '..': must be a name that a file can have",
    "test_corpus: {val: /d/a, val_emb: /d/b}": "has splits 'val' and 'val_emb', .*: give one of them another name",
    "splits: [val]": "splits names 'val', test_corpus has none",
    "stop_key: val": "stop_key is 'val', test_corpus has none",
    "data_root: ${oc.env:NOT_SET}": "data_root: the environment variable NOT_SET is not set",
    "seed: [1": "not valid YAML: line 2: did not find expected",
    "base: nowhere.yaml": "nowhere.yaml, the base of .*run.yaml, does not exist",
    "base: run.yaml": "is its own base",
    "scheduler: {epochs: 0}": "scheduler.epochs is 0: must be at least 1",
}


@pytest.mark.parametrize("text", WRONG)
def test_mistakes_are_named(load, text):
    with pytest.raises((ValueError, FileNotFoundError), match=WRONG[text]) as caught:
        load(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["seed", "--seed=1", "=1"])
def test_a_setting_needs_its_form(load, override):
    with pytest.raises(ValueError, match="write key=value"):
        load("", override)


@pytest.mark.parametrize(("name", "near"), [("coc", "coco"), ("webvi", "webvid")])
def test_an_unknown_corpus_is_named_with_the_nearest(load, name, near):
    config = load("available_corpus: {coco: /d/coco, webvid: /d/webvid}", f"train_corpus={name}").config
    with pytest.raises(ValueError, match=f"train_corpus names '{name}'.*nearest: {near}"):
        config.train_urls()


def test_a_file_that_is_missing_or_not_in_utf8_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        load_settings("nowhere.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"# caf\xe9\nseed: 1\n")
    with pytest.raises(UserError, match=r"latin\.yaml is not in UTF-8"):
        load_settings(str(path))


RECIPE = "test_corpus: {val: /d/val, test: /d/test}\ncorpus_weights: {a: 1.0}\navailable_corpus: {a: /d/a}\n"


@pytest.mark.parametrize(
    ("settings", "splits"),
    [
        (["test_corpus={mine: /d/x}"], {"mine": "/d/x"}),
        (["test_corpus.mine=/d/x"], {"val": "/d/val", "test": "/d/test", "mine": "/d/x"}),
        (["test_corpus.val=/d/x"], {"val": "/d/x", "test": "/d/test"}),
        (["test_corpus={mine: /d/x}", "test_corpus.more=/d/y"], {"mine": "/d/x", "more": "/d/y"}),
        (["test_corpus.more=/d/y", "test_corpus={mine: /d/x}"], {"mine": "/d/x"}),
        (["test_corpus.val=null"], {"test": "/d/test"}),
        (["test_corpus=/d/photos_test"], {"photos_test": "/d/photos_test"}),
        (["test_corpus=s3://b/photos/", "test_corpus.b=/d/b"], {"photos": "s3://b/photos/", "b": "/d/b"}),
        (["test_corpus=[/d/x,/d/y]"], {"x": "/d/x", "y": "/d/y"}),
        (["test_corpus=a"], {"a": "/d/a"}),
        (["test_corpus=/d/x-{000..009}.tar"], {"x": "/d/x-{000..009}.tar"}),
        (["test_corpus=${data_root}/photos", "data_root=/e"], {"photos": "/e/photos"}),
    ],
)
def test_a_mapping_on_the_command_line_replaces_and_a_name_adds(load, settings, splits):
    assert load(RECIPE, *settings).config.test_urls() == splits


@pytest.mark.parametrize("setting", ["scheduler={image_res: {}}", "scheduler.image_res={}", "scheduler.image_res=null"])
def test_a_mapping_within_a_section_replaces_too(load, setting):
    schedule = load("scheduler: {image_res: {48: 2}, epochs: 9}", setting).config.scheduler
    assert (schedule.image_res, schedule.epochs) == ({}, 9)


def test_only_corpora_to_choose_from_are_added_to(load, tmp_path):
    settings = ("corpus_weights={b: 2.0}", "storage={anon: 'true'}", "available_corpus={b: /d/b}", "train_corpus=[a,b]")
    config = load(RECIPE + "storage: {endpoint: x}", *settings).config
    assert (config.corpus_weights, config.storage) == ({"b": 2.0}, {"anon": "true"})
    assert config.train_urls() == ["/d/a", "/d/b"]
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = load("base: recipe.yaml\ntest_corpus: data/mine\navailable_corpus: {b: /d/b}").config
    assert (config.test_corpus, list(config.available_corpus)) == ({"mine": "data/mine"}, ["a", "b"])
    assert config.corpus_weights == {"a": 1.0}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("test_corpus=[/d/x,/e/x]", r"test_corpus: x names two splits: name each, 'test_corpus={NAME: URL, OTHER"),
        ("test_corpus=/", "test_corpus: / does not name the split"),
        ("test_corpus=${data_root}", r"does not name the split"),
        ("test_corpus=3", r"test_corpus is 3 \(int\), must be `name: value` lines"),
        ("splits=[x]", r"test_corpus has val, test: name some of these, or splits=\[\] for all"),
        ("stop_key=x", "test_corpus has val, test: name one of these, or stop_key=null"),
        ("seed=", "seed is null, must be a whole number"),
        ("tokeniser=null", "unknown key 'tokeniser'"),
    ],
)
def test_test_corpora_without_a_name_are_reported(load, setting, message):
    with pytest.raises(ValueError, match=message):
        load(RECIPE, setting)


@pytest.mark.parametrize("nothing", ["null", "None"])
def test_null_takes_back_what_a_recipe_sets(load, nothing):
    recipe = "tokenizer: /d/vocab.txt\noptimizer: {lr: 1.0, weight_decay: 0.5}\nstop_key: t\ntest_corpus: {t: /d/t}"
    keys = ("tokenizer", "optimizer.lr", "stop_key", "text_encoder.width", "vision_encoder")
    settings = load(recipe, *(f"{key}={nothing}" for key in keys))
    default = load("").config
    assert (settings.config.tokenizer, settings.config.optimizer.lr) == (default.tokenizer, default.optimizer.lr)
    assert settings.config.stop_key is None
    assert settings.explicit == {"optimizer.weight_decay", "stop_key", "test_corpus"}
