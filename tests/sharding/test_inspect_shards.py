"""Inspecting: statistics, samples found by key, commands that fetch a frame, pages in a browser."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from object_stores import Store, forget_clients
from packed import rows_of
from PIL import Image
from places import ROOT

from sharding.build import build_corpus
from sharding.index import main as index_main
from sharding.inspect import main
from sharding.report.contact_sheet import short_names
from sharding.report.gallery import telling
from sharding.report.samples import pick
from sharding.report.statistics import Distribution, measure, spread, text_histogram
from sharding.shards.schema import Corpus, read_corpus
from sharding.verify import main as verify_main

MEASURED = """import sys; from sharding.inspect import main; code = main(sys.argv[1:])
sys.stderr.write(open("/proc/self/status").read()); sys.exit(code)"""  # so that the peak of memory is known


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json", "--log-every", "0"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_summary_and_the_first_sample_come_without_flags(clips: Path, capsys) -> None:
    assert main([str(clips)]) == 0
    out = capsys.readouterr().out
    assert "40 samples, 320 frames, 120 captions" in out
    first = rows_of(clips)[0]
    assert f"sample {first['key']} in" in out
    assert all(f"caption: {caption}" in out for caption in first["captions"])
    assert "8 frames, 4 a second, 2.00 s" in out


@pytest.mark.parametrize("name", ["images_train", "qa_train", "mc_test"])
def test_every_kind_of_sample_is_printed_in_full(shapes, capsys, name: str) -> None:
    row = rows_of(shapes.url(name))[3]
    assert main([shapes.url(name), "--sample", "3"]) == 0
    out = capsys.readouterr().out
    texts = [*row["captions"], *(question["question"] for question in row["questions"])]
    texts += [option for choice in row["choices"] for option in choice["options"]]
    texts += [answer for question in row["questions"] for answer in question["answers"]]
    assert texts
    assert all(text in out for text in [*texts, row["source"], row["key"], "48x48 pixels"])
    assert all(f"{offset:11d} {size:9d}" in out for offset, size in zip(row["offsets"], row["sizes"]))


@pytest.mark.parametrize("by", ["number", "key", "source"])
def test_a_sample_is_found_by_number_key_and_source(clips: Path, capsys, by: str) -> None:
    rows = rows_of(clips)
    for number in (0, 7, 39):
        name = str(number) if by == "number" else rows[number][by]
        found = inspected(capsys, str(clips), "--sample", name)["sample"]
        assert {key: found[key] for key in rows[number]} == rows[number]
    assert main([str(clips), "--sample", "40"]) == 2
    assert "has samples 0 to 39" in capsys.readouterr().err
    assert main([str(clips), "--sample", "no such key"]) == 2
    assert main([str(clips), "--sample", "0", "--frame", "8"]) == 2
    assert "has frames 0 to 7" in capsys.readouterr().err


def fetched(command: str, folder: Path) -> bytes:
    """What a printed command writes, run as a user would."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, cwd=folder, check=True, timeout=60, env=environment)
    (file,) = folder.iterdir()
    return file.read_bytes()


@pytest.mark.parametrize("name", ["plain", "with space's"])
def test_the_printed_command_fetches_the_frame_from_disk(clips: Path, tmp_path: Path, capsys, name: str) -> None:
    url = str(clips.rename(tmp_path / name))
    found = inspected(capsys, url, "--sample", "9", "--frame", "3")["sample"]
    assert found["command"].startswith("dd ")
    data = fetched(found["command"], tmp_path / "got")
    tar = (Path(url) / found["shard"]).read_bytes()
    assert data == tar[found["offsets"][3] : found["offsets"][3] + found["sizes"][3]]
    assert next((tmp_path / "got").iterdir()).name == f"{found['key']}.003.jpg"


@pytest.mark.parametrize("store", ["s3", "gcs", "http"], indirect=True)
def test_a_remote_corpus_is_inspected_like_a_local_one(clips: Path, store: Store, tmp_path: Path, capsys) -> None:
    url = store.fill(clips, "clips")
    local, remote = (inspected(capsys, place, "--sample", "9", "--stats") for place in (str(clips), url))
    assert remote["statistics"] == local["statistics"]
    assert remote["sample"]["offsets"] == local["sample"]["offsets"]
    assert remote["sample"]["command"].startswith("curl -sS -r " if url.startswith("http") else "python -c ")
    one, other = (fetched(found["sample"]["command"], tmp_path / kind) for kind, found in (("l", local), ("r", remote)))
    assert one == other
    assert main([url, "--sheet", str(tmp_path / "sheet.png"), "--html", str(tmp_path / "page.html")]) == 0
    assert "not readable" not in (tmp_path / "page.html").read_text()


def test_statistics_match_the_index(shapes, capsys) -> None:
    for name in ("images_train", "qa_train", "mc_test"):
        rows = rows_of(shapes.url(name))
        figures = inspected(capsys, shapes.url(name), "--stats")["statistics"]
        assert (figures["samples"], figures["samples_without_text"]) == (len(rows), 0)
        truth = {
            "captions per sample": [len(row["captions"]) for row in rows],
            "words per caption": [len(caption.split()) for row in rows for caption in row["captions"]],
            "words per question": [len(question["question"].split()) for row in rows for question in row["questions"]],
            "answers per question": [len(question["answers"]) for row in rows for question in row["questions"]],
            "options per choice": [len(choice["options"]) for row in rows for choice in row["choices"]],
            "width in pixels": [row["width"] for row in rows],
            "bytes per frame": [size for row in rows for size in row["sizes"]],
            "seconds per clip": [row["duration"] for row in rows if row["duration"]],
            "frames per clip": [len(row["sizes"]) for row in rows if row["duration"]],
        }
        for measure_name, values in truth.items():
            if not any(values):
                assert measure_name not in figures["distributions"]
                continue
            found = figures["distributions"][measure_name]
            assert (found["count"], found["min"], found["max"]) == (len(values), min(values), max(values))
            assert found["mean"] == pytest.approx(np.mean(values))
            assert found["p50"] == pytest.approx(np.quantile(values, 0.5, method="inverted_cdf"), rel=0.01)
            assert sum(each["count"] for each in found["histogram"]) == len(values)


def test_histograms_count_every_value() -> None:
    rng = np.random.default_rng(0)
    for values in (rng.lognormal(8, 2, 5000), rng.integers(0, 4, 900), np.full(7, 3.25), rng.normal(1e6, 1, 50)):
        distribution = Distribution("x")
        for part in np.array_split(values, 5):
            distribution.add(part.astype(float))
        bins = distribution.bins()
        assert sum(count for _, _, count in bins) == len(values)
        assert len(bins) <= 26
        beyond = [count for low, high, count in bins if np.isinf(high - low)]
        assert sum(beyond) <= 0.02 * len(values) + 1
        assert distribution.percentile(0.05) <= distribution.percentile(0.5) <= distribution.percentile(0.95)
        assert len(distribution.counts) < 8000
        lines = text_histogram(distribution, 80).splitlines()
        assert all(len(line) <= 80 for line in lines[1:])
    assert Counter({1.0: 2, 3.0: 1}) == counted([1, 1, 3])


def test_histogram_tails_are_labelled() -> None:
    distribution = Distribution("words")
    distribution.add(np.concatenate([np.arange(100.0).repeat(100), np.full(60, 5000.0), np.full(40, -7.0)]))
    lines = text_histogram(distribution).splitlines()
    assert lines[1].split()[:2] == ["<0", "40"]
    assert lines[-1].split()[:2] == ["≥100", "60"]
    assert json.loads(json.dumps(distribution.to_json()))["histogram"][-1] == {"from": 100, "to": 5000, "count": 60}


@pytest.mark.parametrize(("dark", "shown"), [(range(0, 1), 2), (range(0, 3), 3), (range(0, 4), 2), ((2, 3), 1)])
def test_a_clips_card_shows_a_frame_that_is_not_dark(dark, shown: int) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (32, 48, 3), np.uint8)
    black = [number in dark for number in range(4)]
    assert telling([Image.fromarray(noise * (not each)) for each in black]) == shown


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["photos/images/000123.jpg", "photos/images/000145.jpg"], ["…ges/000123.jpg", "…ges/000145.jpg"]),
        (["cat/a_long_name_of_a_frame.jpg", "dog/a_long_name_of_a_frame.jpg"], ["cat/a_long_nam…", "dog/a_long_nam…"]),
        (["a.jpg", "photos/images/000145.jpg"], ["a.jpg", "…ges/000145.jpg"]),
        (["x" * 30 + c + "y" * 30 for c in "12"], ["…" + c + "y" * 12 + "…" for c in "12"]),
        (
            [f"{a}-{'x' * 30}-{b}" for a, b in ("A1", "A2", "B1")],
            ["A-xxxxx…xxxxx-1", "A-xxxxx…xxxxx-2", "B-xxxxx…xxxxx-1"],
        ),
        (["photos/images/000123.jpg"] * 2, ["…ges/000123.jpg"] * 2),
        ([], []),
    ],
)
def test_contact_sheet_names_are_shortened_where_they_are_equal(names: list[str], expected: list[str]) -> None:
    assert short_names(names, lambda name: len(name) <= 15) == expected


def counted(values: list[float]) -> Counter[float]:
    distribution = Distribution("x")
    distribution.add(np.array([*values, np.nan], float))
    return distribution.counts


def test_samples_are_spread_over_the_corpus_and_broken_ones_are_marked(clips: Path, tmp_path: Path) -> None:
    known = read_corpus(str(clips))
    assert {sample.shard for sample in pick(known, 10, 16)} == set(range(len(known.shards)))
    assert len(pick(known, 1000, 16)) == 40
    assert len({sample.row["key"] for sample in pick(known, 20, shards=2)}) == 2 * known.shards[0].samples
    assert spread(10, 3) == [0, 4, 9]
    assert spread(0, 5) == []
    (clips / known.shards[0].name).unlink()
    tar = clips / known.shards[1].name
    tar.write_bytes(tar.read_bytes()[:2000])
    assert main([str(clips), "--sheet", str(tmp_path / "sheet.png"), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().count("not readable") > 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "0 must be at least 1"),
        (["--stats-shards", "-2", "--stats"], "-2 must be at least 1"),
        (["--sheet", "sheet.bmp"], "sheet.bmp must end in .png"),
    ],
)
def test_invalid_flags_are_errors(shapes, capsys, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([shapes.url("clips_train"), *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [main, verify_main, index_main])
def test_the_url_of_an_index_is_an_error_that_names_its_folder(shapes, capsys, command) -> None:
    with pytest.raises(SystemExit, match="2"):
        command([shapes.url("clips_train") + "/clips_train-000000.parquet"])
    assert f"give the folder that holds the shards, such as {shapes.url('clips_train')}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [main, verify_main, index_main])
def test_missing_credentials_and_buckets_are_one_line(s3: Store, monkeypatch, tmp_path: Path, capsys, command) -> None:
    assert command(["s3://no-such-bucket-here/corpus"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "no-such-bucket-here" in error
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    forget_clients()
    assert command([s3.url("corpus")]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("{"))
    assert line.startswith(f"error: cannot read {s3.url('corpus')}: no credentials")


def test_texts_are_escaped_in_html(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    evil = "<script>alert(1)</script>"
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.jpg", "caption": evil}, {"image": evil, "caption": "x"}]))
    output = str(tmp_path / "out")
    build_corpus([str(tmp_path / "a.json")], str(tmp_path), "image", output, size=32, max_failures=1)
    assert main([output, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "1 media failed" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "@import" not in page
    assert "url(" not in page


def test_failures_are_listed_by_kind_and_one_by_one(tmp_path: Path, capsys) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_text("<html>")
    records = [{"image": name, "caption": "x"} for name in ("a.jpg", "b.jpg", *(f"{n}.jpg" for n in range(150)))]
    (tmp_path / "a.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"sharding\.inspect .* --failures"):
        build_corpus([str(tmp_path / "a.json")], str(tmp_path), "image", str(tmp_path / "out"), size=32, max_failures=0)
    assert main([str(tmp_path / "out"), "--failures"]) == 0  # although there is no corpus.json
    out = capsys.readouterr().out
    assert "151 failures" in out
    assert "150 x file not found" in out
    assert "b.jpg: unreadable image" in out
    assert "and 51 more in failures.parquet" in out
    assert inspected(capsys, str(tmp_path / "out"), "--failures")["failures"]["kinds"]["file not found"] == 150
    assert main([str(tmp_path), "--failures"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["images_train", "clips_train", "qa_train", "mc_test"])
def test_a_browser_shows_the_gallery_without_errors(shapes, tmp_path: Path, visitor, name: str) -> None:
    page_file = tmp_path / "page.html"
    assert main([shapes.url(name), "--html", str(page_file), "--count", "12"]) == 0
    visitor.page.goto(page_file.as_uri())
    cards = 12
    assert visitor.pictures(".view img") == (cards, cards)
    assert visitor.sticks_out() <= 0
    page = visitor.page
    word = page.locator(".sample .text").first.inner_text().split()[1]
    page.fill("#search", word)
    shown = page.locator(".sample:visible").count()
    texts = page.locator(".sample").all_text_contents()
    assert shown == sum(word.lower() in text.lower() for text in texts) > 0
    page.fill("#search", "")
    page.locator("button.view").first.click()
    assert page.locator("dialog[open] img").evaluate("image => image.getBoundingClientRect().width") > 100
    page.locator("dialog").click()
    assert page.locator("dialog[open]").count() == 0
    page.locator(".about summary").first.click()
    assert "dd if=" in page.locator(".about pre").first.inner_text()
    assert visitor.sticks_out() <= 0
    assert not visitor.errors


def test_a_browser_shows_the_contact_sheet(shapes, tmp_path: Path, visitor) -> None:
    sheet = tmp_path / "sheet.png"
    assert main([shapes.url("clips_train"), "--sheet", str(sheet), "--count", "10"]) == 0
    visitor.page.goto(sheet.as_uri())
    size = visitor.page.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]")
    with Image.open(sheet) as image:
        assert list(image.size) == size
        assert len(set(image.resize((64, 64)).getdata())) > 50  # pictures, not an empty page
    assert not visitor.errors


@pytest.mark.parametrize("shards", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_shards(clips: Path, tmp_path: Path, shards: int) -> None:
    """One index, linked under thousands of names: more indices than fit, were they kept."""
    known = read_corpus(str(clips))
    first = known.shards[0]
    many = []
    for number in range(shards):
        name = f"many-{number:06d}"
        os.link(clips / first.index_name, tmp_path / f"{name}.parquet")
        os.link(clips / first.name, tmp_path / f"{name}.tar")
        many.append(replace(first, name=f"{name}.tar"))
    whole = Corpus(str(tmp_path), "many", "video", tuple(many), known.settings)
    (tmp_path / "corpus.json").write_text(whole.to_json())
    started = time.monotonic()
    words = [sys.executable, "-c", MEASURED, str(tmp_path), "--stats", "--json", "--log-every", "1"]
    words += ["--html", str(tmp_path / "page.html"), "--sheet", str(tmp_path / "sheet.png")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["statistics"]["samples"] == shards * first.samples
    assert f'"total": {shards}' in done.stderr
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stderr)[1]) < 300_000
    assert time.monotonic() - started < 0.03 * shards + 30
    figures = measure(whole, shards=10)
    assert figures.samples == 10 * first.samples
