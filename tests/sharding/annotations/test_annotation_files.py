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
from sharding.build import main
from sharding.shards.schema import read_corpus, read_index

FOLDER = SHARED / "data" / "annotations"
CORPORA = ROOT / "configs" / "corpora"

pytestmark = [pytest.mark.shared, pytest.mark.skipif(not FOLDER.is_dir(), reason="the real data is not here")]


def read(corpus: str, *files: str | Path, **changes) -> list[Row]:
    """The rows of annotation files as configs/corpora/CORPUS.yaml reads them."""
    config = load_corpus(str(CORPORA / f"{corpus}.yaml"))
    for name, value in changes.items():
        setattr(config, name, value)
    return list(read_rows([str(FOLDER / file) for file in files], config))


def lines(file: str) -> list[str]:
    return (FOLDER / file).read_text(encoding="utf-8").splitlines()


def given(file: str):
    return json.loads((FOLDER / file).read_text(encoding="utf-8"))


def test_webvid_with_line_breaks_inside_quoted_names() -> None:
    file = "webvid/results_10M_val.csv"
    with open(FOLDER / file, encoding="utf-8", newline="") as handle:
        expected = list(csv.DictReader(handle))
    rows = read("webvid", file)
    assert len(rows) == len(expected) == 2000 < len(lines(file)) - 1
    assert [row.source for row in rows] == [f"{fields['page_dir']}/{fields['videoid']}.mp4" for fields in expected]
    assert [row.captions for row in rows] == [(fields["name"].strip(),) for fields in expected]
    assert any("\n" in row.captions[0] for row in rows)


def test_webvid_with_its_older_columns_and_as_parquet() -> None:
    assert len(read("webvid", "webvid/test_webvid.csv")) == 20
    table = pq.read_table(FOLDER / "img2dataset_parquet/mp4.parquet")
    rows = read("webvid", "img2dataset_parquet/mp4.parquet")
    assert len(rows) == table.num_rows == 100
    assert rows[1] == Row("019051_019100/32640751.mp4", ("Tropical rain storm",))


def test_cc3m() -> None:
    file = "cc3m/Validation_GCC-1.1.0-Validation.tsv"
    rows = read("cc3m", file)
    assert [(*row.captions, row.source) for row in rows] == [
        tuple(field.strip() for field in line.split("\t")) for line in lines(file)
    ]
    assert len(rows) == 2000


def test_img2dataset_parquet() -> None:
    table = pq.read_table(FOLDER / "img2dataset_parquet/test_1000.parquet").to_pylist()
    rows = read("img2dataset", "img2dataset_parquet/test_1000.parquet")
    assert [(row.source, row.captions) for row in rows] == [(row["URL"], (row["TEXT"].strip(),)) for row in table]
    assert len(rows) == 1000


def test_coco() -> None:
    content = given("coco_captions/captions_val2017.json")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    rows = read("coco", "coco_captions/captions_val2017.json")
    assert len(rows) == len(content["annotations"]) == 5004
    assert [(row.source, *row.captions) for row in rows] == [
        (names[each["image_id"]], each["caption"].strip()) for each in content["annotations"]
    ]
    assert len({row.source for row in rows}) == 1000


def test_flickr30k_leaves_the_path_among_the_captions_out() -> None:
    content = given("flickr30k/validation.json")
    rows = read("flickr30k", "flickr30k/validation.json")
    assert len(rows) == len(content) == 500
    assert all(len(row.captions) == 5 for row in rows)
    assert not any("flickr30k-images" in caption for row in rows for caption in row.captions)
    assert [row.source for row in rows] == list(content)


def test_flickr8k_tokens() -> None:
    rows = read("flickr30k", "flickr8k/Flickr8k.token.txt")
    assert len(rows) == len(lines("flickr8k/Flickr8k.token.txt"))
    assert rows[5] == Row("1001773457_577c3a7d70.jpg", ("A black dog and a spotted dog are fighting",))


@pytest.mark.parametrize(("file", "count"), [("train", 800), ("val_1", 500), ("val_2", 497)])
def test_activitynet_captions(file: str, count: int) -> None:
    content = given(f"activitynet_captions/{file}.json")
    rows = read("activitynet", f"activitynet_captions/{file}.json")
    assert len(rows) == len(content) == count
    for row, (name, video) in zip(rows, content.items(), strict=True):
        assert row.source == f"{name}.mp4"
        assert row.captions == tuple(text.strip() for text in video["sentences"] if text.strip())


def test_didemo_is_about_the_first_30_seconds() -> None:
    content = given("didemo/val_data.json")
    rows = read("didemo", "didemo/val_data.json")
    assert [(row.source, *row.captions) for row in rows] == [
        (f"{each['video']}#t=0,30", each["description"].strip()) for each in content
    ]


def test_msrvtt_videodatainfo_and_its_splits() -> None:
    content = given("msrvtt/train_val_videodatainfo.json")
    splits = {video["video_id"]: video["split"] for video in content["videos"]}
    rows = read("msrvtt_7k", "msrvtt/train_val_videodatainfo.json")
    assert len(rows) == len(content["sentences"]) == 6000
    assert {row.source for row in rows} == {f"{name}.mp4" for name in splits}
    validate = read("msrvtt_7k", "msrvtt/train_val_videodatainfo.json", keep={"split": "validate"})
    kept = [row for row in validate if not row.filtered]
    assert len(kept) == sum(splits[each["video_id"]] == "validate" for each in content["sentences"])
    assert {row.filtered for row in validate} == {"", "split is not validate"}


@pytest.mark.parametrize("file", ["MSRVTT_JSFUSION_test.csv", "msrvtt_test_1k.csv"])
def test_msrvtt_1k_test_with_either_separator(file: str) -> None:
    rows = read("msrvtt_1k_test", f"msrvtt/{file}")
    assert len(rows) == 1000 == len({row.source for row in rows})
    assert rows[0] == Row("video9770.mp4", ("a person is connecting something to system",))


def test_a_list_of_videos_chooses_among_msrvtts_sentences(tmp_path: Path) -> None:
    (tmp_path / "MSRVTT_train.9k.csv").write_text("video_id\nvideo3\nvideo5\n")
    rows = read("msrvtt_9k", "msrvtt/train_val_videodatainfo.json", tmp_path / "MSRVTT_train.9k.csv")
    counts = Counter(row.filtered for row in rows)
    assert counts == {"": 40, "video not in MSRVTT_train.9k.csv": 5960}
    assert {row.source for row in rows if not row.filtered} == {"video3.mp4", "video5.mp4"}


def test_msrvtt_qa_as_a_table() -> None:
    rows = read("msrvtt_qa", "msrvtt_qa/val.csv")
    assert len(rows) == len(lines("msrvtt_qa/val.csv")) - 1 == 2000
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
    by_id = {each["question_id"]: each for each in answers}
    rows = read("activitynet_qa", f"activitynet_qa/{split}_a.json", f"activitynet_qa/{split}_q.json")
    assert len(rows) == len(questions)
    for row, question in zip(rows, questions, strict=True):
        assert row.source == f"v_{question['video_name']}.mp4"
        assert row.question["question"] == question["question"]
        assert row.question["answers"] == [by_id[question["question_id"]]["answer"]]


@pytest.mark.parametrize("column", ["label", "template"])
def test_something_something(column: str) -> None:
    content = given("ssv2/something-something-v2-validation.json")
    rows = read(f"ssv2_{column}", "ssv2/something-something-v2-validation.json")
    assert len(rows) == len(content) == 2000
    assert rows[0].source == f"{content[0]['id']}.webm"
    assert not any("[" in row.captions[0] for row in rows)
    if column == "template":
        assert {row.captions[0] for row in rows} <= set(given("ssv2/something-something-v2-labels.json"))


def test_unlabelled_clips_are_read_without_captions() -> None:
    config = load_corpus(str(CORPORA / "ssv2_label.yaml"))
    config.columns.caption = ""
    rows = list(read_rows([str(FOLDER / "ssv2/something-something-v2-test.json")], config))
    assert len(rows) == 300
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


@pytest.mark.parametrize(
    ("corpus", "file", "media", "flags", "expected"),
    [
        (
            "ssv2_template",
            "ssv2/something-something-v2-validation.json",
            "videos/media",
            ["--limit", "1"],
            "166766.webm",
        ),
        ("activitynet", "activitynet_captions/train.json", "videos/media", ["--limit", "1"], "v_ZNVhz7ctTq0.mp4"),
        ("coco", "coco_captions/captions_val2017.json", "photos/images/val2017", ["--max-failures", "1"], ""),
    ],
)
def test_real_annotations_pack_their_real_media(
    tmp_path: Path, corpus: str, file: str, media: str, flags, expected
) -> None:
    out = str(tmp_path / "out")
    root = FOLDER.parent / media
    words = [
        "--corpus",
        str(CORPORA / f"{corpus}.yaml"),
        "--annotations",
        str(FOLDER / file),
        "--media-root",
        str(root),
    ]
    assert main([*words, "--output", out, "--workers", "1", *flags]) == 0
    packed = read_corpus(out)
    rows = [row for shard in range(len(packed.shards)) for row in read_index(packed, shard).to_pylist()]
    if expected:
        assert [row["source"] for row in rows] == [expected]
        assert rows[0]["captions"]
    else:
        assert {row["source"] for row in rows} == {path.name for path in root.iterdir()}
        assert {len(row["captions"]) for row in rows} <= {5, 6}
