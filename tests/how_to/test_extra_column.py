"""docs/how-to/extra-column.md, word for word: a column added, packed and indexed, in a loss of one's own."""

import hashlib
import io
import json
import runpy
import shutil
import tarfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from blocks import blocks
from small_run import job, learned, run_jobs
from test_loss import SMALL

from loaders import LoaderConfig, PerMedia, TrainLoader
from runtime.errors import UserError
from sharding.annotations.extra import extra_value
from sharding.build import build_corpus
from sharding.index import main as index
from sharding.inspect import main as inspect
from sharding.shards.columns import add_column
from sharding.shards.schema import read_corpus, read_index
from sharding.shards.verification import examine, verify_corpus
from sharding.verify import main as verify


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, shapes) -> Path:
    """The user's folder, with the files of the page and corpora as `make demo` makes them, after add_score.py."""
    folder = tmp_path_factory.mktemp("own")
    for name, content in blocks("extra-column").items():
        (folder / name).write_text(content)
    for name in ("images_train", "clips_train"):
        shutil.copytree(shapes.url(name), folder / "demo/shards" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path("add_score.py")
    return folder


def loader(corpora: list[Path | str], tokenizer, *columns: str, **settings) -> TrainLoader:
    sizes = PerMedia(settings.pop("size", 10), 10)
    how = {"image_res": 32, "decode": "cpu", "threads": 1, "batch_size": sizes, "extra_columns": list(columns)}
    return TrainLoader(list(map(str, corpora)), tokenizer, LoaderConfig(**how | settings))


def scores_of(corpus: Path) -> dict[str, float]:
    found = read_corpus(str(corpus))
    tables = [read_index(found, shard) for shard in range(len(found.shards))]
    rows = [row for table in tables for row in table.select(["key", "score"]).to_pylist()]
    return {f"{found.name}/{row['key']}": row["score"] for row in rows}


def test_an_added_column_arrives_in_the_batch(own: Path, tokenizer, capsys) -> None:
    corpora = [own / "demo/shards" / name for name in ("images_train", "clips_train")]
    expected = scores_of(corpora[0]) | scores_of(corpora[1])
    with loader(corpora, tokenizer, "score") as batches:
        for batch in batches:
            assert batch.columns["score"].dtype == torch.float32
            assert batch.columns["score"].tolist() == pytest.approx([expected[key] for key in batch.keys])
            assert batch.rows(slice(2, 5)).columns["score"].tolist() == batch.columns["score"][2:5].tolist()
            assert batch.to("cpu").columns["score"].equal(batch.columns["score"])
    assert verify_corpus(str(corpora[0])) == []
    assert inspect([str(corpora[0]), "--sample", "0"]) == 0
    assert "  score: 0." in capsys.readouterr().out


def test_a_loss_trains_with_it_in_micro_batches(own: Path, shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    where = ("data_root=demo/shards", f"tokenizer={shapes.vocab}", "output_dir=runs/scored")
    run_jobs(own, [job("pretrain", "my_run.yaml", *where, *SMALL, "accumulate=2")], processes=1)
    lines = learned(own / "runs/scored")
    assert len(lines) == 4
    assert all(0 < line["loss_scored"] < 5 for line in lines)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, shapes) -> Path:
    """A corpus packed with one column of each type; some values are missing, some come twice."""
    folder = tmp_path_factory.mktemp("packed")
    rows = json.loads((shapes.folder / "images_train.json").read_text())[:70]
    for number, row in enumerate(rows):
        row |= {"score": number / 2 if number % 7 else None, "rank": number, "good": number % 2 == 0}
        row |= {"meta": {"site": f"site {number % 3}"}}
    rows.append(rows[7] | {"score": 99.0, "rank": 99})
    (folder / "rows.json").write_text(json.dumps(rows))
    kinds = {"score": "float", "rank": "int", "good": "bool", "meta.site": "str"}
    media = str(shapes.folder / "media")
    where = [str(folder / "rows.json")], media, "image", str(folder / "corpus")
    build_corpus(*where, size=48, workers=1, extra_columns=kinds)
    return folder / "corpus"


def test_packed_columns_arrive_with_their_types(packed: Path, tokenizer) -> None:
    with loader([packed], tokenizer, "score", "rank", "good", "meta.site", size=70) as batches:
        (batch,) = batches
    score, rank, good, site = batch.columns.values()
    assert (score.dtype, rank.dtype, good.dtype) == (torch.float32, torch.int64, torch.bool)
    assert sorted(rank.tolist()) == list(range(70))
    for row, number in enumerate(rank.tolist()):
        assert site[row] == f"site {number % 3}"
        assert good[row] == (number % 2 == 0)
        if number == 7:
            assert score[row] == 99  # the first row about it has none
        else:
            assert score[row] == number / 2 if number % 7 else score[row].isnan()
    assert verify_corpus(str(packed)) == []


def test_repair_rebuilds_packed_columns_also_without_a_description(packed: Path, tmp_path: Path) -> None:
    corpus = shutil.copytree(packed, tmp_path / "corpus")
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    (name,) = sorted(path.name for path in corpus.glob("corpus-*.parquet"))[:1]
    (corpus / name).unlink()
    (corpus / "corpus.json").unlink()
    assert verify([str(corpus), "--repair"]) == 0
    assert pq.read_table(corpus / name).equals(pq.read_table(packed / name))
    assert read_corpus(str(corpus)).settings == read_corpus(str(packed)).settings
    assert (corpus / "build.json").read_bytes() == before["build.json"]


def test_shards_of_other_tools_give_keys_of_their_json(packed: Path, tmp_path: Path, tokenizer) -> None:
    for tar in packed.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    assert index([str(tmp_path), "--workers", "1"]) == 0
    assert index([str(tmp_path), "--workers", "1", "--extra-columns", "rank=float", "meta.site=str"]) == 0
    with loader([tmp_path], tokenizer, "rank", "meta.site", size=70) as batches:
        (batch,) = batches
    assert sorted(batch.columns["rank"].tolist())[:8] == list(range(8))
    assert index([str(tmp_path), "--workers", "1"]) == 0  # they stay
    assert "rank" in read_index(read_corpus(str(tmp_path)), 0).column_names


def test_columns_and_keys_of_other_versions_are_read(packed: Path, tmp_path: Path, tokenizer) -> None:
    corpus = shutil.copytree(packed, tmp_path / "corpus")
    add_column(str(corpus), "later", "str", lambda table: ["x"] * len(table))
    text = (corpus / "corpus.json").read_text()
    text = text.replace('"format"', '"licence": "CC BY",\n "format"').replace(
        '"samples": 35', '"pages": 3, "samples": 35'
    )
    end = text.index(',\n "sha256": "', text.rindex("]"))
    digest = hashlib.sha256(text[:end].encode()).hexdigest()
    (corpus / "corpus.json").write_text(f'{text[:end]},\n "sha256": "{digest}"\n}}\n')
    assert examine(str(corpus)).all == []
    add_column(str(corpus), "mine", "int", lambda table: [1] * len(table))
    (corpus / "corpus-000000.parquet").unlink()
    assert verify([str(corpus), "--repair"]) == 0
    assert json.loads((corpus / "corpus.json").read_text())["licence"] == "CC BY"
    with loader([corpus], tokenizer, size=70) as batches:
        assert next(iter(batches)).columns == {}


@pytest.mark.parametrize(
    ("columns", "change", "message"),
    [
        (
            ["scores"],
            None,
            r"extra_columns=scores: .*corpus-000000.parquet has no such column, .* score, rank, good",
        ),
        (["captions"], None, "extra_columns names 'captions', a column that every index has"),
        (["rank"], ("int", [None]), "extra_columns=rank: 1 of .* values are missing in .*: fill them"),
        (["rank"], ("str", ["x"]), r"extra_columns=rank: .* has str, .* has int: give both the same type"),
    ],
)
def test_what_a_batch_cannot_carry_is_one_clear_error(
    packed: Path, tmp_path: Path, tokenizer, columns, change, message
) -> None:
    other = shutil.copytree(packed, tmp_path / "other")
    if change:
        kind, (value,) = change
        (other / "corpus.json").unlink()  # then it is one of shards that were indexed
        assert index([str(other), "--workers", "1"]) == 0
        filler = 1 if kind == "int" else "y"
        add_column(str(other), "rank", kind, lambda table: [value] + [filler] * (len(table) - 1))
    with pytest.raises(UserError, match=message):
        loader([packed, other], tokenizer, *columns)


def test_a_wrong_value_names_its_record(tmp_path: Path, shapes, packed: Path) -> None:
    rows = json.loads((shapes.folder / "images_train.json").read_text())[:3]
    media, output = str(shapes.folder / "media"), str(tmp_path / "out")
    for value, message in (("high", '"score" must be a number .float., not .high.'), (..., 'no "score"')):
        rows[2] = rows[2] | {"score": value} if value is not ... else {"image": "x", "caption": "y"}
        (tmp_path / "rows.json").write_text(json.dumps([row | {"score": 1} | row for row in rows[:2]] + rows[2:]))
        with pytest.raises(UserError, match=f"record 3: {message}"):
            build_corpus([str(tmp_path / "rows.json")], media, "image", output, extra_columns={"score": "float"})
    with pytest.raises(UserError, match="extra column 'source': the index has a column of this name"):
        add_column(str(packed), "source", "str", lambda table: table["key"])
    with pytest.raises(UserError, match=r"corpus-000000.parquet: 2 values of x for \d+ rows"):
        add_column(str(packed), "x", "int", lambda table: pa.array([1, 2]).to_pylist())


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (2**63 - 1, "int", 2**63 - 1),
        (np.int64(7), "int", 7),
        (2**64, "int", ValueError),
        (str(2**64), "int", ValueError),
        (1e300, "int", ValueError),
        ("inf", "float", ValueError),
        (np.float32("nan"), "float", None),
        (np.float32("nan"), "bool", None),
        ("NaN", "float", None),
        ("nan", "int", None),
        ("NaN", "bool", None),
        ("NaN", "str", "NaN"),
        ("\ud800", "str", ValueError),
    ],
)
def test_a_value_fits_its_type_is_missing_or_an_error(value, kind, expected) -> None:
    if expected is ValueError:
        with pytest.raises(ValueError, match=rf"\({kind}\), not"):
            extra_value(value, kind)
    else:
        assert extra_value(value, kind) == expected


def test_a_packed_column_is_not_replaced_an_added_one_is(packed: Path, tmp_path: Path) -> None:
    corpus = str(shutil.copytree(packed, tmp_path / "corpus"))
    with pytest.raises(
        UserError, match="corpus: score was packed, its values are in the tars too: choose another name"
    ):
        add_column(corpus, "score", "float", lambda table: [1.0] * len(table))
    for value in (1, 2):
        add_column(corpus, "mine", "int", lambda table, value=value: [value] * len(table))
    assert verify_corpus(corpus) == []
    assert set(read_index(read_corpus(corpus), 0)["mine"].to_pylist()) == {2}


@pytest.mark.parametrize("name", ["text", "TEXT", "caption", "question", "shard", "frame"])
def test_names_that_mean_something_else_in_the_json_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"extra column '{name}': .* something else under this name, rename"):
        build_corpus([], str(tmp_path), "image", str(tmp_path / "out"), extra_columns={name: "str"})


def test_nested_keys_are_found_and_a_key_that_no_sample_has_is_a_warning(packed: Path, tmp_path: Path, caplog) -> None:
    with tarfile.open(next(packed.glob("*.tar"))) as old, tarfile.open(tmp_path / "00000.tar", "w") as new:
        for member in old.getmembers():
            data = old.extractfile(member).read()
            if member.name.endswith(".json"):
                fields = json.loads(data)
                data = json.dumps(fields | {"meta": {"site": fields.pop("meta.site")}}).encode()
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    for _ in range(2):  # also where the index is kept
        caplog.clear()
        assert index([str(tmp_path), "--workers", "1", "--extra-columns", "typo=float", "meta.site=str"]) == 0
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            "no sample has a value of typo: check the key's name in the KEY.json of the tars"
        ]
    sites = read_index(read_corpus(str(tmp_path)), 0)["meta.site"].to_pylist()
    assert {"site 0", "site 1", "site 2"} == set(sites)


def with_column(packed: Path, folder: Path, name: str, value: object, kind: pa.DataType) -> str:
    """A copy of the corpus, with a column in its indices as another program may write it."""
    corpus = shutil.copytree(packed, folder / name)
    for path in corpus.glob("corpus-*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.append_column(name, pa.array([value] * len(table), kind)), path)
    return str(corpus)


def test_columns_of_other_types_are_shown_as_json(packed: Path, tmp_path: Path, capsys) -> None:
    corpus = with_column(packed, tmp_path, "taken", datetime(2026, 11, 27), pa.timestamp("s"))
    assert inspect([corpus, "--sample", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sample"]["taken"] == "2026-11-27 00:00:00"


def test_numbers_beyond_the_type_of_a_batch_are_an_error(packed: Path, tmp_path: Path, tokenizer) -> None:
    corpus = with_column(packed, tmp_path, "small", 2**63 - 1, pa.uint64())
    with loader([corpus], tokenizer, "small", size=35) as batches:
        assert set(next(iter(batches)).columns["small"].tolist()) == {2**63 - 1}
    corpus = with_column(packed, tmp_path, "large", 2**63, pa.uint64())
    with pytest.raises(UserError, match=r"extra_columns=large: .*corpus-00000..parquet has numbers of 2\*\*63 or more"):
        loader([corpus], tokenizer, "large")
