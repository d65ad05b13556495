"""Searching packed clips by text: the right order, features kept, a contact sheet, and a page in a real browser."""

import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import ImageDraw

from eval.config import EvalConfig
from eval.search import visual_search
from eval.search.__main__ import main
from eval.search.server import SearchServer
from eval.search.visual_search import VisualSearch, search_sheet
from eval.tasks.retrieval import RetrievalTask
from loaders.config import LoaderConfig, PerMedia
from loaders.evaluation import RetrievalSet
from model.checkpoints.loading import save_model
from model.config import LossWeights
from model.history import History
from model.singularity import Singularity
from model.vqa import SingularityQA
from tests.eval.small import small_model


def weights_in(folder, tokenizer, kind=Singularity):
    """Random weights that tell every pair apart, with their vocabulary."""
    model = small_model(tokenizer, kind, loss_weight=LossWeights(mlm=0.0))
    save_model(model, model.config, folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def weights(tokenizer, tmp_path_factory):
    return weights_in(tmp_path_factory.mktemp("weights"), tokenizer)


@pytest.fixture(scope="module")
def search(shapes, weights, tmp_path_factory):
    return VisualSearch(weights, shapes.url("clips_test_motion"), tmp_path_factory.mktemp("cache"), num_frames=3)


def test_hits_are_those_of_the_evaluation(shapes, search, tokenizer):
    dataset = RetrievalSet(shapes.url("clips_test_motion"), LoaderConfig(image_res=32, max_txt_l=PerMedia(40, 40)))
    result = RetrievalTask().evaluate(search.model, dataset, tokenizer, EvalConfig(k_test=10), 3)
    for number in (0, 7, 20):
        hits = search.find(dataset.texts[number].upper() + "!", count=6, candidates=10)
        row = result.scores.text_to_visual[number]
        expected = np.argsort(-row, kind="stable")[:6]
        assert [hit.visual for hit in hits] == expected.tolist()
        np.testing.assert_allclose([hit.match for hit in hits], row[expected], rtol=1e-4, atol=1e-4)
        fast = search.find(dataset.texts[number], count=6, candidates=0)
        similarity = result.scores.similarity[:, number]
        assert [hit.visual for hit in fast] == np.argsort(-similarity, kind="stable")[:6].tolist()
    dataset.close()


def test_weights_whose_validation_found_reranking_no_better_are_searched_without_it(search, monkeypatch):
    assert search.find("a red circle", count=3)[0].match is not None
    monkeypatch.setattr(search.model, "history", History(reranks=False))
    assert [hit.match for hit in search.find("a red circle", count=3)] == [None] * 3
    assert search.find("a red circle", count=3, candidates=4)[0].match is not None


def test_a_checkpoint_of_the_joint_score_is_searched_by_it(search, monkeypatch):
    by_similarity = search.find("a red circle", count=6, candidates=0)
    monkeypatch.setattr(search.model, "history", History(rerank_score="itm+itc"))
    for parameter in search.model.itm_head.parameters():  # a head that has learned nothing
        monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))
    hits = search.find("a red circle", count=6, candidates=1000)
    assert [hit.visual for hit in hits] == [hit.visual for hit in by_similarity]
    assert [hit.match for hit in hits] == pytest.approx([hit.similarity for hit in by_similarity])


def test_the_contact_sheet_shows_every_hit_and_the_score_that_orders_it(search, monkeypatch):
    shown = []
    text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda pen, at, what, *more, **how: shown.append(what) or text(pen, at, what, *more, **how),
    )
    for candidates, order in ((12, "by match score"), (0, "by similarity")):
        hits = search.find("a red circle", count=7, candidates=candidates)
        scores = [hit.similarity if candidates == 0 else hit.match for hit in hits]
        assert scores == sorted(scores, reverse=True)
        shown.clear()
        pixels = np.asarray(search_sheet(search, "a red circle", hits).convert("L"), dtype=np.int64)
        assert order in shown
        labels = [label for label in shown if label[0].isdigit()]
        assert labels == [f"{rank}  {score:.3f}" for rank, score in enumerate(scores, start=1)]
        assert pixels.shape[1] == 3 * (4 * 96 + 6 + 8) + 8
        assert (pixels < 230).sum() > 7 * 4 * 50 * 50  # clips on grey or black


def test_command_line_searches_and_keeps_what_it_encoded(shapes, weights, tmp_path, capsys, monkeypatch):
    where = ("--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "hits.jpg"), "--top", "3")
    command = [weights, shapes.url("images_test"), "a small red star", *where]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert re.search(r"^ +1 +-?\d+\.\d+ +-?\d\.\d+  \S+\.jpg$", first, re.MULTILINE)
    assert (tmp_path / "hits.jpg").stat().st_size > 1000
    (entry,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(visual_search.VisualSet, "batches", None)  # nothing is decoded a second time
    assert main(command) == 0
    assert capsys.readouterr().out == first
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_mistakes_are_one_clear_line(shapes, weights, tokenizer, tmp_path, capsys):
    corpus = shapes.url("images_test")
    answering = weights_in(tmp_path / "qa", tokenizer, SingularityQA)
    for command, message in (
        ([weights, corpus], "give a QUERY, or --serve"),
        ([weights, corpus, " ?! "], "has no words"),
        ([weights, str(tmp_path), "star"], "is not a packed corpus"),
        ([str(tmp_path / "none"), corpus, "star"], "does not exist"),
        ([answering, corpus, "star"], "without retrieval heads"),
        ([weights, corpus, "star", "--top", "0"], "--top and --frames must be at least 1"),
    ):
        assert main([*command, "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "x.jpg")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


@pytest.fixture
def address(search):
    server = SearchServer("127.0.0.1", 0, 8, 12)
    server.search = search
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_types_submits_and_sees_hits(address, visitor, search, tmp_path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(address + "/../etc/passwd")
    page = visitor.page
    page.goto(address)
    assert page.inner_text("h1") == "clips_test_motion"
    page.type("input[name=q]", "a red circle moves left")
    page.keyboard.press("Enter")
    page.wait_for_selector("figure")
    assert visitor.pictures() == (8, 8)
    assert page.input_value("input[name=q]") == "a red circle moves left"
    names = page.eval_on_selector_all("figure", "all => all.map((figure) => figure.title)")
    assert names == [hit.source for hit in search.find("a red circle moves left", 8, 12)]
    page.fill("input[name=q]", "'><script>alert(1)</script>")
    page.click("button")
    page.wait_for_function("document.title.includes('script')", timeout=30_000)
    assert visitor.pictures() == (8, 8)
    page.fill("input[name=q]", "???")
    page.click("button")
    page.wait_for_selector(".warning")
    assert "has no words" in page.inner_text(".warning")
    assert visitor.errors == []
    assert visitor.sticks_out() <= 0


def test_the_page_is_served_until_it_is_stopped(shapes, weights, tmp_path):
    command = [sys.executable, "-m", "eval.search", weights, shapes.url("images_test"), "--serve", "--port", "0"]
    with subprocess.Popen([*command, "--cache", str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://\S+", process.stdout.readline()).group()
            with urllib.request.urlopen(address + "?q=a+star", timeout=30) as answer:
                assert answer.read().count(b"<figure") == 12
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (["--port", "99999"], "port must be 0-65535"),
        (["--host", "192.0.2.1"], "Cannot assign"),
        (["--port", "USED"], "Address already in use"),
    ],
)
def test_an_unusable_address_is_reported_before_anything_is_encoded(weights, tmp_path, capsys, where, reason):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        words = [word.replace("USED", str(listener.getsockname()[1])) for word in where]
        assert main([weights, str(tmp_path), "--serve", "--cache", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot listen on --host")
    assert error.count("\n") == 1
    assert reason in error


@pytest.mark.parametrize("home", ["/proc/nowhere", "~"])  # the latter: of a user that the system does not know
def test_without_a_home_a_search_goes_on_and_says_how_to_keep_what_it_encodes(
    shapes, weights, tmp_path, capfd, monkeypatch, caplog, home
):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    command = [weights, shapes.url("images_test"), "a star", "--output", str(tmp_path / "hits.jpg")]
    assert main(command) == 0
    assert "cannot be written" in caplog.text
    assert "set --cache FOLDER" in caplog.text
    assert main([*command, "--cache", "/proc/nowhere"]) == 2
    error = capfd.readouterr().err
    assert error.splitlines()[-1].startswith("error: --cache /proc/nowhere cannot be written")
