r"""Compares loaders on this machine: ours, a bare decoding loop, and other loaders, in alternating rounds.

    python benchmarks/loading.py --photos train.json images --clips videos_train.json media --work /tmp/loading \
        --peers /tmp/peers --make-peers

Images: random resized crops of 224 pixels, flips, captions, batches of 128. Clips: one random frame, batches of 32.
Each has two decoding threads or two worker processes. `bare` decodes with libjpeg-turbo and OpenCV from memory and
drops the pixels; `bare-batches` writes them into batches, as a loader must. Loaders run one at a time, a few seconds a
round; medians over rounds. Two rates: samples/s, and samples per second of CPU time over all processes, which other
work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import psutil
import simplejpeg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from loading_peers import PEERS, serve

from loaders.config import LoaderConfig, PerMedia
from loaders.decode.pixels import odd_buffer
from loaders.samples import Clip
from loaders.train import TrainLoader
from loaders.vocab import learn_vocabulary
from preprocessing.text import Tokenizer
from sharding.build import build_corpus

BATCH = {"image": 128, "video": 32}
CONTENDERS = {
    "image": ["ours", "bare", "bare-batches", "official", "webdataset", "mosaic", "litdata", "energon"],
    "video": ["ours", "bare", "bare-batches", "decord", "pyav"],
}
CLIPS_REPEATED = 200  # traversals in an epoch: there are a few dozen clips


def open_loader(options: argparse.Namespace) -> TrainLoader:
    """Our loader over the packed corpus, with texts as training uses it, or without."""
    config = LoaderConfig(
        batch_size=PerMedia(**BATCH),
        decode="cpu",
        threads=options.threads,
        corpus_weights={"video": CLIPS_REPEATED} if options.kind == "video" else {},
    )
    tokenizer = None if options.no_texts else Tokenizer.load(f"{options.work}/vocab.txt")
    return TrainLoader([f"{options.work}/{options.kind}"], tokenizer, config)


def ours(options: argparse.Namespace) -> Iterator[int]:
    """Sizes of our loader's batches."""
    loader = open_loader(options)
    while True:
        for batch in loader:
            yield len(batch.keys)


def bare(options: argparse.Namespace, into_batches: bool) -> Iterator[int]:
    """Sizes of batches that are decoded and cropped from memory in a bare loop."""
    loader = open_loader(options)
    clips: list[Clip] = []
    for _, samples in islice(loader.read_steps(0, 0), 2000 // BATCH[options.kind]):
        clips += [sample.clip() for sample in samples]
    loader.close()
    batch = BATCH[options.kind]
    memory = np.zeros((8 if into_batches else 1, batch, 224, 224, 3), np.uint8)  # as many as our loader has at once

    def work(thread: int, begin: int, slot: int) -> None:
        largest = max(clip.height * clip.width for clip in clips)
        buffer, own = odd_buffer(largest * 3), np.empty((224, 224, 3), np.uint8)
        for number in range(thread, batch, options.threads):
            clip = clips[(begin + number) % len(clips)]
            top, left, height, width, flip = clip.window
            out = memory[slot, number] if into_batches else own
            pixels = simplejpeg.decode_jpeg(clip.jpegs[0], "RGB", fastdct=False, fastupsample=False, buffer=buffer)
            crop = pixels[top : top + height, left : left + width]
            cv2.resize(crop, (224, 224), dst=out, interpolation=cv2.INTER_CUBIC)
            if flip:
                cv2.flip(out, 1, dst=out)

    def many(thread: int, first: int) -> None:
        for number in range(first, first + 16):  # batches between two barriers
            work(thread, number * batch, number % len(memory))

    with ThreadPoolExecutor(options.threads) as pool:
        number = 0
        while True:
            list(pool.map(many, range(options.threads), [number] * options.threads))
            number += 16
            yield 16 * batch


def prepare(options: argparse.Namespace) -> None:
    """Pack the media, learn a vocabulary, make the environment of the peers, unless they exist."""
    for kind, source in (("image", options.photos), ("video", options.clips)):
        if source and not Path(options.work, kind, "corpus.json").exists():
            build_corpus([source[0]], source[1], kind, str(Path(options.work, kind)), fps=2, progress=True)
    packed = [str(folder.parent) for folder in Path(options.work).glob("*/corpus.json")]
    if not options.no_texts:
        learn_vocabulary(packed, 8000, Path(options.work) / "vocab.txt")
    python = Path(options.peers) / "bin" / "python"
    if not python.exists():
        if not options.make_peers:
            raise SystemExit(f"error: {options.peers} is not a virtual environment: add --make-peers to make it")
        subprocess.run([sys.executable, "-m", "venv", options.peers], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)


class Contender:
    """A process that runs one of the loaders on request."""

    def __init__(self, name: str, options: argparse.Namespace, kind: str) -> None:
        source, folder = (options.photos if kind == "image" else options.clips), Path(__file__).parent
        if name in ("ours", "bare", "bare-batches"):
            command = [sys.executable, folder / "loading.py", "--run", name, "--kind", kind]
            command += ["--threads", str(options.threads), *(["--no-texts"] if options.no_texts else [])]
        else:
            command = [Path(options.peers) / "bin" / "python", folder / "loading_peers.py", name]
            command += ["--annotations", source[0], "--media", source[1], "--tars", f"{options.work}/{kind}"]
            command += ["--batch", str(BATCH[kind]), "--workers", str(options.threads)]
            command += ["--repeat", str(CLIPS_REPEATED)] if kind == "video" else []
        self.name = name
        self.log = Path(options.work, f"{name}.log").open("w")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*map(str, command), "--work", options.work], stdin=pipe, stdout=pipe, stderr=self.log, text=True
        )
        self.rates: list[dict[str, float]] = []
        self._line("ready")

    def _line(self, prefix: str) -> str:
        """The next line with this prefix; other lines are from libraries."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(prefix):
                return line
        raise SystemExit(f"error: {self.name} ended: see {self.log.name}")

    def run(self, seconds: float) -> None:
        """Record the rates over some seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        self.rates.append(json.loads(self._line("{")))

    def close(self) -> None:
        """End the process and its workers."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for worker in started:  # a loader's worker processes may outlive it
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        self.process.wait()
        self.log.close()


def compare(options: argparse.Namespace, kind: str) -> None:
    """Run the loaders of a medium in turn; print medians and ratios ours / theirs."""
    names = [name for name in CONTENDERS[kind] if not options.only or name in options.only]
    contenders = [Contender(name, options, kind) for name in names]
    try:
        for number in range(options.rounds):
            for contender in contenders[:: 1 if number % 2 else -1]:
                contender.run(options.seconds)
                print(f"round {number + 1} {contender.name} {contender.rates[-1]['rate']:.0f}", file=sys.stderr)
    finally:
        for contender in contenders:
            contender.close()
    mine = next(contender for contender in contenders if contender.name == "ours")
    print(
        f"\n{kind}: medians of {options.rounds} rounds of {options.seconds:g} s, {options.threads} threads or workers"
    )
    print(f"{'':<14}{'samples/s':>10}{'ours/it':>9}{'/CPU second':>14}{'ours/it':>9}")
    for contender in contenders:
        cells = []
        for unit in ("rate", "core"):
            ratios = [own[unit] / other[unit] for own, other in zip(mine.rates, contender.rates, strict=True)]
            cells += [statistics.median(rates[unit] for rates in contender.rates), statistics.median(ratios)]
        print(f"{contender.name:<14}{cells[0]:>10.0f}{cells[1]:>8.2f}x{cells[2]:>14.0f}{cells[3]:>8.2f}x", flush=True)


def main() -> None:
    """The comparison, or one of our own loaders when it starts itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--photos", nargs=2, metavar=("JSON", "FOLDER"), help="annotations and their media")
    add("--clips", nargs=2, metavar=("JSON", "FOLDER"), help="the same for videos")
    add("--work", required=True, help="folder for packed data, kept for the next run")
    add("--peers", default="peers", help="virtual environment of the other loaders (default: %(default)s)")
    add("--make-peers", action="store_true", help="create it, with the compared versions")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=4.0)
    add("--threads", type=int, default=2, help="decoding threads, or worker processes (default: %(default)s)")
    add("--no-texts", action="store_true", help="frames only, of corpora that need no texts")
    add("--only", nargs="*", help="only these loaders; ours must be one")
    add("--run", help=argparse.SUPPRESS)
    add("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        serve(ours(options) if options.run == "ours" else bare(options, options.run == "bare-batches"))
        return
    prepare(options)
    for kind, source in (("image", options.photos), ("video", options.clips)):
        if source:
            compare(options, kind)


if __name__ == "__main__":
    main()
