"""Random tars, also damaged ones: every picture is in the index or named, and links are what tarfile says."""

import io
import tarfile

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sharding.media.tar import Damage, LinkError, Locations, TarStream
from sharding.shards.foreign import read_contents

NAMES = st.sampled_from(["a", "b", "d/a", "d.0/c", "./a", "é", "caf\udce9", "._a", ".h", "d/../b"])
ENDINGS = st.sampled_from([".jpg", ".txt", ".png", ".000.jpg", ".001.jpg", ".cls", "", ".JPG"])
KINDS = st.sampled_from(["file", "file", "file", "hard", "soft", "folder"])
MEMBERS = st.lists(
    st.tuples(KINDS, st.builds(str.__add__, NAMES, ENDINGS), NAMES, ENDINGS, st.integers(0, 3)), max_size=9
)
FORMS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURES = [picture(shade) for shade in range(4)]


def tar_of(members: list[tuple], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for kind, name, target, ending, shade in members:
            info = tarfile.TarInfo(name)
            if kind == "file":
                data = b"text" if name.endswith(".txt") else PICTURES[shade]
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.type = {"hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE, "folder": tarfile.DIRTYPE}[kind]
                info.linkname = target + ending
                tar.addfile(info)
    return buffer.getvalue()


@settings(deadline=None, max_examples=150)
@given(MEMBERS, FORMS)
def test_links_lead_where_tarfile_says(members: list[tuple], form: int) -> None:
    data = tar_of(members, form)
    places, links = Locations(), []
    for found in TarStream(io.BytesIO(data)).walk(lambda _: False):
        assert not isinstance(found, Damage)
        places.add(found)
        links += [found] if found.link else []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        known = [info for info in tar if info.islnk() or info.issym()]
        for link, info in zip(links, known, strict=True):
            try:
                expected = tar.extractfile(info)
            except (KeyError, RecursionError):
                continue  # tarfile finds no link whose target comes later; this is more than it does
            if expected is None:
                continue  # a folder
            place = places.target(link)
            assert data[place.offset : place.offset + place.size] == expected.read()


@settings(deadline=None, max_examples=150)
@given(
    MEMBERS, FORMS, st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), max_size=3), st.integers(0, 2**16)
)
def test_every_picture_is_indexed_or_named(
    members: list[tuple], form: int, flips: list[tuple[int, int]], cut: int
) -> None:
    whole = tar_of(members, form)
    data = bytearray(whole)
    for place, change in flips:
        data[place % len(data)] ^= change
    if cut % 4 == 0:
        del data[cut % len(data) :]
    try:
        contents = read_contents(io.BytesIO(bytes(data)), 1.0)
    except ValueError:  # it is not a tar any more
        assert bytes(data) != whole or not members
        return
    places = [offset for row in contents.rows for offset in row["offsets"]]
    pictures = [found for found in TarStream(io.BytesIO(bytes(data))).walk(lambda _: True) if is_picture(found)]
    assert set(places) <= {found.offset for found in pictures} | set(targets(bytes(data)))
    named = {failure["source"] for failure in contents.failures}
    keys = [row["key"] for row in contents.rows]
    assert len(set(keys)) == len(keys)
    for found in pictures:
        key = found.name.removeprefix("./")
        folder, slash, file = key.rpartition("/")
        key = folder + slash + file.partition(".")[0]
        same = any(found.data == other.data for other in pictures if other.offset in places)
        indexed = found.offset in places or (key in keys and (same or contents.remarks))
        assert indexed or key in named or found.name in named or file.startswith("._") or contents.damages
    if bytes(data) == whole:
        assert not contents.damages


def is_picture(found) -> bool:
    return not isinstance(found, Damage) and not found.link and found.name.lower().endswith((".jpg", ".png"))


def targets(data: bytes) -> list[int]:
    places, links = Locations(), []
    for found in TarStream(io.BytesIO(data)).walk(lambda _: False):
        if not isinstance(found, Damage):
            places.add(found)
            links += [found] if found.link else []
    result = []
    for link in links:
        try:
            result.append(places.target(link).offset)
        except LinkError:
            continue
    return result
