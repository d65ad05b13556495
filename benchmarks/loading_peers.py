"""The other loaders of benchmarks/loading.py, each in a process of its own that runs on request.

Runs in a separate environment (PEERS below) and imports nothing of this project. Each returns what ours returns: random
resized crops of 224 pixels, flips, uint8, captions unchanged; the official ones normalise, as in the official code.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PEERS = """
    torch==2.13.0 torchvision==0.28.0 numpy==2.1.3 pillow==13.0.0 psutil==7.2.2 webdataset==1.0.2
    mosaicml-streaming==0.13.0 litdata==0.2.76 megatron-energon==7.4.1 decord==0.6.0 av==18.1.0
""".split()  # noqa: SIM905
HALF = [0.5, 0.5, 0.5]
AREA = (0.5, 1.0)
PASSED_OVER = 8  # batches before the clock starts: those that were made while others ran
FEWEST = 6  # batches that are timed, however slow they come


def serve(batches: Iterator[int]) -> None:
    """Take batches for that many seconds for each line on standard input; answer with a line of JSON.

    batches: sizes, endless.
    """
    gc.collect()
    gc.freeze()  # for everybody, as training does: full collections pass over what was imported
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = float(line)
        for _ in range(PASSED_OVER):
            next(batches)
        samples, taken, began, cpu = 0, 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() - began < seconds or taken < FEWEST:
            samples, taken = samples + next(batches), taken + 1
        elapsed = time.perf_counter() - began
        print(json.dumps({"rate": samples / elapsed, "core": samples / (cpu_seconds() - cpu)}), flush=True)


def cpu_seconds() -> float:
    """CPU time of this process and its current workers."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [own, *own.children(recursive=True)])


def endless(make: Callable[[], Any], size: Callable[[Any], int]) -> Iterator[int]:
    """The sizes of a loader's batches, epoch after epoch."""
    while True:
        for batch in make():
            yield size(batch)


def crop_pillow() -> Callable[[Any], Any]:
    """torchvision's fastest way: crop and resize by Pillow, uint8 throughout."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=AREA, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def crop_official() -> Callable[[Any], Any]:
    """The official transform of frames (T, 3, H, W) in uint8: crop, flip, float, normalise."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                224, AREA, interpolation=transforms.InterpolationMode.BICUBIC, antialias=False
            ),
            transforms.RandomHorizontalFlip(),
            transforms.Lambda(lambda frames: frames.float().div(255.0)),
            transforms.Normalize(HALF, HALF),
        ]
    )


def open_image(data: bytes) -> Any:
    """A Pillow image of JPEG bytes."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def torch_loader(dataset: Any, options: argparse.Namespace, **more: Any) -> Any:
    """A DataLoader with persistent workers and prefetching."""
    from torch.utils.data import DataLoader

    settings = {"batch_size": options.batch, "num_workers": options.workers, "prefetch_factor": 4}
    return DataLoader(dataset, **{**settings, "persistent_workers": True, "drop_last": True, **more})


class Files:
    """A map-style data set of media files, loaded by a function of the path and a random number."""

    def __init__(self, paths: list[str], show: Callable[[str], Any]) -> None:
        self.paths, self.show = paths, show

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[Any, str]:
        return self.show(self.paths[number]), self.paths[number]


def official_images(options: argparse.Namespace) -> Iterator[int]:
    """The official image path: Pillow, then crop, flip and normalise on tensors; files, fully shuffled."""
    import torch

    transform = crop_official()

    def show(path: str) -> Any:
        pixels = np.array(open_image(Path(path).read_bytes()), np.uint8)
        return transform(torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0))

    loader = torch_loader(Files(media(options), show), options, shuffle=True)
    return endless(lambda: loader, lambda batch: len(batch[0]))


def webdataset_images(options: argparse.Namespace) -> Iterator[int]:
    """webdataset's pipeline over our tars in a DataLoader, batched in the workers."""
    import webdataset as wds

    transform = crop_pillow()
    tars = sorted(map(str, Path(options.tars).glob("*.tar")))
    dataset = (
        wds.WebDataset(tars, shardshuffle=100, nodesplitter=wds.split_by_node, empty_check=False)
        .shuffle(1000)
        .map(lambda sample: (transform(open_image(sample["jpg"])), caption(json.loads(sample["json"])["captions"])))
        .batched(options.batch, partial=False)
    )
    loader = torch_loader(dataset, options, batch_size=None, drop_last=False)
    return endless(lambda: loader, lambda batch: len(batch[0]))


def caption(texts: list[str]) -> str:
    """One of a sample's captions."""
    return random.choice(texts)


def mosaic_images(options: argparse.Namespace) -> Iterator[int]:
    """MosaicML Streaming over MDS shards of the same JPEG bytes."""
    from streaming import MDSWriter, StreamingDataset

    folder = Path(options.work) / "mds"
    if not (folder / "index.json").exists():
        with MDSWriter(out=str(folder), columns={"jpg": "bytes", "captions": "json"}) as writer:
            for record in records(options):
                writer.write({"jpg": Path(record["path"]).read_bytes(), "captions": record["caption"]})
    transform = crop_pillow()

    class Photos(StreamingDataset):
        def __getitem__(self, number: int) -> Any:
            sample = super().__getitem__(number)
            return transform(open_image(sample["jpg"])), caption(sample["captions"])

    dataset = Photos(local=str(folder), shuffle=True, batch_size=options.batch)
    loader = torch_loader(dataset, options)
    return endless(lambda: loader, lambda batch: len(batch[0]))


def as_stored(record: dict[str, Any]) -> dict[str, Any]:
    """Content of a photo in LitData's shards."""
    return {"jpg": Path(record["path"]).read_bytes(), "captions": json.dumps(record["caption"])}


def litdata_images(options: argparse.Namespace) -> Iterator[int]:
    """LitData over chunks of the same JPEG bytes."""
    import litdata

    folder = Path(options.work) / "litdata"
    if not (folder / "index.json").exists():
        # Its own choice, spawn, would stay that of the loader's workers, which cannot take a class made here.
        how = {"num_workers": 1, "start_method": "fork"}
        litdata.optimize(as_stored, records(options), str(folder), chunk_bytes="16MB", **how)
    transform = crop_pillow()

    class Photos(litdata.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return transform(open_image(sample["jpg"])), caption(json.loads(sample["captions"]))

    loader = litdata.StreamingDataLoader(
        Photos(str(folder), shuffle=True, drop_last=True),
        batch_size=options.batch,
        num_workers=options.workers,
        prefetch_factor=4,
        persistent_workers=True,
    )
    return endless(lambda: loader, lambda batch: len(batch[0]))


def energon_images(options: argparse.Namespace) -> Iterator[int]:
    """Megatron-Energon over our tars, prepared by its own tool; decoded and cropped in its workers."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    folder = Path(options.work) / "energon"
    if not (folder / ".nv-meta" / "split.yaml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for tar in Path(options.tars).glob("*.tar"):
            os.link(tar, folder / tar.name)
        tool = Path(sys.executable).with_name("energon")
        settings = [
            "--non-interactive",
            "--split-ratio",
            "1,0,0",
            "--sample-type",
            "CrudeWebdataset",
            "--force-overwrite",
        ]
        subprocess.run([tool, "prepare", *settings, folder], check=True, stdout=subprocess.DEVNULL)
        (folder / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CrudeWebdataset\ndecoder: null\n"
        )
    transform = crop_pillow()

    @stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        texts = json.loads(sample["json"])["captions"]
        image = transform(open_image(sample["jpg"]))
        return dict(**basic_sample_keys(sample), image=image, text=caption(texts))

    class Encoder(DefaultTaskEncoder):
        cookers = (Cooker(cook),)

    dataset = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=options.workers),
        batch_size=options.batch,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    loader = get_savable_loader(dataset, prefetch_factor=4)
    return endless(lambda: loader, lambda batch: len(batch["image"]))


def decord_videos(options: argparse.Namespace) -> Iterator[int]:
    """The official video path: decord reads one random frame of a 2-fps MP4; crop, flip, normalise on tensors."""
    import torch
    from decord import VideoReader

    transform = crop_official()

    def show(path: str) -> Any:
        video = VideoReader(path, num_threads=1)
        frames = video.get_batch([random.randrange(len(video))]).asnumpy()
        return transform(torch.from_numpy(frames).permute(0, 3, 1, 2))

    loader = torch_loader(Files(media(options), show), options, shuffle=True)
    return endless(lambda: loader, lambda batch: len(batch[0]))


def pyav_videos(options: argparse.Namespace) -> Iterator[int]:
    """The same with PyAV: decode up to the wanted frame."""
    import av
    import torch

    transform = crop_official()

    def show(path: str) -> Any:
        with av.open(path) as file:
            stream = file.streams.video[0]
            stream.thread_count = 1
            wanted = random.randrange(max(1, stream.frames))
            pixels = next(islice(file.decode(stream), wanted, None)).to_ndarray(format="rgb24")
        return transform(torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0))

    loader = torch_loader(Files(media(options), show), options, shuffle=True)
    return endless(lambda: loader, lambda batch: len(batch[0]))


def records(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Path and captions of every photo."""
    with open(options.annotations, encoding="utf-8") as file:
        rows = json.load(file)
    return [{"path": str(Path(options.media) / row["image"]), "caption": row["caption"]} for row in rows]


def media(options: argparse.Namespace) -> list[str]:
    """The files to read: photos, or clips at 2 fps, each as often as in one of our epochs."""
    if not options.repeat:
        return [record["path"] for record in records(options)]
    return options.repeat * [to_two_fps(record["path"], Path(options.work) / "mp4") for record in records(options)]


def to_two_fps(path: str, folder: Path) -> str:
    """The clip after the official preparation: H.264, 2 fps, shorter side 224, no sound."""
    import av
    from av.video.reformatter import VideoReformatter

    target = folder / (Path(path).stem + ".mp4")
    if target.exists():
        return str(target)
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial.mp4")
    with av.open(path) as source, av.open(str(partial), "w") as sink:
        given = source.streams.video[0]
        scale = 224 / min(given.width, given.height)
        width, height = (round(side * scale / 2) * 2 for side in (given.width, given.height))
        made = sink.add_stream("libx264", rate=2, width=width, height=height, pix_fmt="yuv420p")
        shown, reformatter = 0, VideoReformatter()
        for frame in source.decode(given):
            if frame.time is not None and frame.time * 2 >= shown:
                still = reformatter.reformat(frame, width, height, "yuv420p")
                still.pts, still.time_base, shown = shown, Fraction(1, 2), shown + 1
                sink.mux(made.encode(still))
        sink.mux(made.encode())
    partial.rename(target)
    return str(target)


def torchvision_operators() -> Any:
    """Declare the two operators that torchvision expects, for a CPU build of torch."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    if not hasattr(torch.ops.torchvision, "nms"):
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


CONTENDERS = {
    "official": official_images,
    "webdataset": webdataset_images,
    "mosaic": mosaic_images,
    "litdata": litdata_images,
    "energon": energon_images,
    "decord": decord_videos,
    "pyav": pyav_videos,
}


def main() -> None:
    """Prepare the data of a loader if needed, then wait for requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--annotations", required=True, help="JSON list of {image, caption}")
    parser.add_argument("--media", required=True, help="folder of the media")
    parser.add_argument("--tars", required=True, help="folder of our shards")
    parser.add_argument("--work", required=True, help="folder for what is prepared")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=0, help="clips: how often each is in an epoch")
    options = parser.parse_args()
    operators = torchvision_operators()  # lives as long as its owner
    serve(CONTENDERS[options.name](options))
    del operators


if __name__ == "__main__":
    main()
