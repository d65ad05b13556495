"""Damaged clips: each is packed or refused by name; none crashes, hangs or raises anything else."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from ffmpeg_frames import ffmpeg

H264 = ["-c:v", "libx264", "-g", "10", "-preset", "ultrafast"]
FORMS = {
    **dict.fromkeys(("mp4", "mkv", "ts", "flv"), H264),
    "webm": ["-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8"],
    "avi": ["-c:v", "mpeg4"],
    "gif": ["-c:v", "gif"],
}
SLOWEST = 20  # seconds that one clip may take

# Packs files named on its input, one after the other; says what became of each on one line.
CHILD = """
import mmap, sys
from sharding.media.frames import MediaError
from sharding.media.video import pack_video
for line in sys.stdin:
    name, start = line.split()
    with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            frames = pack_video(data, 32, 90, 2, 500, float(start))
            print("packed", len(frames.jpegs), frames.width, frames.height, flush=True)
        except MediaError as error:
            print("refused", str(error).replace(chr(10), " "), flush=True)
"""


def mutated(data: bytes, seed: int) -> bytes:
    """A copy with flipped bits, cut, or with bytes put in, left out or doubled."""
    chance = random.Random(seed)
    changed = bytearray(data)
    # Headers are at both ends; they are hit as often as all the rest.
    place = chance.choice(
        [chance.randrange(len(data)), chance.randrange(min(1500, len(data))), -chance.randrange(1, 1500)]
    )
    place %= len(data)
    kind = seed % 5
    if kind == 0:
        for _ in range(chance.choice([1, 1, 3, 30])):
            changed[(place + chance.randrange(200)) % len(data)] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del changed[place:]
    elif kind == 2:
        changed[place:place] = chance.randbytes(chance.choice([1, 4, 100]))
    elif kind == 3:
        del changed[place : place + chance.choice([1, 4, 500])]
    else:
        for number in range(4):
            changed[(place + number) % len(data)] = chance.choice([0, 255, 127])
    return bytes(changed)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    source = ["-f", "lavfi", "-i", "testsrc2=s=64x36:r=10:d=8", "-f", "lavfi", "-i", "sine=d=8"]
    for form, codec in FORMS.items():
        ffmpeg(*source, *codec, folder / f"a.{form}")
    return {form: (folder / f"a.{form}").read_bytes() for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_damage_is_packed_or_refused(clips: dict[str, bytes], tmp_path: Path, form: str, count: int) -> None:
    """In a process of its own, which says what became of each clip, packed from a second on."""
    lines = []
    for seed in range(count):
        path = tmp_path / f"{seed}.{form}"
        path.write_bytes(mutated(clips[form], seed) or b"x")
        lines.append(f"{path} {6.0 if seed % 4 == 3 else 0.0}\n")
    words = [sys.executable, "-c", CHILD]
    done = subprocess.run(words, input="".join(lines), capture_output=True, text=True, timeout=SLOWEST + count)
    told = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[min(len(told), count - 1)]}: {done.stderr[-2000:]}"
    assert len(told) == count
    for clip, line in zip(lines, told, strict=True):
        assert line.startswith(("packed", "refused")), f"{clip}: {line}"
