"""Settings of the loader, as they stand in a run's YAML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from runtime.errors import UserError
from runtime.settings import evaluation, fixed, free


@dataclass
class PerMedia:
    """One whole number for each media type."""

    image: int = 0
    video: int = 0


@dataclass
class VideoInput:
    """How the frames of a clip are chosen."""

    num_frames: int = fixed(1)
    sample_type: str = fixed("rand")  # rand | middle | fpsX (X frames a second)
    num_frames_test: int = evaluation(4)
    sample_type_test: str = evaluation("middle")


@dataclass
class RemoteReads:
    """How objects of S3, GCS and web servers are read. Nothing of it changes what a batch holds."""

    connections: int = 128  # requests of a node at the same time; each of its processes has an equal share
    requests_per_second: float = 3000.0  # of a node, shared in the same way; 0: any number
    starts_per_second: float = 20.0  # nodes of a job that begin to read, so that many do not come at once; 0: all
    gap_kb: int = 64  # frames so near to each other in a shard come in one request
    ahead_mb: int = 256  # read ahead of decoding at most
    ahead_steps: int = 8  # the same, in steps
    deadline: float = 120.0  # seconds for one part, all tries together
    try_seconds: float = 30.0  # seconds for one try
    hedge_percentile: float = 0.95  # a request slower than this share of the others is sent twice; 0: never


@dataclass
class CacheConfig:
    """Where a node keeps what it has read from remote shards; all its processes share it."""

    folder: str = ""  # on a local disk; empty: indices only, in the temporary folder (TMPDIR)
    gb: float = 0.0  # how large it may grow
    index_mb: int = 512  # how large that of the indices may grow where there is no folder; 0: none
    clips: bool = False  # keep whole clips, although few of their frames are shown at a time


@dataclass
class LoaderConfig:
    """Everything that decides what a batch holds, and how it is made."""

    # Over all ranks together, so that a run is the same on any number of GPUs.
    batch_size: PerMedia = fixed(factory=lambda: PerMedia(128, 96))
    image_res: int = fixed(224)
    video_input: VideoInput = field(default_factory=VideoInput)
    max_txt_l: PerMedia = fixed(factory=lambda: PerMedia(32, 32))
    max_q_len: int = fixed(25)  # tokens of a question
    max_a_len: PerMedia = fixed(factory=lambda: PerMedia(6, 5))  # and of an answer about an image or a video
    epoch_unit: str = fixed("samples")  # samples (a caption drawn each time) | captions (each its own item) | questions
    paragraph: bool = fixed(False)  # all captions of a sample are one text (DiDeMo, ActivityNet)
    corpus_weights: dict[str, float] = fixed(factory=dict)  # corpus name -> traversals of it an epoch; else 1
    seed: int = fixed(42)
    stripes: int = fixed(64)
    window_shards: int = fixed(4)
    augment: bool = fixed(True)  # random resized crop and flip; off: plain resize
    flip: bool = fixed(True)  # off where left and right carry meaning
    antialias: bool = fixed(False)  # the official transform resizes without
    decode: str = free("auto")  # auto | dali | cpu
    deterministic: bool = free(False)  # the same bits on the same machine and GPU, at a price
    threads: int = free(0)  # decoding threads, of decode=cpu processes; 0: chosen from the cores this rank may use
    prefetch: int = free(3)  # batches made ahead of the step
    max_bad_share: float = free(0.01)  # of the samples read; above it the run fails
    quarantine_file: str = free("")  # bad samples are appended to it as JSON lines; {rank} is filled in
    storage: dict[str, str] = free(factory=dict)  # fsspec options of the corpora; no credentials
    remote: RemoteReads = free(factory=RemoteReads)
    cache: CacheConfig = free(factory=CacheConfig)
    stall_timeout: float = free(300.0)  # seconds without a batch until the loader fails; 0: never


def check_training(config: LoaderConfig) -> None:
    """Raise ValueError for settings that must be at least 1, and a seed below 0."""
    if config.seed < 0:
        raise UserError(f"seed is {config.seed}, must be 0 or more")
    values = {name: getattr(config, name) for name in ("image_res", "stripes", "window_shards", "prefetch")}
    for name, value in {**values, "video_input.num_frames": config.video_input.num_frames}.items():
        if value < 1:
            raise UserError(f"{name} is {value}, must be at least 1")


def check_weights(config: LoaderConfig, names: Sequence[str]) -> None:
    """Raise ValueError for a weight that is not above 0, or of none of the corpora with these names."""
    for name, weight in config.corpus_weights.items():
        if name not in names:
            raise UserError(f"corpus_weights names {name!r}, the corpora are {', '.join(sorted(set(names)))}")
        if not 0 < weight < math.inf:
            raise UserError(f"corpus_weights.{name} is {weight}, must be above 0: traversals of the corpus an epoch")


def check_storage(config: LoaderConfig) -> None:
    """Raise ValueError for settings of stores and the cache that cannot be meant."""
    remote, cache = config.remote, config.cache
    for name in ("connections", "ahead_mb", "ahead_steps", "deadline", "try_seconds"):
        if getattr(remote, name) <= 0:
            raise UserError(f"remote.{name} is {getattr(remote, name)}, must be more than 0")
    at_least_0 = {f"remote.{name}": getattr(remote, name) for name in ("gap_kb", "requests_per_second")}
    at_least_0 |= {"remote.starts_per_second": remote.starts_per_second, "stall_timeout": config.stall_timeout}
    for name, value in {**at_least_0, "cache.index_mb": cache.index_mb}.items():
        if value < 0:
            raise UserError(f"{name} is {value}, must be 0 or more")
    if not 0 <= remote.hedge_percentile < 1:
        raise UserError(f"remote.hedge_percentile is {remote.hedge_percentile}, must be at least 0 and below 1")
    if bool(cache.folder) != (cache.gb > 0):
        raise UserError(f"cache.folder is {cache.folder!r} and cache.gb {cache.gb}: set both, or neither")
