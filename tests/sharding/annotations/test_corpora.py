"""Every YAML of configs/corpora reads files in the layout that its data set is distributed in, and packs them."""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from places import ROOT

from sharding.annotations.config import load_corpus
from sharding.annotations.items import Row
from sharding.annotations.reading import read_rows
from sharding.build import main
from sharding.shards.schema import read_corpus, read_index

CORPORA = ROOT / "configs" / "corpora"
NAMES = sorted(path.stem for path in CORPORA.glob("*.yaml"))

Files = dict[str, Any]  # name -> text or bytes, or what is to be written as JSON


def url(root: Path, name: str) -> str:
    """The address of a media file; a local one, so that no server is needed."""
    return f"file://{root}/media/{name}"


def coco(root: Path) -> Files:
    images = [{"file_name": f"{number:012d}.jpg", "height": 48, "width": 64, "id": number} for number in (9, 25)]
    texts = [(25, "A giraffe."), (9, "A plate of food."), (25, "Two giraffes.\n")]
    annotations = [{"image_id": image, "id": number, "caption": text} for number, (image, text) in enumerate(texts)]
    return {"captions_train2017.json": {"info": {"year": 2017}, "images": images, "annotations": annotations}}


def karpathy(folder: str, dataset: str) -> Callable[[Path], Files]:
    def files(root: Path) -> Files:
        images = []
        for number, split in enumerate(("train", "restval", "test")):
            sentences = [{"tokens": ["x"], "raw": f"{split} {each}", "imgid": number} for each in (0, 1)]
            image = {"filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": sentences}
            images.append({**image, **({"filepath": folder, "cocoid": number} if folder else {})})
        return {f"dataset_{dataset}.json": {"images": images, "dataset": dataset}}

    return files


def visual_genome(name: str, key: str, parts: list[dict]) -> Callable[[Path], Files]:
    def files(root: Path) -> Files:
        pages = "https://cs.stanford.edu/people/rak248"
        image_data = [
            {"width": 64, "url": f"{pages}/VG_100K_2/1.jpg", "height": 48, "image_id": 1, "coco_id": None},
            {"width": 64, "url": f"{pages}/VG_100K/2.jpg", "height": 48, "image_id": 2, "coco_id": None},
        ]
        records = [{"id": number, key: [{**part, "image_id": number} for part in parts]} for number in (1, 2)]
        return {f"{name}.json": records, "image_data.json": image_data}

    return files


def msrvtt(split: str) -> Callable[[Path], Files]:
    def files(root: Path) -> Files:
        videos = [{"video_id": f"video{number}", "split": "train", "id": number, "url": "u"} for number in range(3)]
        sentences = [{"video_id": f"video{n % 3}", "sen_id": n, "caption": f"sentence {n}"} for n in range(6)]
        data = {"info": {}, "videos": videos, "sentences": sentences}
        return {"MSRVTT_data.json": data, f"MSRVTT_train.{split}.csv": "video_id\nvideo0\nvideo2\n"}

    return files


def vqa(split: str, answered: bool) -> Callable[[Path], Files]:
    def files(root: Path) -> Files:
        texts = {
            458752000: "What is this photo taken looking through?",
            458752001: "What position is this man playing?",
        }
        questions = [{"image_id": 458752, "question": text, "question_id": number} for number, text in texts.items()]
        head = {"info": {"version": "2.0"}, "license": {"name": "CC"}, "data_type": "mscoco", "data_subtype": split}
        answers = [{"answer": text, "answer_confidence": "yes"} for text in ["net"] * 8 + ["mesh"] * 2]
        about = {"image_id": 458752, "question_type": "what is this", "answer_type": "other", "answers": answers}
        annotations = [{**about, "question_id": number} for number in reversed(texts)]
        asked = {**head, "task_type": "Open-Ended", "questions": questions}
        result: Files = {f"v2_OpenEnded_mscoco_{split}_questions.json": asked}
        return result | (
            {f"v2_mscoco_{split}_annotations.json": {**head, "annotations": annotations}} if answered else {}
        )

    return files


def something(root: Path) -> Files:
    labels = [("74225", "spinning cube", "Spinning [something]"), ("59391", "showing book", "Showing [something]")]
    records = [{"id": id, "label": label, "template": template} for id, label, template in labels]
    return {"something-something-v2-train.json": records}


def activitynet_qa(root: Path) -> Files:
    questions = [
        {"video_name": "abc", "question": "is it indoors", "question_id": "v_abc_1"},
        {"video_name": "abc", "question": "how many people", "question_id": "v_abc_2"},
    ]
    answers = [
        {"answer": "2", "type": 7, "question_id": "v_abc_2"},
        {"answer": "no", "type": 3, "question_id": "v_abc_1"},
    ]
    return {"train_q.json": questions, "train_a.json": answers}


def didemo(root: Path) -> Files:
    base = {"num_segments": 6, "dl_link": "u", "times": [[0, 0]], "video": "1@N01_2_3.mov"}
    texts = ("the man bends over", "camera pans")
    return {"train_data.json": [{**base, "description": text, "annotation_id": id} for id, text in enumerate(texts)]}


def activitynet(root: Path) -> Files:
    sentences = ["Two men talk.", " One man pulls a rope."]
    return {"train.json": {"v_abc": {"duration": 2.0, "timestamps": [[0, 1], [1, 2]], "sentences": sentences}}}


def webvid(root: Path) -> Files:
    lines = ["videoid,contentUrl,duration,page_dir,name", '7,u,PT00H00M01S,001_050,"Disco light,\nin two lines"']
    return {"results_10M_train.csv": "\n".join([*lines, "8,u,PT00H00M01S,001_050,A lake\n"])}


def cc3m(root: Path) -> Files:
    return {"t.tsv": f'a "lake\t{url(root, "a.jpg")}\nb\t{url(root, "b.jpg")}\n'}


def sbu(root: Path) -> Files:
    urls = [url(root, name) for name in ("a.jpg", "b.jpg")]
    return {"sbu-captions-all.json": {"captions": ["A boat", "My dog"], "user_ids": ["1", "2"], "image_urls": urls}}


def msrvtt_qa(root: Path) -> Files:
    base = {"category_id": 14, "video_id": 0}
    texts = ("what is it?", "who sings?")
    return {"train_qa.json": [{**base, "answer": "couch", "id": id, "question": text} for id, text in enumerate(texts)]}


def msrvtt_mc(root: Path) -> Files:
    record = {"clip_name": "video7020", "answer": 3, "options": [f"option {number}" for number in range(5)]}
    return {"msrvtt_retrieval_mc_test.jsonl": json.dumps(record) + "\n"}


def img2dataset_shards(root: Path) -> Files:
    """Two tars and the tables beside them, in which some photos were not to be had."""
    tables: Files = {}
    for shard in range(2):
        folder = root / "media" / f"{shard:05d}.tar"
        with tarfile.open(root / "tar", "w") as tar:
            for photo in sorted(folder.iterdir()):
                tar.add(photo, photo.name)
        shutil.rmtree(folder)
        (root / "tar").rename(folder)
        rows = [
            {"url": "http://a/0", "caption": "gone", "key": f"{shard:05d}0001", "status": "failed_to_download"},
            {"url": "http://a/1", "caption": "a lake", "key": photo.stem, "status": "success"},
        ]
        table = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), table)
        tables[f"{shard:05d}.parquet"] = table.getvalue()
    return tables


KARPATHY_COCO = karpathy("val2014", "coco")
FLICKR = "1.jpg#0\tTwo men .\n1.jpg#1\tMen .\n2.jpg#0\tA dog .\n"
REGIONS = visual_genome("region_descriptions", "regions", [{"region_id": 1, "phrase": "a clock", "x": 1, "y": 2}] * 3)
VG_QA = visual_genome("question_answers", "qas", [{"qa_id": 986768, "question": "What color?", "answer": "Green."}])
JSFUSION = "key,vid_key,video_id,sentence\nret0,msr9770,video9770,a person\n"

# YAML -> its files, flags, {media as they come out: their number of texts}
LAYOUTS: dict[str, tuple[Callable[[Path], Files], list[str], dict[str, int]]] = {
    "webvid": (webvid, [], {"001_050/7.mp4": 1, "001_050/8.mp4": 1}),
    "cc3m": (cc3m, [], {"a.jpg": 1, "b.jpg": 1}),
    "cc12m": (lambda root: {"cc12m.tsv": f"{url(root, 'a.jpg')}\t<PERSON> at sea\n"}, [], {"a.jpg": 1}),
    "sbu": (sbu, [], {"a.jpg": 1, "b.jpg": 1}),
    "coco": (coco, [], {"000000000025.jpg": 2, "000000000009.jpg": 1}),
    "coco_karpathy": (KARPATHY_COCO, ["--keep", "split=train,restval"], {"val2014/0.jpg": 2, "val2014/1.jpg": 2}),
    "flickr30k_karpathy": (karpathy("", "flickr30k"), ["--keep", "split=test"], {"2.jpg": 2}),
    "flickr30k": (lambda root: {"results.token": FLICKR}, [], {"1.jpg": 2, "2.jpg": 1}),
    "visual_genome": (REGIONS, [], {"VG_100K_2/1.jpg": 3, "VG_100K/2.jpg": 3}),
    "vg_qa": (VG_QA, [], {"VG_100K_2/1.jpg": 1, "VG_100K/2.jpg": 1}),
    "msrvtt_7k": (msrvtt("7k"), [], {"video0.mp4": 2, "video2.mp4": 2}),
    "msrvtt_9k": (msrvtt("9k"), [], {"video0.mp4": 2, "video2.mp4": 2}),
    "msrvtt_1k_test": (lambda root: {"MSRVTT_JSFUSION_test.csv": JSFUSION}, [], {"video9770.mp4": 1}),
    "didemo": (didemo, [], {"1@N01_2_3.mov#t=0,30": 2}),
    "activitynet": (activitynet, [], {"v_abc.mp4": 2}),
    "ssv2_label": (something, [], {"74225.webm": 1, "59391.webm": 1}),
    "ssv2_template": (something, [], {"74225.webm": 1, "59391.webm": 1}),
    "msrvtt_qa": (msrvtt_qa, [], {"video0.mp4": 2}),
    "activitynet_qa": (activitynet_qa, [], {"v_abc.mp4": 2}),
    "vqa": (vqa("train2014", True), [], {"train2014/COCO_train2014_000000458752.jpg": 2}),
    "vqa_test": (vqa("test-dev2015", False), [], {"test2015/COCO_test2015_000000458752.jpg": 2}),
    "msrvtt_mc": (msrvtt_mc, [], {"video7020.mp4": 1}),
    "img2dataset": (lambda root: {"0.jsonl": json.dumps({"URL": url(root, "a.jpg"), "TEXT": "x"})}, [], {"a.jpg": 1}),
    "img2dataset_shards": (img2dataset_shards, [], {"00000.tar/000000001.jpg": 1, "00001.tar/000010000.jpg": 1}),
    "generic": (lambda root: {"a.csv": "file;text\na.jpg;x\nb.jpg;y\n"}, [], {"a.jpg": 1, "b.jpg": 1}),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A clip of a second."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * 30, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def write(files: Files, root: Path) -> list[str]:
    """Write annotation files; returns their paths."""
    for name, content in files.items():
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return [str(root / name) for name in files]


def write_media(root: Path, sources: list[str], clip: bytes) -> None:
    for source in sources:
        path = root / "media" / source.partition("#")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            Image.fromarray(np.full((48, 64, 3), 128, np.uint8)).save(path)
        else:
            path.write_bytes(clip)


def test_every_yaml_is_tested_and_on_the_page_about_packing() -> None:
    assert sorted(LAYOUTS) == NAMES
    page = (CORPORA.parent.parent / "docs" / "packing.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in page and f"{name}.yaml" not in page] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_packs_the_files_of_its_data_set(tmp_path: Path, clip: bytes, name: str) -> None:
    layout, flags, expected = LAYOUTS[name]
    write_media(tmp_path, list(expected), clip)
    files = write(layout(tmp_path), tmp_path)
    arguments = ["--corpus", str(CORPORA / f"{name}.yaml"), "--annotations", *files, "--workers", "1", *flags]
    assert main([*arguments, "--media-root", str(tmp_path / "media"), "--output", str(tmp_path / "out")]) == 0
    corpus = read_corpus(str(tmp_path / "out"))
    rows = [row for shard in range(len(corpus.shards)) for row in read_index(corpus, shard).to_pylist()]
    found = {row["source"].rpartition("/media/")[2]: row for row in rows}
    assert {
        source: sum(len(row[kind]) for kind in ("captions", "questions", "choices")) for source, row in found.items()
    } == expected
    assert list(found) == list(expected)
    assert not any(text != text.strip() for row in rows for text in row["captions"])


def rows_of(name: str, root: Path) -> list[Row]:
    return list(read_rows(write(LAYOUTS[name][0](root), root), load_corpus(str(CORPORA / f"{name}.yaml"))))


def test_questions_carry_their_answers_and_types(tmp_path: Path) -> None:
    questions = {
        name: [row.question for row in rows_of(name, tmp_path)]
        for name in ("vqa", "vqa_test", "activitynet_qa", "vg_qa")
    }
    assert questions["vqa"][1] == {
        "question_id": "458752001",
        "question": "What position is this man playing?",
        "answers": ["net", "mesh"],
        "weights": [0.8, 0.2],
        "question_type": "what is this",
        "answer_type": "other",
    }
    assert [each["answers"] for each in questions["vqa_test"]] == [[], []]
    answered = [(each["answers"], each["question_type"]) for each in questions["activitynet_qa"]]
    assert answered == [(["no"], "3"), (["2"], "7")]
    assert [(each["question_id"], each["answers"]) for each in questions["vg_qa"]] == [("986768", ["Green."])] * 2


def test_captions_are_those_of_the_data_set(tmp_path: Path) -> None:
    def captions(name: str) -> list[tuple[str, ...]]:
        return [row.captions for row in rows_of(name, tmp_path)]

    assert captions("webvid")[0] == ("Disco light,\nin two lines",)
    assert captions("cc3m") == [('a "lake',), ("b",)]
    assert captions("activitynet") == [("Two men talk.", "One man pulls a rope.")]
    assert captions("ssv2_label")[0] == ("spinning cube",)
    assert captions("ssv2_template")[0] == ("Spinning something",)
    assert captions("sbu") == [("A boat",), ("My dog",)]


def test_visual_genome_without_the_list_of_images(tmp_path: Path) -> None:
    files = visual_genome("region_descriptions", "regions", [{"phrase": "a clock"}])(tmp_path)
    config = load_corpus(str(CORPORA / "visual_genome.yaml"))
    rows = list(read_rows(write(files, tmp_path)[:1], config))
    assert [row.source for row in rows] == ["1.jpg", "2.jpg"]


def test_sbu_as_two_text_files(tmp_path: Path) -> None:
    captions, urls = (f"SBU_captioned_photo_dataset_{kind}.txt" for kind in ("captions", "urls"))
    files = write({captions: "A boat\nMy dog\n", urls: "http://a/1\nhttp://a/2\n"}, tmp_path)
    config = load_corpus(str(CORPORA / "sbu.yaml"))
    found = [(row.source, *row.captions) for row in read_rows(files, config)]
    assert found == [("http://a/1", "A boat"), ("http://a/2", "My dog")]
    (tmp_path / urls).write_text("http://a/1\n")
    with pytest.raises(ValueError, match="record 2: it has a caption but no address: the two lists must be equally"):
        list(read_rows(files, config))
    with pytest.raises(ValueError, match=r"needs its list of captions \(..._captions.txt\)"):
        list(read_rows(files[1:], config))


@pytest.mark.parametrize("name", NAMES)
def test_singularitys_own_json_is_read_under_every_yaml(tmp_path: Path, name: str) -> None:
    config = load_corpus(str(CORPORA / f"{name}.yaml"))
    media = "image" if config.media_type == "image" else "video"
    records = [
        {media: "x/1.jpg", "caption": ["one", "two"]},
        {media: "x/1.jpg", "question_id": 7, "question": "what?", "answer": ["yes", "no", "yes"]},
        {media: "x/2.jpg", "caption": ["a", "b", "c", "d", "e"], "answer": 4},
    ]
    rows = list(read_rows(write({"own.json": records}, tmp_path), config))
    part = "#t=0,30" if name == "didemo" else ""
    assert [row.source for row in rows] == [f"x/1.jpg{part}", f"x/1.jpg{part}", f"x/2.jpg{part}"]
    assert rows[0].captions == ("one", "two")
    assert rows[1].question["answers"] == ["yes", "no"]
    assert rows[2].choice["answer"] == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_says_where_its_files_come_from_and_the_command(name: str) -> None:
    comment = "".join(line for line in (CORPORA / f"{name}.yaml").read_text().splitlines(True) if line.startswith("#"))
    assert f"--corpus configs/corpora/{name}.yaml" in comment or name == "generic"
    assert "http" in comment or name in ("generic", "img2dataset")
    assert re.search(r"--annotations \S", comment)
    assert "--output data/" in comment


def test_tables_in_any_form_give_the_same_rows(tmp_path: Path) -> None:
    table = [{"path": "a/1.jpg", "text": 'He said "no",\nthen left'}, {"path": "b/2.jpg", "text": "Zürich; snow"}]
    quoted = ['"' + row["text"].replace('"', '""') + '"' for row in table]
    lines = [f"{row['path']},{text}" for row, text in zip(table, quoted, strict=True)]
    files = {"a.csv": "path,text\r\n" + "\r\n".join(lines) + "\r\n", "b.json": table}
    write({**files, "c.jsonl": "\n\n".join(json.dumps(row) for row in table)}, tmp_path)
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "d.parquet")
    config = load_corpus(str(CORPORA / "generic.yaml"))
    results = [list(read_rows([str(path)], config)) for path in sorted(tmp_path.glob("?.*"))]
    assert len(results) == 4
    assert all(result == results[0] for result in results)
    assert results[0][0].captions == ('He said "no",\nthen left',)
