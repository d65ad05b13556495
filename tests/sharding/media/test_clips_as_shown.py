"""A clip is stored as players show it: its stream, times, proportions, orientation; nothing but its file is read."""

import io
import json
import time
import zlib
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from ffmpeg_frames import difference, ffmpeg, shown_frames, step_of
from PIL import Image

from sharding.build import build_corpus
from sharding.media.clock import Clock
from sharding.media.frames import MediaError
from sharding.media.video import pack_video
from sharding.shards.schema import read_index

SECONDS = 12
H264 = ["-c:v", "libx264", "-g", "25", "-bf", "2", "-preset", "ultrafast"]
CODECS = {
    "mp4": H264,
    "mkv": H264,
    "ts": H264,
    "h264": H264,
    "refresh.mp4": [*H264, "-x264-params", "intra-refresh=1:keyint=25"],
    "avi": ["-c:v", "mpeg4", "-bf", "2"],
    "h264.avi": H264,
    "flv": H264,
    "mpg": ["-c:v", "mpeg2video", "-bf", "2"],
    "webm": ["-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8"],
    "ivf": ["-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", "8"],
    "hevc": ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=error:keyint=25"],
    "mjpeg": ["-c:v", "mjpeg", "-r", "25", "-f", "mjpeg"],
    "gif": ["-c:v", "gif"],
    "wrap.ts": [*H264, "-output_ts_offset", "95438"],  # the 33-bit clock starts again after 5.7 s
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.mp4, a.mkv ...: the same moving picture in many containers."""
    place = tmp_path_factory.mktemp("clips")
    picture = ["-f", "lavfi", "-i", f"testsrc2=s=64x36:r=10:d={SECONDS}"]
    for name, codec in CODECS.items():
        ffmpeg(*picture, *codec, place / f"a.{name}")
    return place


def packed(path: Path, fps: float = 5, start: float = 0.0, end: float = float("inf"), size: int = 36) -> list[bytes]:
    return pack_video(path.read_bytes(), size, 90, fps, 0, start, end).jpegs


@pytest.mark.parametrize("name", CODECS)
def test_a_part_has_the_frames_of_the_whole_clip(folder: Path, name: str) -> None:
    path = folder / f"a.{name}"
    whole = packed(path)
    assert len(whole) == 5 * SECONDS
    assert len(set(whole)) > 55  # no two seconds look the same
    for start, end in [(0, 2), (3, 5), (5.4, 7), (10, 11.6), (11, 30)]:
        assert packed(path, 5, start, end) == whole[round(start * 5) : round(end * 5)], (start, end)
    for end, lasts in [(10, 2), (30, 4)]:
        capped = pack_video(path.read_bytes(), 36, 90, 5, 3, 8, end)
        assert capped.jpegs == whole[40:43]
        assert capped.duration == pytest.approx(lasts, abs=0.11)
    with pytest.raises(MediaError, match="no frame at 12 seconds or later"):
        packed(path, 5, 12, 13)


def test_parts_of_one_clip_are_packed_as_if_alone(folder: Path, tmp_path: Path) -> None:
    spans = [(6, 8), (0, 2), (7, 9.5), (20, 21), (0, 2.4), (10, 12)]  # out of order, overlapping, one that is not there
    names = ["a.mp4", "a.mkv", "a.avi", "a.webm", "a.ts", "a.gif"]
    records = [{"video": name, "start": a, "end": b, "caption": "x"} for name in names for a, b in spans]
    (tmp_path / "a.json").write_text(json.dumps(records))
    options = {"size": 36, "fps": 2, "quality": 90, "workers": 1, "max_failures": 1.0}
    corpus = build_corpus([str(tmp_path / "a.json")], str(folder), "video", str(tmp_path / "out"), **options)
    tables = [read_index(corpus, shard) for shard in range(len(corpus.shards))]
    rows = {row["source"]: row["crc32s"] for table in tables for row in table.to_pylist()}
    failures = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    assert {row["reason"] for row in failures} == {"no frame at 20 seconds or later"}
    assert (len(rows), len(failures)) == (30, 6)
    for name in names:
        for start, end in spans:
            if start < SECONDS:
                alone = [zlib.crc32(jpeg) for jpeg in packed(folder / name, 2, start, end)]
                assert rows[f"{name}#t={start},{end}"] == alone


def shifted(folder: Path, seconds: float) -> bytes:
    path = folder / f"shifted{seconds}.ts"
    ffmpeg("-i", folder / "a.ts", "-c", "copy", "-output_ts_offset", seconds, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("clocks", "seconds"),
    [
        ([0, 0, 0], 36),  # begins anew
        ([0, 3000], 24),  # a jump
        ([1000, 0, 7], 36),  # back, then a little ahead
        ([0, 6], 24),  # an overlap
        ([0, 18], 30),  # 6 seconds without a picture are a pause
        ([95438, 95438], 24),  # the 33-bit clock starts again, twice
    ],
    ids=str,
)
def test_a_clock_that_jumps_goes_on(folder: Path, tmp_path: Path, clocks: list[float], seconds: float) -> None:
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(shifted(folder, clock) for clock in clocks))
    whole = pack_video(path.read_bytes(), 36, 90, 5)
    assert whole.duration == pytest.approx(seconds, abs=0.21)
    assert len(whole.jpegs) == pytest.approx(whole.duration * 5, abs=1)
    assert pack_video(path.read_bytes(), 36, 90, 5, 0, 13, 15).jpegs == whole.jpegs[65:75]
    assert pack_video(path.read_bytes(), 36, 90, 5, 4).duration == pytest.approx(whole.duration, abs=0.11)
    check_against_ffmpeg(path, 5)


def test_two_program_streams_one_behind_the_other(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "joined.mpg"
    path.write_bytes((folder / "a.mpg").read_bytes() * 2)
    check_against_ffmpeg(path, 5)
    assert len(packed(path)) == 120


def test_a_pause_is_real_where_the_clock_cannot_jump(tmp_path: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x36:r=10:d=2,setpts=PTS+if(gte(N\\,10)\\,600/TB)", *H264,
           "-fps_mode", "vfr", tmp_path / "pause.mp4")  # fmt: skip
    whole = pack_video((tmp_path / "pause.mp4").read_bytes(), 36, 90, 1)
    assert whole.duration == pytest.approx(602, abs=0.2)
    assert len(set(whole.jpegs)) == 3


def test_a_long_pause_between_reordered_frames_is_real(tmp_path: Path) -> None:
    choice = "testsrc2=s=64x36:r=10:d=20,setpts=PTS+if(gte(N\\,50)\\,12/TB)"
    for name in ("a.ts", "a.mkv"):
        ffmpeg("-f", "lavfi", "-i", choice, *H264, "-fps_mode", "vfr", tmp_path / name)
    whole = pack_video((tmp_path / "a.ts").read_bytes(), 36, 90, 5)
    assert whole.duration == pytest.approx(32)
    assert len(set(whole.jpegs)) == 101  # none is lost; the last one before the pause is an odd one
    assert packed(tmp_path / "a.mkv") == whole.jpegs


def check_against_ffmpeg(path: Path, fps: float) -> None:
    """The stored frames are those that the ffmpeg program shows at their times."""
    stored = pack_video(path.read_bytes(), 36, 95, fps)
    frames, seconds = shown_frames(path, stored.width, stored.height)
    for moment, jpeg in zip(stored.times, stored.jpegs, strict=True):
        shown = frames[np.searchsorted(seconds, moment + 1e-3, side="right") - 1].astype(int)
        assert difference(simplejpeg.decode_jpeg(jpeg, "RGB") - shown) < 5, moment


@pytest.mark.parametrize("words", [("-ss", "1.3"), ("-ss", "7.9"), ("-ss", "6.2", "-t", "3"), ("-itsoffset", "2.5")])
def test_an_edit_list_decides_what_is_shown(folder: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    path = tmp_path / "edited.mp4"
    ffmpeg(*words, "-i", folder / "a.mp4", "-c", "copy", path)
    assert b"elst" in path.read_bytes()
    whole = pack_video(path.read_bytes(), 36, 95, 10)
    _, seconds = shown_frames(path, whole.width, whole.height)
    assert whole.duration == pytest.approx(seconds[-1] + step_of(seconds), abs=0.051)
    check_against_ffmpeg(path, 10)
    assert pack_video(path.read_bytes(), 36, 95, 10, 0, 1.5, 2.5).jpegs == whole.jpegs[15:25]


def held(folder: Path, name: str) -> Path:
    """Five frames 0.1 s apart, the last one shown for 3 s."""
    if name.endswith((".gif", ".png")):
        pictures = [Image.new("RGB", (64, 36), (40 * number, 99, 20)) for number in range(5)]
        options = {"save_all": True, "append_images": pictures[1:], "duration": [100] * 4 + [3000]}
        pictures[0].save(folder / name, **options)
        return folder / name
    with av.open(str(folder / name), "w") as container:
        stream = container.add_stream("libvpx" if name.endswith("webm") else "mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 36, "yuv420p"
        packets = []
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((36, 64, 3), 40 * number, np.uint8), "rgb24")
            frame.pts = number
            packets += stream.encode(frame)
        packets += stream.encode()
        packets[-1].duration = round(3 / packets[-1].time_base)
        container.mux(packets)
    return folder / name


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.gif", "a.png"])
def test_the_last_frame_is_shown_as_long_as_the_file_says(tmp_path: Path, name: str) -> None:
    path = held(tmp_path, name)
    whole = pack_video(path.read_bytes(), 36, 90, 2)
    assert whole.duration == pytest.approx(3.4)
    assert len(whole.jpegs) == 7
    part = pack_video(path.read_bytes(), 36, 90, 2, 0, 2, 3)
    assert part.jpegs == whole.jpegs[4:6]
    counted = ffmpeg("-i", path, "-vf", "fps=2", "-f", "null", "-").stderr
    assert abs(int(counted.rsplit(b"frame=", 1)[1].split()[0]) - len(whole.jpegs)) <= 1  # it rounds to the nearest


def test_a_last_frame_is_not_longer_than_the_file_says(tmp_path: Path) -> None:
    choice = "testsrc2=s=64x36:r=10:d=10,select=not(mod(n\\,40))+eq(n\\,99)"
    ffmpeg("-f", "lavfi", "-i", choice, "-fps_mode", "vfr", "-c:v", "mpeg4", tmp_path / "a.mp4")
    assert pack_video((tmp_path / "a.mp4").read_bytes(), 36, 90, 2).duration == pytest.approx(10)


def test_sound_that_lasts_longer_adds_no_frames(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x36:r=10:d=2", "-f", "lavfi", "-i", "sine=d=9", tmp_path / name)
        for most in (0, 2):
            assert pack_video((tmp_path / name).read_bytes(), 36, 90, 2, most).duration == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("mirror", [[], ["-display_hflip"], ["-display_vflip"]], ids=["", "hflip", "vflip"])
def test_all_orientations(folder: Path, tmp_path: Path, turn: int, mirror: list[str]) -> None:
    path = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", turn, *mirror, "-i", folder / "a.mp4", "-c", "copy", "-t", 1, path)
    stored = pack_video(path.read_bytes(), 36, 95, 5)
    assert (stored.width, stored.height) == ((36, 64) if turn % 180 else (64, 36))
    check_against_ffmpeg(path, 5)


@pytest.mark.parametrize(
    ("shape", "name", "turn", "shown"),
    [
        ("sar=64/45", "a.mp4", 0, (68, 36)),  # players show 91x48
        ("sar=64/45", "a.mp4", 90, (36, 68)),
        ("sar=16/15", "a.ts", 0, (51, 36)),
        ("sar=8/9", "a.mkv", 0, (43, 36)),
        ("dar=16/9", "a.mpg", 0, (64, 36)),
        ("sar=1/2", "a.avi", 0, (32, 48)),
        ("sar=1/1000", "a.mp4", 0, (48, 36)),
        ("sar=0", "a.mp4", 0, (48, 36)),
    ],
)
def test_pixels_that_are_not_square(tmp_path: Path, shape: str, name: str, turn: int, shown: tuple[int, int]) -> None:
    codec = ["-c:v", "mpeg2video"] if name.endswith("mpg") else H264
    ffmpeg("-f", "lavfi", "-i", f"testsrc2=s=64x48:r=25:d=1,set{shape}", *codec, tmp_path / name)
    if turn:
        ffmpeg("-display_rotation", turn, "-i", tmp_path / name, "-c", "copy", tmp_path / "turned.mp4")
        name = "turned.mp4"
    stored = pack_video((tmp_path / name).read_bytes(), 36, 95, 5)
    assert (stored.width, stored.height) == shown
    check_against_ffmpeg(tmp_path / name, 5)


def clip_with_cover(folder: Path, tmp_path: Path, name: str) -> Path:
    Image.new("RGB", (200, 200), "red").save(tmp_path / "cover.jpg")
    words = ["-i", tmp_path / "cover.jpg", "-i", folder / "a.mp4", "-map", 0, "-map", 1, "-c", "copy"]
    ffmpeg(*words, "-disposition:v:0", "attached_pic", "-disposition:v:1", "default", tmp_path / name)
    return tmp_path / name


def test_a_cover_is_not_the_clip(folder: Path, tmp_path: Path) -> None:
    assert packed(clip_with_cover(folder, tmp_path, "a.mp4")) == packed(folder / "a.mp4")
    ffmpeg("-i", folder / "a.mkv", "-c", "copy", "-attach", tmp_path / "cover.jpg", "-metadata:s:t",
           "mimetype=image/jpeg", tmp_path / "a.mkv")  # fmt: skip
    assert packed(tmp_path / "a.mkv") == packed(folder / "a.mkv")


@pytest.mark.parametrize("name", ["a.m4a", "a.mp3", "a.flac"])
def test_a_song_with_a_cover_is_no_clip(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (200, 200), "red").save(tmp_path / "cover.jpg")
    words = ["-f", "lavfi", "-i", "sine=d=2", "-i", tmp_path / "cover.jpg", "-map", 0, "-map", 1]
    ffmpeg(*words, "-c:v", "copy", "-disposition:v", "attached_pic", tmp_path / name)
    with pytest.raises(MediaError, match=r"^no video stream$"):
        packed(tmp_path / name)


@pytest.mark.parametrize("form", ["mkv", "mp4"])
@pytest.mark.parametrize(("default", "best"), [((0, 1), 1), ((1, 0), 0), ((1, 1), 1), ((0, 0), 1)], ids=str)
def test_of_two_streams_the_one_that_ffmpeg_takes(
    folder: Path, tmp_path: Path, form: str, default: tuple[int, int], best: int
) -> None:
    path = tmp_path / f"two.{form}"
    words = ["-f", "lavfi", "-i", "testsrc=s=32x32:r=10:d=2", "-i", folder / "a.mp4", "-map", 0, "-map", 1, *H264]
    for number, flag in enumerate(default):
        words += [f"-disposition:v:{number}", "default" if flag else "0"]
    ffmpeg(*words, path)
    with av.open(str(path)) as container:
        flags = [int(stream.disposition) & 1 for stream in container.streams.video]
    if flags == list(default):  # some muxers know no stream without
        stored = pack_video(path.read_bytes(), 36, 95, 5)
        assert (stored.width, stored.height) == [(32, 32), (64, 36)][best]
    check_against_ffmpeg(path, 5)


PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile a.mp4\n",
    "ffconcat with a full path": "ffconcat version 1.0\nfile 'file:{path}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45678 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:12\n#EXTINF:12,\n{path}\n#EXT-X-ENDLIST\n",
    "m3u8 over http": "#EXTM3U\n#EXT-X-TARGETDURATION:12\n#EXTINF:12,\nhttp://192.0.2.1/a.ts\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    '<Representation id="1" mimeType="video/mp4"><BaseURL>{path}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "asx": '<asx version="3.0"><entry><ref href="{path}"/></entry></asx>',
    "pls": "[playlist]\nFile1={path}\nNumberOfEntries=1\n",
    "ram": "rtsp://192.0.2.1/a.rm\n",
    "avisynth": 'AviSource("{path}")\n',
    "cpl": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">'
    "</CompositionPlaylist>",
    "vobsub": "# VobSub index file, v7 (do not modify this line!)\ntimestamp: 00:00:00:000, filepos: 000000000\n",
}


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_nothing_but_the_file_is_opened(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(folder)
    text = PLAYLISTS[kind].format(path=folder / "a.mp4")
    began = time.monotonic()
    with pytest.raises(MediaError, match=r"unreadable video|no video stream"):
        pack_video(text.encode(), 36, 90, 5)
    assert time.monotonic() - began < 5  # a port that nobody answers at took 20


def test_a_picture_with_exif_is_one_upright_frame() -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(buffer, "JPEG", exif=exif)
    stored = pack_video(buffer.getvalue(), 48, 90, 2)
    assert (stored.width, stored.height, len(stored.jpegs)) == (48, 64, 1)


def test_packets_behind_a_part_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, correct, packets = (folder / "a.mkv").read_bytes(), Clock.correct, []
    monkeypatch.setattr(Clock, "correct", lambda clock, packet: packets.append(correct(clock, packet)))
    assert pack_video(data, 36, 90, 5, 2, 1, 3).duration == pytest.approx(2)
    assert len(packets) < 4 * 10
    assert pack_video(data, 36, 90, 5, 2, 1).duration == pytest.approx(SECONDS - 1)


def test_one_frame_is_enough_at_any_rate(folder: Path) -> None:
    assert len(packed(folder / "a.mp4", 1e-6)) == 1
