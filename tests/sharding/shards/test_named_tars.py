"""Paths that name tars, as webdataset's users write them: one tar, brace lists; indexed, read, checked, trained on."""

import io
import tarfile
from pathlib import Path

import pytest
from object_stores import Store
from PIL import Image

from loaders.config import LoaderConfig
from loaders.shards import CorpusReader, open_corpus
from sharding.index import main
from sharding.inspect import main as inspect_main
from sharding.shards.indexing import index_shards
from sharding.shards.schema import named_shards, read_corpus
from sharding.verify import main as verify_main
from train.config.settings import load_settings


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Six tars of two samples."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(6):
        with tarfile.open(folder / f"x-{number:03d}.tar", "w") as tar:
            for sample in range(2):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (40 * number, 99 * sample, 0)).save(buffer, "JPEG")
                for ending, data in (("jpg", buffer.getvalue()), ("txt", b"a colour")):
                    info = tarfile.TarInfo(f"{number}{sample}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def names(url: str) -> list[str]:
    return [shard.name for shard in read_corpus(url).shards]


@pytest.mark.parametrize(
    ("url", "folder", "expected"),
    [
        ("d/x-{000..002}.tar", "d", ["x-000.tar", "x-001.tar", "x-002.tar"]),
        ("s3://b/d/{a,b}-{1..2}.tar", "s3://b/d", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
        ("d/{x-{0..1},y}.tar", "d", ["x-0.tar", "x-1.tar", "y.tar"]),
        ("x-{9..11}.tar", ".", ["x-9.tar", "x-10.tar", "x-11.tar"]),
        ("d/x.tar::d/y-{1,2}.tar", "d", ["x.tar", "y-1.tar", "y-2.tar"]),
        ("d/x.tar", "d", ["x.tar"]),
        ("d/corpus", "d/corpus", []),
        ("s3://b/{x}/corpus", "s3://b/{x}/corpus", []),
        ("simplecache::s3://b/c", "simplecache::s3://b/c", []),
    ],
)
def test_what_a_path_names(url: str, folder: str, expected: list[str]) -> None:
    assert named_shards(url) == (folder, expected)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("d/x-{000..002.tar", "has a brace without its counterpart"),
        ("{a,b}/x.tar", "lists tars of several folders (a, b)"),
        ("d/{train,val}", "must name .tar files"),
    ],
)
def test_lists_that_mean_nothing_are_refused(url: str, reason: str, capsys) -> None:
    for command in (main, inspect_main, verify_main):
        with pytest.raises(SystemExit, match="2"):
            command([url])
        assert reason in capsys.readouterr().err


def test_a_folder_with_such_a_name_is_a_folder(tars: Path) -> None:
    for name in ("{a,b}", "x.tar"):
        folder = tars.rename(tars.parent / name)
        assert index_shards(str(folder)).samples == 12
        assert len(names(str(folder))) == 6
        tars = folder


def test_just_the_named_tars_are_indexed_and_later_ones_join_them(tars: Path, capsys) -> None:
    assert [shard.name for shard in index_shards(f"{tars}/x-{{000..001}}.tar").shards] == ["x-000.tar", "x-001.tar"]
    assert not (tars / "x-002.parquet").exists()
    assert verify_main([str(tars), "--workers", "1"]) == 0
    corpus = index_shards(f"{tars}/x-004.tar")
    assert [shard.name for shard in corpus.shards] == ["x-000.tar", "x-001.tar", "x-004.tar"]
    assert corpus.name == "tars"
    assert verify_main([str(tars), "--workers", "1"]) == 0
    whole = index_shards(str(tars))
    assert (len(whole.shards), whole.settings) == (6, {"indexed": True})
    assert main([f"{tars}/x-{{004..007}}.tar"]) == 2
    assert f"{tars}/x-006.tar does not exist" in capsys.readouterr().err
    assert read_corpus(str(tars)) == whole


def test_a_corpus_of_the_named_tars_is_read(tars: Path, capsys) -> None:
    index_shards(str(tars))
    some = f"{tars}/x-{{003,001,005}}.tar"
    assert names(some) == ["x-001.tar", "x-003.tar", "x-005.tar"]  # in the order of corpus.json
    reader = CorpusReader(some)
    assert [reader.index(shard).record(0).key for shard in range(3)] == ["10", "30", "50"]
    reader.close()
    assert inspect_main([some]) == 0
    assert "3 shards" in capsys.readouterr().out
    (tars / "x-000.tar").write_bytes(b"damaged")
    assert verify_main([some, "--workers", "1"]) == 0
    assert verify_main([f"{tars}/x-000.tar", "--workers", "1"]) == 1
    assert verify_main([some, "--repair"]) == 2
    assert f"give its folder {tars}" in capsys.readouterr().err


def test_a_tar_that_is_not_indexed_is_an_error_with_the_remedy(tars: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m sharding.index '.*/x-\{000..001\}.tar'`"):
        read_corpus(f"{tars}/x-{{000..001}}.tar")
    index_shards(f"{tars}/x-{{000..001}}.tar")
    with pytest.raises(ValueError, match=r"does not list x-002.tar and 1 more: index it with .*tars/x-002.tar`"):
        read_corpus(f"{tars}/x-{{001..003}}.tar")


def test_tars_on_a_web_server_are_indexed_by_their_names(tars: Path, http: Store, tmp_path: Path, capsys) -> None:
    url = http.fill(tars, "tars")
    output = str(tmp_path / "index")
    assert main([f"{url}/x-{{000..002}}.tar", "--output", output, "--workers", "1"]) == 0
    assert main([f"{url}/x-{{005..006}}.tar", "--output", output, "--workers", "1"]) == 2
    assert f"{url}/x-006.tar does not exist" in capsys.readouterr().err
    assert verify_main([output, "--workers", "1"]) == 0
    assert names(f"{output}/x-{{001..002}}.tar") == ["x-001.tar", "x-002.tar"]


def test_tars_of_a_remote_corpus(tars: Path, http: Store) -> None:
    index_shards(str(tars))
    url = http.fill(tars, "whole")
    for some in (f"{url}/x-{{001..002}}.tar", f"{url}/x-004.tar"):
        reader = open_corpus(some, LoaderConfig())
        assert [shard.name for shard in reader.corpus.shards] == named_shards(some)[1]
        assert reader.index(0).record(0).key == reader.corpus.shards[0].name[4] + "0"
        reader.close()


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("/d/x-{000..003}.tar", ["/d/x-{000..003}.tar"]),
        ('["/d/x-{000..003}.tar"]', ["/d/x-{000..003}.tar"]),
        ("['/d/{a,b}.tar',/e]", ["/d/{a,b}.tar", "/e"]),
        ("/d/{a,b}.tar", ["/d/{a,b}.tar"]),
        ("x-{0..3}.tar", ["x-{0..3}.tar"]),
        ("s3://b/x-{000..003}.tar", ["s3://b/x-{000..003}.tar"]),
        ("${data_root}/x-{000..003}.tar", ["/d/x-{000..003}.tar"]),
    ],
)
def test_lists_pass_through_the_settings_of_a_run(tmp_path: Path, given: str, urls: list[str]) -> None:
    (tmp_path / "run.yaml").write_text(f"data_root: /d\ntrain_corpus: {given}\n")
    assert load_settings(tmp_path / "run.yaml").config.train_urls() == urls
    (tmp_path / "empty.yaml").write_text("data_root: /d\n")
    assert load_settings(tmp_path / "empty.yaml", [f"train_corpus={given}"]).config.train_urls() == urls


def test_lists_that_lack_quotes_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data_root: /d\n")
    with pytest.raises(ValueError, match=r"quote a text that contains"):
        load_settings(tmp_path / "run.yaml", ["train_corpus=[/d/x-{000..003}.tar]"])
    expanded = [f"train_corpus=/d/x-{number}.tar" for number in range(4)]  # as a shell does without quotes
    with pytest.raises(ValueError, match=r"train_corpus gives 4 tars.*quote"):
        load_settings(tmp_path / "run.yaml", expanded)


def test_a_pattern_is_refused_with_what_to_write(tars: Path) -> None:
    with pytest.raises(ValueError, match=r"x-\*\.tar is a pattern: give the tars' folder, or a list in braces"):
        read_corpus(f"{tars}/x-*.tar")
