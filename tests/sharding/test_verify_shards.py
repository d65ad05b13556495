"""Verifying: any changed byte is found with its offset, truncated and missing files are reported; repairs."""

import io
import json
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from packed import contents
from PIL import Image

from sharding.build import build_corpus
from sharding.shards.failures import read_failures
from sharding.shards.indexing import index_shards
from sharding.shards.schema import Corpus, ShardInfo, read_corpus, read_index
from sharding.shards.verification import verify_corpus
from sharding.verify import main


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 small photos in three shards, two of the photos broken."""
    root = tmp_path_factory.mktemp("verify")
    (root / "media").mkdir()
    for number in range(150):
        noise = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(noise).save(root / "media" / f"{number}.jpg", quality=50)
    (root / "media" / "5.jpg").write_bytes(b"")
    (root / "media" / "140.jpg").write_text("<html>")
    records = [{"image": f"{number}.jpg", "caption": [f"photo {number}", "noise"]} for number in range(150)]
    (root / "a.json").write_text(json.dumps(records))
    build_corpus([str(root / "a.json")], str(root / "media"), "image", str(root / "photos"), size=16, workers=1)
    return root / "photos"


@pytest.fixture
def corpus(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "photos"))


def flip(file: Path, place: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def test_a_sound_corpus_has_no_faults(clips: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(clips)
    assert main([str(clips), "--decode"]) == 0
    assert "no faults" in capsys.readouterr().out
    assert main([str(clips), "--repair", "--workers", "2"]) == 0
    assert contents(clips) == before
    assert not verify_corpus(str(corpus), decode=True)
    assert main([str(corpus / "nothing")]) == 2


@pytest.mark.parametrize("times", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_any_flipped_bit_in_any_file_is_found(packed: Path, corpus: Path, times: int) -> None:
    rng = random.Random(times)
    files = sorted(path for path in corpus.iterdir() if path.is_file())
    assert {path.name.split(".", 1)[1] for path in files} == {"tar", "parquet", "json"}
    for file in files:
        for _ in range(times):
            place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
            flip(file, place, bit)
            faults = verify_corpus(str(corpus))
            assert faults, f"{file.name}, byte {place}, bit {bit}"
            assert {fault.file for fault in faults} == {file.name}
            flip(file, place, bit)
    assert contents(corpus) == contents(packed)
    assert not verify_corpus(str(corpus))


@pytest.mark.parametrize("step", [17, pytest.param(3, marks=pytest.mark.slow)])
def test_a_flipped_byte_is_reported_with_its_offset(corpus: Path, step: int) -> None:
    shard = sorted(corpus.glob("*.tar"))[0]
    with tarfile.open(shard) as tar:
        members = tar.getmembers()[:2]
    end = members[-1].offset_data + 512 * (1 + members[-1].size // 512)
    assert members[0].size % 512  # so that there is padding
    rng = random.Random(1)
    for place in range(0, end, step):
        bit = rng.randrange(8)
        flip(shard, place, bit)
        faults = verify_corpus(str(corpus))
        assert faults
        for fault in faults:
            assert fault.file == shard.name
            if fault.offset >= 0:
                inside = [m for m in members if m.offset <= place < m.offset_data + -(-m.size // 512) * 512]
                assert inside[0].offset <= fault.offset <= place
        flip(shard, place, bit)


@pytest.mark.parametrize("name", ["photos-000001.tar", "photos-000001.parquet", "failures.parquet", "corpus.json"])
def test_any_truncation_is_found(corpus: Path, name: str) -> None:
    file = corpus / name
    whole = file.read_bytes()
    rng = random.Random(2)
    for length in [0, 1, len(whole) - 1, len(whole) - 512, *(rng.randrange(len(whole)) for _ in range(4))]:
        file.write_bytes(whole[:length])
        faults = verify_corpus(str(corpus))
        assert name in {fault.file for fault in faults}, length
    file.write_bytes(whole + b"\0")
    assert name in {fault.file for fault in verify_corpus(str(corpus))}


def test_a_truncated_shard_is_reported_with_the_number_of_lost_samples(corpus: Path) -> None:
    shard = corpus / "photos-000000.tar"
    row = read_index(read_corpus(str(corpus)), 0).to_pylist()[60]
    shard.write_bytes(shard.read_bytes()[: row["offsets"][0] + 3])
    faults = verify_corpus(str(corpus))
    lost = next(fault for fault in faults if "samples from here on are missing" in fault.reason)
    assert (lost.key, lost.offset) == (row["key"], row["offsets"][0])
    assert lost.reason.startswith("3 samples")  # 63 of 64 were packed
    assert len(faults) < 5


def test_missing_and_extra_files_are_reported(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "photos-000001.tar").rename(corpus / "photos-000007.tar")
    (corpus / "photos-000002.parquet").unlink()
    (corpus / "failures.parquet").unlink()
    (corpus / "notes.txt").write_text("mine")
    assert main([str(corpus), "--workers", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "photos-000001.tar: is missing" in lines
    assert "photos-000007.tar: is not in corpus.json" in lines
    assert "photos-000002.parquet: is missing" in lines
    assert "failures.parquet: is missing" in lines
    assert not any("notes.txt" in line for line in lines)


def test_an_index_that_contradicts_the_tar_is_found_though_every_checksum_fits(corpus: Path) -> None:
    """A shard whose index is another's: both whole, both with the sums that corpus.json says."""
    known = read_corpus(str(corpus))
    one, other = known.shards[:2]
    shutil.copy(corpus / other.index_name, corpus / one.index_name)
    mixed = {**vars(one), "index_bytes": other.index_bytes, "index_sha256": other.index_sha256}
    mixed |= {unit: getattr(other, unit) for unit in ("samples", "frames", "captions")}
    write_description(corpus, known, (ShardInfo(**mixed), *known.shards[1:]))
    faults = verify_corpus(str(corpus))
    assert {fault.file for fault in faults} == {one.name}
    assert any(fault.key == "000001000000" for fault in faults)
    assert any("not in the index" in fault.reason for fault in faults)


def write_description(folder: Path, known: Corpus, shards: tuple[ShardInfo, ...]) -> None:
    corpus = Corpus(known.url, known.name, known.media_type, shards, known.settings, known.files)
    (folder / "corpus.json").write_text(corpus.to_json())


def test_edited_totals_are_found(corpus: Path) -> None:
    file = corpus / "corpus.json"
    file.write_text(file.read_text().replace('"samples": 148', '"samples": 149', 1))
    assert [fault.file for fault in verify_corpus(str(corpus))] == ["corpus.json"]


def test_only_decode_finds_a_picture_that_was_packed_broken(corpus: Path, tmp_path: Path) -> None:
    """A tar of another tool may hold a JPEG that is broken inside; its CRC-32 fits."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(picture, "JPEG")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in (("a.jpg", picture.getvalue()), ("b.jpg", picture.getvalue()[:-900])):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_shards(str(folder))
    assert not verify_corpus(str(folder))
    (fault,) = verify_corpus(str(folder), decode=True)
    assert (fault.file, fault.key) == ("0.tar", "b")
    assert fault.offset == 1024 + 512 * (1 + len(picture.getvalue()) // 512)


@pytest.mark.parametrize("workers", [1, 2])
def test_repair_rebuilds_everything_from_intact_tars(corpus: Path, packed: Path, capsys, workers: int) -> None:
    flip(corpus / "photos-000000.parquet", 700)
    (corpus / "photos-000002.parquet").unlink()
    flip(corpus / "corpus.json", 100)
    assert main([str(corpus), "--repair", "--workers", str(workers)]) == 0
    out = capsys.readouterr().out
    assert "repaired: photos-000000.parquet rebuilt from photos-000000.tar" in out
    assert "repaired: photos-000002.parquet rebuilt from photos-000002.tar" in out
    assert "repaired: corpus.json rebuilt: 3 shards, 148 samples" in out
    before, after = read_corpus(str(packed)), read_corpus(str(corpus))
    for shard in range(3):
        assert read_index(after, shard).equals(read_index(before, shard))
    assert [shard.sha256 for shard in after.shards] == [shard.sha256 for shard in before.shards]
    assert (after.name, after.settings, after.media_type) == (before.name, before.settings, before.media_type)
    assert not verify_corpus(str(corpus), decode=True)


@pytest.mark.parametrize("name", ["corpus.json", "failures.parquet"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_corpus_json_and_failures_are_repaired_to_the_byte(corpus: Path, packed: Path, name: str, how: str) -> None:
    file = corpus / name
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        flip(file, file.stat().st_size // 2)
    assert main([str(corpus), "--repair"]) == 0
    assert contents(corpus) == contents(packed)
    assert [row["source"] for row in read_failures(str(corpus))] == ["5.jpg", "140.jpg"]


def test_repair_reports_a_damaged_tar(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = read_index(read_corpus(str(corpus)), 1).to_pylist()[3]
    flip(corpus / "photos-000001.tar", row["offsets"][0] + 100)
    (corpus / "photos-000002.parquet").unlink()
    (corpus / "corpus.json").unlink()
    assert main([str(corpus), "--repair"]) == 1
    out = capsys.readouterr().out
    place = f"photos-000001.tar: {row['key']}: byte {row['offsets'][0]}: frame 0: CRC-32"
    assert f"cannot be repaired: {place}" in out
    assert "run the same sharding.build again" in out
    assert [shard.name for shard in read_corpus(str(corpus)).shards] == [f"photos-00000{n}.tar" for n in range(3)]
    assert main([str(corpus), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [(fault["file"], fault["key"]) for fault in found["faults"]] == [("photos-000001.tar", row["key"])]


def test_rebuilding_a_damaged_shard_restores_its_bytes(corpus: Path, packed: Path) -> None:
    flip(corpus / "photos-000001.tar", 5000)
    (corpus / "photos-000001.parquet").unlink()
    files = [str(packed.parent / "a.json")]
    build_corpus(files, str(packed.parent / "media"), "image", str(corpus), name="photos", size=16, workers=1)
    assert contents(corpus) == contents(packed)


def test_a_missing_shard_is_found_without_corpus_json(corpus: Path) -> None:
    (corpus / "corpus.json").unlink()
    (corpus / "photos-000001.tar").unlink()
    (corpus / "photos-000001.parquet").unlink()
    assert "shard 000001" in {fault.file for fault in verify_corpus(str(corpus))}


def test_repair_keeps_the_name_of_an_indexed_corpus_whose_description_is_damaged(clips: Path, tmp_path: Path) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for tar in clips.glob("*.tar"):
        shutil.copy(tar, tars / tar.name)
    known = replace(index_shards(str(tars), fps=4), name="my clips", settings={"indexed": True, "from": "elsewhere"})
    (tars / "corpus.json").write_text(known.to_json().replace('"frames": ', '"frames": 1'))
    with pytest.raises(ValueError, match="does not match its own checksum"):
        read_corpus(str(tars))
    assert main([str(tars), "--repair"]) == 0
    again = read_corpus(str(tars))
    assert (again.name, again.settings, again.shards) == (known.name, known.settings, known.shards)
