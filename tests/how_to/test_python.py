"""docs/how-to/python.md, word for word; the embeddings are those of evaluation, and the hub gives the model back."""

import io
import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from blocks import blocks
from hub_server import hub_server
from PIL import Image

from eval.config import EvalConfig
from eval.features import encode_test_set, match_marked
from eval.tasks.qa import QATask
from loaders.config import LoaderConfig, PerMedia, VideoInput
from loaders.evaluation import QASet, RetrievalSet
from model import Singularity, SingularityQA
from model.checkpoints.loading import save_model
from model.export import main as export
from preprocessing.config import Preprocessing
from runtime.errors import MissingError, UserError
from runtime.ranks import ALONE
from tests.eval.small import small_model

LENGTH = {"image": 24, "video": 24}
CORPORA = [
    {"name": "images_train", "media_type": "image", "samples": 150, "captions": 450, "size": 48, "quality": 90},
    {"name": "clips_train", "media_type": "video", "samples": 40, "captions": 80, "size": 48, "fps": 4.0},
]
KNOWN = Preprocessing.of({"max_txt_l": LENGTH, "video_input": {"num_frames_test": 3}, "corpora": CORPORA})


GREY = np.full((40, 40, 3), 128, np.uint8)


def truncated():
    """An image that Pillow has opened, but cannot decode to its end."""
    file = io.BytesIO()
    Image.effect_noise((200, 200), 99).save(file, "JPEG")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


@pytest.fixture(scope="module")
def folder(shapes, tokenizer, tmp_path_factory) -> Path:
    """A user's folder: runs/small, a checkpoint of a run; qa, weights; photo.jpg."""
    folder = tmp_path_factory.mktemp("user")
    kinds = {"runs/small/checkpoints/step_00000005/weights": Singularity, "qa": SingularityQA}
    for name, kind in kinds.items():
        model = small_model(tokenizer, kind.__mro__[2])
        save_model(model, model.config, folder / name, preprocessing=KNOWN)
        tokenizer.save(folder / name)
    (folder / "runs/small/config.yaml").write_text("seed: 1\n")
    evaluation = folder / "runs/small/evaluation/final"
    evaluation.mkdir(parents=True)
    split = {"num_visuals": 24, "media_type": "image", "num_frames": 1}
    about = {"task": "retrieval", "settings": {"k_test": 9}, "splits": {"test": split}, "created": "2026"}
    (evaluation / "evaluation.json").write_text(json.dumps(about))
    (evaluation / "metrics.json").write_text(json.dumps({"test/": {"img_r1": 41.5}}))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)).save(folder / "photo.jpg")
    (folder / "demo").mkdir()
    (folder / "demo/pretrain").symlink_to(folder / "runs/small")
    (folder / "demo/shapes").symlink_to(shapes.folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return Singularity.from_pretrained(folder / "runs/small")


def corpus(shapes, model, name):
    video = VideoInput(num_frames_test=3)
    return RetrievalSet(shapes.url(name), LoaderConfig(image_res=32, max_txt_l=PerMedia(24, 24), video_input=video))


def test_page(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "search.py").write_text(blocks("python")["search.py"])
    found = runpy.run_path("search.py")
    assert found["images"].shape == (1, 16)
    assert found["texts"].shape == (2, 16)
    assert len([line for line in blocks("python")["search.py"].splitlines() if line]) == 7
    assert capsys.readouterr().out.count("tensor([[") == 2


@pytest.mark.parametrize("name", ["images_test", "clips_test_motion"])
def test_embeddings_and_logits_are_those_of_evaluation_to_the_bit(shapes, model, name):
    dataset = corpus(shapes, model, name)
    config = EvalConfig(batch_size_test=PerMedia(16, 16))
    with torch.inference_mode():
        visuals, texts = encode_test_set(model, dataset, model.tokenizer, dataset.texts, config, 3, ALONE)
        pairs = np.ones((dataset.num_visuals, len(dataset.texts)), dtype=bool)
        logits = match_marked(model, visuals, texts, pairs, config, 0.0)
    files = [shapes.folder / "media" / source for source in dataset.sources]
    encode = model.encode_images if dataset.media_type == "image" else model.encode_clips
    assert torch.equal(encode(files, batch_size=16), visuals.embeddings)
    assert torch.equal(model.encode_texts(dataset.texts), texts.embeddings)
    assert torch.equal(model.match(files, dataset.texts), torch.from_numpy(logits))
    records = [index.record(row) for index, row in dataset.rows()]
    stored = [dataset.thumbnail(number, len(record.sizes) or 1) for number, record in enumerate(records)]
    pictures = [[Image.open(io.BytesIO(jpeg)) for jpeg in jpegs] for jpegs in stored]
    arrays = [np.stack([np.asarray(each) for each in clip]) for clip in pictures]
    for given in (pictures, arrays):
        given = [clip[0] for clip in given] if dataset.media_type == "image" else given
        assert torch.equal(encode(given, batch_size=16), visuals.embeddings)
    dataset.close()


def test_answers_are_those_of_evaluation(shapes, folder):
    model = Singularity.from_pretrained(folder / "qa")
    assert type(model) is SingularityQA
    dataset = QASet(shapes.url("qa_test"), LoaderConfig(image_res=32))
    answers = json.loads((shapes.folder / "answer_list.json").read_text())
    result = QATask(answers).evaluate(model, dataset, model.tokenizer, EvalConfig(k_test=len(answers)), 3)
    asked = dataset.questions[:6]
    files = [shapes.folder / "media" / dataset.sources[item.visual] for item in asked]
    found = model.answer(files, [item.question for item in asked], answers)
    assert [answer for answer, _ in found] == result.predictions[:6]
    np.testing.assert_allclose([p for _, p in found], result.probabilities[:6, 0], rtol=1e-4)


def test_answers_are_compared_a_few_at_a_time(folder, monkeypatch):
    model = Singularity.from_pretrained(folder / "qa")
    compared, rank_answers = [], model.rank_answers
    monkeypatch.setattr(model, "rank_answers", lambda *given: (compared.append(given[4]), rank_answers(*given))[1])
    answers = [f"{first} {second}" for first in "abcdefghijklm" for second in "abcdefghijklm"]
    found = model.answer([GREY], ["what is this"], answers)
    assert model.answer([GREY], ["what is this"], answers, k_test=1)[0][1] == 1
    assert compared == [128, 1]
    assert 0 < found[0][1] < 1
    with pytest.raises(UserError, match="k_test is 0"):
        model.answer([GREY], ["what is this"], answers, k_test=0)


def test_match_cuts_texts_as_evaluation_of_its_medium_does(model):
    text, cut = "a small orange heart in the middle", "a small orange"  # [CLS] and three words
    lengths = replace(model.preprocessing, max_txt_l={"image": 4, "video": 20})
    model.preprocessing, known = lengths, model.preprocessing
    assert torch.equal(model.match([GREY], [text]), model.match([GREY], [cut]))
    assert not torch.equal(model.match([[GREY]], [text]), model.match([[GREY]], [cut]))
    model.preprocessing = known


@pytest.mark.parametrize(
    ("plugin", "where", "runs"), [("evil", "weights", 0), ("weights.evil", ".", 0), ("own", ".", 1)]
)
def test_foreign_plugins_are_not_imported(folder, tmp_path, monkeypatch, caplog, plugin, where, runs):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    shutil.copytree(folder / "qa", tmp_path / "weights")
    name_plugins(tmp_path / "weights", plugin)
    for path in ("weights/evil.py", "own.py"):
        (tmp_path / path).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path / where)
    model = Singularity.from_pretrained("." if where == "weights" else "weights")
    assert (tmp_path / "ran").exists() == runs
    assert model.config.plugins == [plugin] * runs
    assert (f"import {plugin} before" in caplog.text) != runs


def test_official_weights_import_no_plugins(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    shutil.copytree(folder / "qa", tmp_path / "weights")
    name_plugins(tmp_path / "weights", "evil_beside")
    monkeypatch.chdir(tmp_path)
    assert export(["weights", "x.pth"]) == 0
    (tmp_path / "evil_beside.py").write_text("raise AssertionError\n")
    assert Singularity.from_pretrained("x.pth").config.plugins == []


def name_plugins(weights, plugin):
    description = json.loads((weights / "model.json").read_text())
    description["config"]["plugins"] = [plugin]
    (weights / "model.json").write_text(json.dumps(description))


def test_hub_gives_the_model_back_to_the_bit(folder, model, tmp_path, monkeypatch):
    with hub_server() as (address, repositories):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        model.push_to_hub("me/shapes", token="hf_x")
        card = repositories["me/shapes"]["README.md"].decode()
        description = json.loads(repositories["me/shapes"]["model.json"])
        description["config"]["plugins"] = ["antigravity"]
        repositories["me/shapes"]["model.json"] = json.dumps(description).encode()
        found = Singularity.from_pretrained("me/shapes", cache_dir=tmp_path, token=False)
        assert "antigravity" not in sys.modules
        assert found.config.plugins == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert found.preprocessing == model.preprocessing
    assert torch.equal(found.encode_images([folder / "photo.jpg"]), model.encode_images([folder / "photo.jpg"]))
    for fact in ("# small", "| images_train | image | 150 | 450 |", "3 (middle)", "| test | 41.5 |", "k_test=9"):
        assert fact in card
    again = Singularity.from_pretrained("me/shapes", cache_dir=tmp_path, local_files_only=True)
    assert str(again.generate_model_card()) == card
    with pytest.raises(MissingError, match="no/such does not exist, and could not be fetched"):
        Singularity.from_pretrained("no/such", cache_dir=tmp_path, local_files_only=True)


def test_saved_folder_keeps_other_files(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.json", "vocab.txt", "README.md", "notes.txt"}
    assert torch.equal(Singularity.from_pretrained(tmp_path).encode_texts(["a"]), model.encode_texts(["a"]))


def test_order_batches_and_mode(folder, model):
    generator = np.random.default_rng(1)
    images = list(generator.integers(0, 255, (5, 40, 56, 3), np.uint8))
    model.train()
    whole, parts = model.encode_images(images), model.encode_images(images, batch_size=2)
    assert model.training
    model.eval()
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.encode_images(images[::-1]), whole.flip(0), rtol=1e-5, atol=1e-6)
    assert not whole.requires_grad
    assert [tuple(encode([]).shape) for encode in (model.encode_images, model.encode_clips)] == [(0, 16)] * 2
    assert model.match([], ["a"]).shape == (0, 1)
    assert model.match(images, []).shape == (5, 0)


def test_transparent_and_turned_pictures_are_shown_as_packing_stores_them(model, tmp_path):
    pixels = np.random.default_rng(2).integers(0, 255, (32, 48, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(pixels[..., :3]).rotate(0)
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    unpacked = replace(model.preprocessing, corpora=(replace(model.preprocessing.corpora[0], size=0),))
    model.preprocessing, known = unpacked, model.preprocessing
    for name in ("turned.png", "clear.png"):
        opened = model.encode_images([Image.open(tmp_path / name)])
        assert torch.equal(opened, model.encode_images([tmp_path / name]))
    model.preprocessing = known


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode_images(["x.jpg"]), r"images\[0\] does not exist: x.jpg"),
        (lambda model: model.encode_images("x.jpg"), "images is of type str: give a list"),
        (lambda model: model.encode_images([np.zeros((3, 4))]), r"images\[0\] is an array \(3, 4\) of float64"),
        (lambda model: model.encode_images([None]), r"images\[0\] is of type NoneType"),
        (lambda model: model.encode_images([__file__]), r"images\[0\] cannot be decoded: unreadable image"),
        (lambda model: model.encode_clips([__file__]), r"clips\[0\] cannot be decoded: unreadable video"),
        (lambda model: model.encode_clips([[]]), r"clips\[0\] has no frames"),
        (lambda model: model.encode_clips([np.zeros((8, 8, 3), np.uint8)]), r"clips\[0\] is an array of shape"),
        (lambda model: model.encode_texts(["a", 3]), r"texts\[1\] is of type int"),
        (lambda model: model.encode_texts("a"), "texts is of type str: give a list"),
        (lambda model: model.encode_texts(["a", "\ud800"]), r"texts\[1\] is not Unicode"),
        (
            lambda model: model.encode_texts(["a"], batch_size=0),
            "batch_size is 0: must be a whole number of at least 1",
        ),
        (lambda model: model.encode_images([GREY], batch_size=-1), "batch_size is -1"),
        (lambda model: model.match([GREY], ["a"], batch_size=-1), "batch_size is -1"),
        (lambda model: model.encode_clips([[GREY]], num_frames=2.5), "num_frames is 2.5: must be a whole number"),
        (lambda model: model.encode_images([GREY, truncated()]), r"images\[1\] cannot be decoded: .*truncated"),
        (
            lambda model: model.match([np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)], ["a"]),
            r"visuals\[0\] is an image, visuals\[1\] a clip",
        ),
    ],
)
def test_bad_inputs_are_named(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_without_a_vocabulary_images_can_be_encoded(folder, model, shapes, tmp_path):
    save_model(model, model.config, tmp_path)
    found = Singularity.from_pretrained(tmp_path)
    assert found.encode_images([folder / "photo.jpg"]).shape == (1, 16)
    with pytest.raises(UserError, match="the model has no vocabulary"):
        found.encode_texts(["a"])
    found = Singularity.from_pretrained(tmp_path, tokenizer=str(shapes.vocab))
    assert torch.equal(found.encode_texts(["a"]), model.encode_texts(["a"]))
