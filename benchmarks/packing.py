"""Measures packing speed on one core: against img2dataset, ffmpeg and the bare libraries.

    python benchmarks/packing.py                                     photos and clips; installs what is needed
    python benchmarks/packing.py --photos FOLDER --clips FOLDER --rounds 5 --img2dataset /path/to/env/bin/img2dataset
    python benchmarks/packing.py --before CHECKOUT                   against the code of another checkout

Photos come from a local web server, the same for all, shorter side 224, JPEG quality 90. Clips: 2 fps, shorter side
224, JPEG. All run in one process in turn, several rounds; the measure is the median CPU time of a process and its
children without start-up (a run on very few media). The bare loop for photos decodes with libjpeg-turbo, downscales
with OpenCV by area and encodes with libjpeg-turbo, and again with our filters; for clips PyAV decodes every frame.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHARED = ROOT.parent / "shared" / "data"
SIZE, QUALITY, FPS = 224, 90, 2
FEW = 32  # photos of the run that measures the start-up
Side = Callable[[list[Path], Path], list[list[str]]]  # media, empty folder -> commands

FLOOR_PHOTOS = """
import sys, cv2, simplejpeg
cv2.setNumThreads(1)
for path in open(sys.argv[1]).read().split("\\n"):
    data = open(path, "rb").read()
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height={size}, min_width={size}, fastdct=False)
    height, width = pixels.shape[:2]
    scale = min(1, {size} / min(height, width))
    if scale < 1:
        pixels = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    simplejpeg.encode_jpeg(pixels, quality={quality}, colorsubsampling="420")
"""
CONVERTING = """
import sys, cv2
from sharding.media.image import pack_image
cv2.setNumThreads(1)
for path in open(sys.argv[1]).read().split("\\n"):
    pack_image(open(path, "rb").read(), {size}, {quality})
"""
FLOOR_CLIPS = """
import sys, av
for path in open(sys.argv[1]).read().split("\\n"):
    with av.open(path) as container:
        container.streams.video[0].thread_type = "NONE"
        for _ in container.decode(video=0):
            pass
"""


def serve(folder: str, port: multiprocessing.Queue) -> None:
    """Serve a folder in a separate process."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=folder)  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.put(server.server_address[1])
    server.serve_forever()


def cpu_seconds(command: list[str]) -> float:
    """CPU time of a command and its child processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)[:300]} failed:\n{log.read().decode()[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def packing(folder: Path, media_type: str, root: str) -> list[str]:
    """The command that packs the media of folder/a.json in one process."""
    words = ["--annotations", str(folder / "a.json"), "--media-type", media_type, "--media-root", root]
    words += ["--size", str(SIZE), "--output", str(folder / "out"), "--workers", "1"]
    return [sys.executable, "-m", "sharding.build", *words]


def photo_sides(url: str, img2dataset: str) -> dict[str, Side]:
    """The variants for photos: each gives its commands for some photos."""

    def ours(media: list[Path], folder: Path) -> list[list[str]]:
        records = [{"image": path.name, "caption": "a photo"} for path in media]
        (folder / "a.json").write_text(json.dumps(records))
        return [[*packing(folder, "image", url), "--quality", str(QUALITY)]]

    def local(media: list[Path], folder: Path) -> list[list[str]]:
        return [[str(media[0].parent) if word == url else word for word in ours(media, folder)[0]]]

    def theirs(media: list[Path], folder: Path) -> list[list[str]]:
        records = [{"url": f"{url}/{path.name}", "caption": "a photo"} for path in media]
        (folder / "a.json").write_text(json.dumps(records))
        options = {"url_list": folder / "a.json", "input_format": "json", "url_col": "url", "caption_col": "caption"}
        options |= {"output_folder": folder / "out", "output_format": "webdataset", "image_size": SIZE}
        options |= {"resize_mode": "keep_ratio", "resize_only_if_bigger": True, "encode_quality": QUALITY}
        options |= {"processes_count": 1, "thread_count": 16, "number_sample_per_shard": 1000, "compute_hash": None}
        return [[img2dataset, *(f"--{name}={value}" for name, value in options.items())]]

    sides = {"ours (http)": ours, "img2dataset (http)": theirs, "ours (files)": local}
    return sides | {"floor": floor(FLOOR_PHOTOS), "floor with our own filters": floor(CONVERTING)}


def clip_sides(ffmpeg: str) -> dict[str, Side]:
    """The variants for clips."""

    def ours(media: list[Path], folder: Path) -> list[list[str]]:
        (folder / "a.json").write_text(json.dumps([{"video": path.name, "caption": "a clip"} for path in media]))
        return [[*packing(folder, "video", str(media[0].parent)), "--fps", str(FPS)]]

    def theirs(media: list[Path], folder: Path) -> list[list[str]]:
        scale = f"scale='if(gt(iw,ih),-2,min(iw,{SIZE}))':'if(gt(iw,ih),min(ih,{SIZE}),-2)':flags=area"
        head = f"{ffmpeg} -nostdin -loglevel error -threads 1 -i".split()
        tail = f"-filter_threads 1 -vf fps={FPS},{scale} -pix_fmt yuvj420p -threads 1 -q:v 3".split()
        return [[*head, str(path), *tail, str(folder / f"{path.name}.%03d.jpg")] for path in media]

    return {"ours": ours, "ffmpeg, one command a clip": theirs, "floor (PyAV, every frame)": floor(FLOOR_CLIPS)}


def with_another_checkout(side: Side, checkout: Path) -> dict[str, Side]:
    """One of our variants, and the same with the code of another checkout."""

    def with_code(code: Path) -> Side:
        def commands(media: list[Path], folder: Path) -> list[list[str]]:
            [[python, *words]] = side(media, folder)
            return [["env", f"PYTHONPATH={code.resolve()}", python, "-P", *words]]  # -P: not the code of this folder

        return commands

    return {"now": with_code(ROOT), "before": with_code(checkout)}


def floor(program: str) -> Side:
    """The bare libraries in a loop over files."""

    def commands(media: list[Path], folder: Path) -> list[list[str]]:
        (folder / "list").write_text("\n".join(map(str, media)))
        filled = program.replace("{size}", str(SIZE)).replace("{quality}", str(QUALITY))
        return [[sys.executable, "-c", filled, str(folder / "list")]]

    return commands


def compare(sides: dict[str, Side], media: list[Path], few: list[Path], rounds: int, unit: str) -> dict[str, float]:
    """Print and return media per CPU second of each variant: medians over alternating rounds."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            seconds = []
            for chosen in (few, media):
                with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
                    seconds.append(sum(cpu_seconds(command) for command in sides[name](chosen, Path(folder))))
            rates[name].append((len(media) - len(few)) / (seconds[1] - seconds[0]))
    found = {name: median(values) for name, values in rates.items()}
    first = next(iter(found))
    for name, rate in found.items():
        spread = f"{min(rates[name]):.1f} to {max(rates[name]):.1f}"
        print(f"{name:28} {rate:8.1f} {unit}/CPU s ({spread}); {first} / this = {found[first] / rate:.2f}", flush=True)
    return found


def prepare_photos(source: Path | None, count: int, scale: float, folder: Path) -> list[Path]:
    """`count` JPEG files, repeated from `source` or Shapes, enlarged by `scale`."""
    if source is None:
        from sharding.shapes import write_shapes

        source = write_shapes(folder / "shapes", images=200, clips=1, test_items=1, size=320, seed=0) / "media"
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    photos = folder / "photos"
    photos.mkdir()
    for number, path in enumerate(itertools.islice(itertools.cycle(found), count)):
        target = photos / f"{number:06d}.jpg"
        if number >= len(found):
            os.link(photos / f"{number - len(found):06d}.jpg", target)
        elif scale == 1:
            shutil.copy(path, target)
        else:
            from PIL import Image

            with Image.open(path) as image:
                size = (round(image.width * scale), round(image.height * scale))
                image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(target, quality=QUALITY)
    return sorted(photos.iterdir())


def own_environment(package: str, program: str) -> str:
    """A program in its own virtual environment, made on first use next to pip's cache."""
    environment = Path.home() / ".cache" / "singularity-benchmarks" / package
    if not (environment / "bin" / program).exists():
        print(f"installing {package} into {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(environment / "bin" / "pip"), "install", "--quiet", package], check=True)
    return str(environment / "bin" / program)


def find_ffmpeg() -> str:
    """The system's ffmpeg, else that of the package imageio-ffmpeg."""
    if found := shutil.which("ffmpeg"):
        return found
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def first_folder(*names: str) -> Path | None:
    """The first existing folder of the shared data."""
    return next((SHARED / name for name in names if (SHARED / name).is_dir()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=first_folder("photos/images", "flickr8k/images"))
    parser.add_argument("--scale", type=float, default=1.0, help="enlarge the photos first by this factor")
    parser.add_argument("--count", type=int, default=4000, help="photos")
    parser.add_argument("--clips", type=Path, default=first_folder("videos/media", "clips/videos"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--img2dataset", default="", help="path of its program (default: installed when needed)")
    parser.add_argument("--only", choices=("photos", "clips"))
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="compare with its code, not with other tools")
    options = parser.parse_args()
    if options.only != "clips":
        img2dataset = options.img2dataset
        if not img2dataset and not options.before:
            img2dataset = own_environment("img2dataset", "img2dataset")
        with tempfile.TemporaryDirectory(prefix="benchmark-photos-") as folder:
            media = prepare_photos(options.photos, options.count, options.scale, Path(folder))
            port: multiprocessing.Queue = multiprocessing.Queue()
            server = multiprocessing.Process(target=serve, args=(str(media[0].parent), port), daemon=True)
            server.start()
            sides = photo_sides(f"http://127.0.0.1:{port.get()}", img2dataset)
            if options.before:
                sides = with_another_checkout(sides["ours (files)"], options.before)
            print(f"{len(media)} photos of {options.photos or 'Shapes'}, {options.scale:g} times as large")
            compare(sides, media, media[:FEW], options.rounds, "photos")
            server.kill()
    if options.only != "photos":
        if options.clips is None:
            raise SystemExit("--clips is needed: there is no folder of clips next to the checkout")
        clips = sorted(path for path in options.clips.iterdir() if path.is_file())
        print(f"{len(clips)} clips of {options.clips}")
        smallest = min(clips, key=lambda path: path.stat().st_size)
        sides = clip_sides(find_ffmpeg())
        if options.before:
            sides = with_another_checkout(sides["ours"], options.before)
        compare(sides, clips, [smallest], options.rounds, "clips")


if __name__ == "__main__":
    main()
