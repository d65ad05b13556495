"""Media in tars and zips of any tool: links, names in any encoding, damage, compression; failures are reported."""

import io
import random
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from sharding.media.archives import Archive
from sharding.media.frames import MediaError
from sharding.media.sources import Media
from storage.fetching import Fetching


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", link: str = "", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def opened(path: Path) -> Archive:
    return Archive(str(path), path.parent / "scratch")


def found(path: Path, name: str) -> bytes | str:
    """A member's bytes, or why there are none."""
    try:
        return opened(path).read(name)
    except MediaError as error:
        return str(error)


def test_links_lead_where_tarfile_says(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    names = ["d/hard.jpg", "d/soft.jpg", "e/up.jpg", "chain.jpg", "self.jpg", "early.jpg", "later.jpg", "turn.jpg"]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "early.jpg", link="d/a.jpg", kind=tarfile.SYMTYPE)
        add(tar, "d/a.jpg", b"first")
        add(tar, "d/hard.jpg", link="d/a.jpg", kind=tarfile.LNKTYPE)
        add(tar, "d/soft.jpg", link="a.jpg", kind=tarfile.SYMTYPE)
        add(tar, "e/up.jpg", link="../d/./a.jpg", kind=tarfile.SYMTYPE)
        add(tar, "chain.jpg", link="e/up.jpg", kind=tarfile.SYMTYPE)
        add(tar, "self.jpg", b"self")
        add(tar, "self.jpg", link="self.jpg", kind=tarfile.LNKTYPE)  # a file that GNU tar was given twice
        add(tar, "d/a.jpg", b"second")
        add(tar, "later.jpg", link="d/a.jpg", kind=tarfile.LNKTYPE)
        add(tar, "x" * 200, b"long")
        add(tar, "turn.jpg", link="x" * 200, kind=tarfile.LNKTYPE)
    with tarfile.open(path) as tar:
        expected = {name: tar.extractfile(name).read() for name in names}
    assert {name: found(path, name) for name in names} == expected
    assert (expected["d/hard.jpg"], expected["later.jpg"], expected["self.jpg"]) == (b"first", b"second", b"self")


def test_links_of_pax_tars_and_links_to_folders(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "日/" + "y" * 150, b"x")
        add(tar, "b.jpg", link="日/" + "y" * 150, kind=tarfile.LNKTYPE)
        add(tar, "v1/p.jpg", b"p", kind=tarfile.CONTTYPE)
        add(tar, "latest", link="v1", kind=tarfile.SYMTYPE)
        add(tar, "hard", link="b.jpg", kind=tarfile.LNKTYPE)
    assert [found(path, name) for name in ("b.jpg", "latest/p.jpg", "hard")] == [b"x", b"p", b"x"]


def test_dangling_links_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "gone.jpg", link="../none.jpg", kind=tarfile.SYMTYPE)
        add(tar, "one.jpg", link="two.jpg", kind=tarfile.SYMTYPE)
        add(tar, "two.jpg", link="one.jpg", kind=tarfile.SYMTYPE)
    assert found(path, "gone.jpg") == "gone.jpg in a.tar is a link to ../none.jpg, which is not in the archive"
    assert found(path, "one.jpg") == "one.jpg in a.tar is a link that leads to itself"
    assert found(path, "three.jpg") == "not in the archive a.tar"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "shift_jis", "utf-8"])
def test_names_in_any_encoding(tmp_path: Path, encoding: str, form: int) -> None:
    name = "café.jpg" if encoding == "latin-1" else "日本.jpg"
    if form == tarfile.PAX_FORMAT:  # as GNU tar and star write such names: the bytes as they are
        long = "d" * 120 + "/"
        record = b"path=" + (long + name).encode(encoding) + b"\n"
        length = next(n for n in range(1000) if n == len(str(n)) + 1 + len(record))
        with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            add(tar, "pax", str(length).encode() + b" " + record, kind=tarfile.XHDTYPE)
            add(tar, "short", b"here")
            add(tar, "0.jpg", b"zero")
        name = long + name
    else:
        with tarfile.open(tmp_path / "a.tar", "w", format=form, encoding=encoding) as tar:
            add(tar, name, b"here")
            add(tar, "0.jpg", b"zero")
    assert [found(tmp_path / "a.tar", each) for each in ("0.jpg", name)] == [b"zero", b"here"]


def test_members_around_damage_are_found_and_the_damage_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            add(tar, f"{number}.jpg", bytes([number]) * 700)
    data = bytearray(path.read_bytes())
    data[1536 + 20] ^= 1
    path.write_bytes(data[: 3 * 1536 + 600])
    assert [found(path, f"{number}.jpg") for number in (0, 2)] == [bytes([number]) * 700 for number in (0, 2)]
    for name in ("1.jpg", "3.jpg"):
        assert found(path, name) == "not in the archive a.tar, which is damaged at byte 1536 (damaged tar header)"


def test_an_absurd_member_size_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar, "0.jpg", b"zero")
        add(tar, "pax", b"29 size=" + b"9" * 20 + b"\n", kind=tarfile.XHDTYPE)
        add(tar, "1.jpg", b"one")
    assert found(path, "0.jpg") == b"zero"
    assert "ends inside 1.jpg" in found(path, "1.jpg")
    next((tmp_path / "scratch").glob("*.arrow")).unlink()
    info = tarfile.TarInfo("1.jpg")
    info.size = 2**80
    path.write_bytes(path.read_bytes()[:1024] + info.tobuf(tarfile.GNU_FORMAT))
    assert found(path, "0.jpg") == b"zero"
    assert "ends inside 1.jpg" in found(path, "1.jpg")


@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_files_are_reported_and_other_members_are_read(tmp_path: Path, form: str) -> None:
    rng = random.Random(0)
    with open(tmp_path / "0.jpg", "wb") as file:
        for part in range(40):  # more parts than a header has room for
            file.seek(part * 65536)
            file.write(rng.randbytes(512))
    (tmp_path / "1.jpg").write_bytes(b"whole")
    kind = ["--format=gnu"] if form == "gnu" else ["--format=posix", f"--sparse-version={form}"]
    subprocess.run(["tar", "-cSf", "a.tar", *kind, "0.jpg", "1.jpg"], cwd=tmp_path, check=True)
    assert found(tmp_path / "a.tar", "1.jpg") == b"whole"
    assert found(tmp_path / "a.tar", "0.jpg") == "0.jpg in a.tar is stored as a sparse file: unpack the archive first"


def test_listing_members_skips_their_data(tmp_path: Path) -> None:
    path = tmp_path / "large.tar"
    with open(path, "wb") as file:  # 40 GB of holes
        for number in range(4):
            info = tarfile.TarInfo(f"{number}.mp4")
            info.size = 10**10
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.seek(info.size + -info.size % 512, 1)
        file.write(bytes(1024))
    assert [opened(path).member(f"{number}.mp4").size for number in range(4)] == [10**10] * 4


def test_zips_of_every_method_that_python_reads(tmp_path: Path) -> None:
    data = b"photo " * 1000
    methods = {"stored": 0, "deflated": 8, "bzip2": 12, "lzma": 14}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, method in methods.items():
            file.writestr(zipfile.ZipInfo(f"{name}.jpg"), data, method)
    assert {name: found(tmp_path / "a.zip", f"{name}.jpg") for name in methods} == dict.fromkeys(methods, data)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (10, 9, "is compressed with deflate64"),
        (10, 97, "is compressed with WavPack"),
        (10, 77, "is compressed with method 77"),
        (8, 1, "is encrypted"),
    ],
)
def test_unsupported_members_are_reported_and_others_are_read(
    tmp_path: Path, field: int, value: int, reason: str
) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("0.jpg", b"x" * 100)
        file.writestr("1.jpg", b"y" * 100)
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + field] = value
    path.write_bytes(data)
    assert found(path, "0.jpg") == f"0.jpg in a.zip {reason}: unpack the archive first"
    assert found(path, "1.jpg") == b"y" * 100


def test_names_and_offsets_in_zips(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    extra = b"\xfe\xca" + (3000).to_bytes(2, "little") + bytes(3000)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("dir\\b.jpg", b"back")
        file.writestr("日本.jpg", b"flag")
        file.writestr("../up.jpg", b"up")
        info = zipfile.ZipInfo("long.jpg")
        info.extra = extra
        file.writestr(info, b"extra")
        file.comment = b"c" * 1000
    path.write_bytes(b"#!/bin/sh\n" * 100 + path.read_bytes())  # of an archive that unpacks itself
    names = {"dir/b.jpg": b"back", "dir\\b.jpg": b"back", "日本.jpg": b"flag", "../up.jpg": b"up", "long.jpg": b"extra"}
    assert {name: found(path, name) for name in names} == names


def test_a_name_with_a_wrong_utf8_flag_affects_no_other_member(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("é.jpg", b"here")
        file.writestr("日本.jpg", b"flag")
    data = (tmp_path / "a.zip").read_bytes().replace("é.jpg".encode(), "éé.jpg".encode("latin-1"))
    (tmp_path / "a.zip").write_bytes(data)
    assert [found(tmp_path / "a.zip", name) for name in ("éé.jpg", "日本.jpg")] == [b"here", b"flag"]


@pytest.mark.parametrize(("name", "encoding"), [("é.jpg", "cp437"), ("日本.jpg", "cp932"), ("日本.jpg", "utf-8")])
def test_names_in_zips_without_the_flag(tmp_path: Path, name: str, encoding: str) -> None:
    raw = name.encode(encoding)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("x" * len(raw), b"here")
    data = (tmp_path / "a.zip").read_bytes().replace(b"x" * len(raw), raw)
    (tmp_path / "a.zip").write_bytes(data)
    assert found(tmp_path / "a.zip", name) == b"here"


@pytest.mark.parametrize("place", ["a.tar.gz/0.jpg", "a.tgz/0.jpg", "b.tar/0.jpg"])
def test_compressed_tars_among_the_media_are_reported(tmp_path: Path, place: str) -> None:
    for name in ("a.tar.gz", "a.tgz", "b.tar"):
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            add(tar, "0.jpg", b"zero")
    with Media(str(tmp_path), "image", tmp_path / "scratch", Fetching()) as media:
        ((_, reason),) = media.fetched([place])
    assert f"{place.split('/')[0]} is compressed as a whole (gzip): unpack it" in str(reason)


def test_reasons_contain_no_object_addresses() -> None:
    assert str(MediaError(f"no picture: {io.BytesIO()}")) == "no picture: <_io.BytesIO object>"
