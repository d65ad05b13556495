"""Real annotation files beside the checkout: each is read by its corpus' YAML, as many rows as the file has."""

import csv
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from places import ROOT, SHARED

from sharding.annotations.config import load_corpus
from sharding.annotations.items import Row
from sharding.annotations.reading import read_rows

FOLDER = SHARED / "data" / "annotations"

pytestmark = [pytest.mark.shared, pytest.mark.skipif(not FOLDER.is_dir(), reason="the real data is not here")]

Texts = list[tuple[str, ...]]  # source, captions ... of each row


def read(corpus: str, *files: str | Path, **changes) -> list[Row]:
    """The rows of annotation files as configs/corpora/CORPUS.yaml reads them."""
    config = load_corpus(str(ROOT / "configs" / "corpora" / f"{corpus}.yaml"))
    for name, value in changes.items():
        setattr(config, name, value)
    return list(read_rows([str(FOLDER / file) for file in files], config))


def given(file: str):
    return json.loads((FOLDER / file).read_text(encoding="utf-8"))


def webvid(file: str) -> Texts:
    with open(FOLDER / file, encoding="utf-8", newline="") as handle:
        return [(f"{row['page_dir']}/{row['videoid']}.mp4", row["name"].strip()) for row in csv.DictReader(handle)]


def cc3m(file: str) -> Texts:
    rows = (line.split("\t") for line in (FOLDER / file).read_text(encoding="utf-8").splitlines())
    return [(url.strip(), text.strip()) for text, url in rows]


def img2dataset(file: str) -> Texts:
    return [(row["URL"], row["TEXT"].strip()) for row in pq.read_table(FOLDER / file).to_pylist()]


def coco(file: str) -> Texts:
    names = {image["id"]: image["file_name"] for image in given(file)["images"]}
    return [(names[each["image_id"]], each["caption"].strip()) for each in given(file)["annotations"]]


def flickr30k(file: str) -> Texts:
    """The last of an image's texts is its path."""
    return [(name, *texts[:5]) for name, texts in given(file).items()]


def activitynet(file: str) -> Texts:
    return [
        (f"{name}.mp4", *(text.strip() for text in video["sentences"] if text.strip()))
        for name, video in given(file).items()
    ]


def didemo(file: str) -> Texts:
    return [(f"{each['video']}#t=0,30", each["description"].strip()) for each in given(file)]


def ssv2_label(file: str) -> Texts:
    return [(f"{each['id']}.webm", each["label"].strip()) for each in given(file)]


def ssv2_template(file: str) -> Texts:
    return [(f"{each['id']}.webm", each["template"].replace("[", "").replace("]", "")) for each in given(file)]


@pytest.mark.parametrize(
    ("expected", "file", "count"),
    [
        (webvid, "webvid/results_10M_val.csv", 2000),
        (cc3m, "cc3m/Validation_GCC-1.1.0-Validation.tsv", 2000),
        (img2dataset, "img2dataset_parquet/test_1000.parquet", 1000),
        (coco, "coco_captions/captions_val2017.json", 5004),
        (flickr30k, "flickr30k/validation.json", 500),
        (activitynet, "activitynet_captions/train.json", 800),
        (activitynet, "activitynet_captions/val_1.json", 500),
        (activitynet, "activitynet_captions/val_2.json", 497),
        (didemo, "didemo/val_data.json", 0),
        (ssv2_label, "ssv2/something-something-v2-validation.json", 2000),
        (ssv2_template, "ssv2/something-something-v2-validation.json", 2000),
    ],
)
def test_captions_are_those_of_the_file(expected, file: str, count: int) -> None:
    rows = [(row.source, *row.captions) for row in read(expected.__name__, file)]
    assert rows == expected(file)
    assert len(rows) == count or not count


@pytest.mark.parametrize(
    ("corpus", "file", "count", "caption"),
    [
        ("webvid", "webvid/test_webvid.csv", 20, ""),
        ("webvid", "img2dataset_parquet/mp4.parquet", 100, "019051_019100/32640751.mp4: Tropical rain storm"),
        ("msrvtt_1k_test", "msrvtt/MSRVTT_JSFUSION_test.csv", 1000, "video9770.mp4: a person is connecting something"),
        ("msrvtt_1k_test", "msrvtt/msrvtt_test_1k.csv", 1000, "video9770.mp4: a person is connecting something"),
        ("flickr30k", "flickr8k/Flickr8k.token.txt", 0, "1001773457_577c3a7d70.jpg: A black dog and a spotted dog are"),
    ],
)
def test_files_in_other_layouts(corpus: str, file: str, count: int, caption: str) -> None:
    rows = read(corpus, file)
    assert len(rows) == (count or len((FOLDER / file).read_text(encoding="utf-8").splitlines()))
    assert any(f"{row.source}: {row.captions[0]}".startswith(caption) for row in rows)


def test_msrvtt_videodatainfo_and_its_splits(tmp_path: Path) -> None:
    file = "msrvtt/train_val_videodatainfo.json"
    content = given(file)
    splits = {video["video_id"]: video["split"] for video in content["videos"]}
    rows = read("msrvtt_7k", file)
    assert len(rows) == len(content["sentences"]) == 6000
    assert {row.source for row in rows} == {f"{name}.mp4" for name in splits}
    validate = Counter(row.filtered for row in read("msrvtt_7k", file, keep={"split": "validate"}))
    kept = sum(splits[each["video_id"]] == "validate" for each in content["sentences"])
    assert validate == {"": kept, "split is not validate": 6000 - kept}
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\nvideo3\nvideo5\n")
    rows = read("msrvtt_9k", file, tmp_path / "MSRVTT_train.9k.csv")
    assert Counter(row.filtered for row in rows) == {"": 40, "video not in MSRVTT_train.9k.csv": 5960}
    assert {row.source for row in rows if not row.filtered} == {"video3.mp4", "video5.mp4"}


def test_msrvtt_qa_as_a_table() -> None:
    rows = read("msrvtt_qa", "msrvtt_qa/val.csv")
    assert len(rows) == 2000
    assert rows[0].source == "video6513.mp4"
    assert rows[0].question == {
        "question_id": "158581",
        "question": "what are three people sitting on",
        "answers": ["couch"],
        "weights": [1.0],
        "question_type": "14",
        "answer_type": "",
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_activitynet_qa_joins_questions_and_answers(split: str) -> None:
    questions, answers = given(f"activitynet_qa/{split}_q.json"), given(f"activitynet_qa/{split}_a.json")
    by_id = {each["question_id"]: each["answer"] for each in answers}
    rows = read("activitynet_qa", f"activitynet_qa/{split}_a.json", f"activitynet_qa/{split}_q.json")
    assert [(row.source, row.question["question"], row.question["answers"]) for row in rows] == [
        (f"v_{each['video_name']}.mp4", each["question"], [by_id[each["question_id"]]]) for each in questions
    ]


def test_unlabelled_clips_are_read_without_captions() -> None:
    columns = load_corpus(str(ROOT / "configs" / "corpora" / "ssv2_label.yaml")).columns
    columns.caption = ""
    assert len(read("ssv2_label", "ssv2/something-something-v2-test.json", columns=columns)) == 300
    with pytest.raises(ValueError, match='record 1: no "label"; its columns are id'):
        read("ssv2_label", "ssv2/something-something-v2-test.json")


def test_vqa_answers_are_weighed_by_annotators(tmp_path: Path) -> None:
    annotations = given("vqa_v2/v2_mscoco_val2014_annotations.json")["annotations"]
    questions = [
        {"image_id": each["image_id"], "question": "what is it?", "question_id": each["question_id"]}
        for each in annotations
    ]
    (tmp_path / "questions.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    rows = read("vqa", "vqa_v2/v2_mscoco_val2014_annotations.json", tmp_path / "questions.json")
    assert len(rows) == len(annotations) == 100
    for row, each in zip(rows, annotations, strict=True):
        counts = Counter(answer["answer"] for answer in each["answers"])
        assert row.source == f"val2014/COCO_val2014_{each['image_id']:012d}.jpg"
        assert dict(zip(row.question["answers"], row.question["weights"], strict=True)) == {
            answer: count / 10 for answer, count in counts.items()
        }
        assert row.question["answer_type"] == each["answer_type"]
    with pytest.raises(ValueError, match="holds answers, and no file with their questions is given"):
        read("vqa", "vqa_v2/v2_mscoco_val2014_annotations.json")
