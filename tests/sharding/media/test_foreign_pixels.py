"""Pictures of other tools' shards are shown as packing would store them, by both decoders, side by side with others."""

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pictures import photo, saved
from PIL import Image

from loaders.decode.cpu import CpuDecoder
from loaders.decode.dali import DaliDecoder
from loaders.decode.decoder import Decoder
from loaders.samples import Clip, Window
from sharding.media.frames import MediaError
from sharding.media.picture import decode_picture
from sharding.shards.indexing import index_shards
from sharding.shards.schema import read_corpus, read_index
from sharding.shards.verification import verify_corpus

SIZE = 32


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def pictures() -> dict[str, bytes]:
    """File of each kind by its name in a tar."""
    plain, alpha = saved(photo()), photo().convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    deep = Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257)
    clear = photo().convert("RGBA")
    clear.putalpha(0)
    found = {f"turned{n}.jpg": saved(photo(), exif=turned_by(n)) for n in (2, 3, 4, 5, 6, 7, 8)}
    found |= {f"turned{n}.png": saved(photo(), "PNG", exif=turned_by(n)) for n in (3, 6)}
    found |= {f"turned{n}.webp": saved(photo(), "WEBP", lossless=True, exif=turned_by(n)) for n in (3, 6)}
    return found | {
        "plain.jpg": plain,
        "progressive.jpg": saved(photo(), progressive=True),
        "grey.jpg": saved(photo().convert("L")),
        "cmyk.jpg": saved(photo().convert("CMYK")),
        "tail.jpg": plain + b"\0\0\0\x18ftypmp42" * 900,
        "extraneous.jpg": plain[:-2] + b"\x12\x34" + plain[-2:],
        "rgb.png": saved(photo(), "PNG"),
        "grey16.png": saved(deep, "PNG"),
        "alpha.png": saved(alpha, "PNG"),
        "clear.png": saved(clear, "PNG"),
        "palette.png": saved(photo().quantize(16), "PNG", transparency=2),
        "alpha.webp": saved(alpha, "WEBP", lossless=True),
        "rgb.webp": saved(photo(), "WEBP", lossless=True),
    }


def clip_of(data: bytes, old_index: bool = False) -> Clip:
    height, width = decode_picture(data).pixels.shape[:2]
    height, width = (width, height) if old_index else (height, width)
    return Clip([data], height, width, Window(4, 2, height - 8, width - 4, True))


def expected(data: bytes) -> np.ndarray:
    """What is shown of `clip_of` (S, S, 3)."""
    pixels = decode_picture(data).pixels[:, ::-1]
    height, width = pixels.shape[:2]
    crop = np.ascontiguousarray(pixels[4 : height - 4, 2 : width - 2])
    return np.asarray(Image.fromarray(crop).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


@pytest.fixture(params=["cpu", "dali"])
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    made = CpuDecoder(SIZE, 1, True) if request.param == "cpu" else DaliDecoder(SIZE, 1, True, None)
    yield made
    made.close()


def test_all_kinds_in_one_batch_are_shown_as_packing_stores_them(decoder: Decoder) -> None:
    found = pictures()
    frames, bad = decoder.decode([clip_of(data) for data in found.values()])
    assert not bad
    for shown, (name, data) in zip(frames.numpy()[:, 0].astype(int), found.items()):
        assert np.abs(shown - expected(data)).mean() < 3, name


def test_undecodable_pictures_are_bad_samples(decoder: Decoder) -> None:
    plain, cmyk = saved(photo()), saved(photo().convert("CMYK"))
    turned = saved(photo(), exif=turned_by(3))
    whole = clip_of(plain)
    broken = [plain[:-300], plain[:-300] + plain, cmyk[:-300], turned[:-300], saved(photo(), "PNG")[:-200], b"<html>"]
    broken.append(saved(Image.fromarray(np.full((48, 64), 70_000, np.int32)), "TIFF"))
    frames, bad = decoder.decode([*(whole._replace(jpegs=[data]) for data in broken), whole])
    assert set(bad) == set(range(len(broken)))
    assert np.abs(frames.numpy()[-1, 0].astype(int) - expected(plain)).mean() < 3
    for data in broken:
        with pytest.raises(MediaError):
            decode_picture(data)


def test_an_index_with_sizes_before_rotation_still_works(decoder: Decoder) -> None:
    on_their_side = [saved(photo(), exif=turned_by(6)), saved(photo(), "WEBP", exif=turned_by(8))]
    frames, bad = decoder.decode([clip_of(data, old_index=True) for data in on_their_side])
    assert not bad
    for shown, data in zip(frames.numpy()[:, 0].astype(int), on_their_side):
        upright = decode_picture(data).pixels[:, ::-1]
        crop = np.ascontiguousarray(upright[2:-2, 4:-4])
        whole = np.asarray(Image.fromarray(crop).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        assert np.abs(shown - whole).mean() < 3
    _, bad = decoder.decode([clip_of(saved(photo()), old_index=True)])
    assert "64x48 pixels, the index has 48x64" in bad[0]


def test_the_index_has_upright_sizes_and_verify_agrees(tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in pictures().items():
            info = tarfile.TarInfo(name.replace(".", "_") + "." + name.partition(".")[2])
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_shards(str(folder))
    rows = {row["key"]: row for row in read_index(read_corpus(str(folder)), 0).to_pylist()}
    assert len(rows) == len(pictures())
    for name, data in pictures().items():
        row = rows[name.replace(".", "_")]
        assert (row["height"], row["width"]) == decode_picture(data).pixels.shape[:2], name
    assert not verify_corpus(str(folder), decode=True)


def test_a_decoding_process_starts_without_pyav() -> None:
    """Its memory is multiplied by the processes, and it decodes pictures only."""
    program = "import sys, loaders.decode.worker; sys.exit('av' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
