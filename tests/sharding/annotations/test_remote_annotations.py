"""Annotations on S3, GCS and web servers with failing requests: the rows are those of the local files."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_proxy import Faults
from object_stores import STORES, MakeFaulty, Store

from sharding.annotations import files as annotation_files
from sharding.annotations.config import Reading
from sharding.annotations.reading import expanded, read_rows
from sharding.shards.output import digest_of

NAMES = ["a.json", "b.jsonl", "c.csv", "d.parquet", "e.json.gz"]


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    records = [{"image": f"{number}.jpg", "caption": f"caption,\nnumber {number} " * 8} for number in range(3000)]
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(records))
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    with open(folder / "c.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption"])
        writer.writeheader()
        writer.writerows(records)
    pq.write_table(pa.Table.from_pylist(records), folder / "d.parquet")
    (folder / "e.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    return folder


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_rows_are_complete_when_requests_fail(
    tables: Path, store: Store, faulty: MakeFaulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotation_files, "BLOCK", 2**18)
    store.fill(tables, "tables")
    proxy = faulty(store, Faults(error=0.1, cut=0.1, seed=1))
    expected = list(read_rows([str(tables / "a.json")], Reading()))
    for name in NAMES:
        url = store.url(f"tables/{name}", proxy)
        assert list(read_rows([url], Reading())) == expected, name
        assert digest_of([url]) == digest_of([str(tables / name)])
    assert proxy.counts()["error"] + proxy.counts()["cut"] > 0


@pytest.mark.parametrize("store", ["s3", "gcs"], indirect=True)
def test_patterns_find_files_in_a_bucket(tables: Path, store: Store) -> None:
    store.fill(tables, "tables")
    assert expanded([store.url("tables/[a-c].*")]) == [store.url(f"tables/{name}") for name in NAMES[:3]]


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_missing_or_forbidden_file_is_reported(tables: Path, store: Store, faulty: MakeFaulty) -> None:
    store.fill(tables, "tables")
    url = store.url("tables/nothing.json")
    with pytest.raises(FileNotFoundError, match=r"annotation file .*nothing.json does not exist: check --annotations"):
        expanded([url])
    proxy = faulty(store, Faults(permanent="a.json", permanent_status=403))
    url = store.url("tables/a.json", proxy)
    with pytest.raises(OSError, match=r"cannot read annotations from .*a.json") as error:
        list(read_rows(expanded([url]), Reading()))
    assert "\n" not in str(error.value)
