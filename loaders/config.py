"""Settings of the loader in a run's YAML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import UserError
from runtime.settings import FINE_TUNING, check_declared, evaluation, fixed, free, setting
from storage.limits import RemoteReads

BACKENDS = ("auto", "dali", "cpu")  # decoders


@dataclass
class PerMedia:
    """One whole number for each media type."""

    image: int = 0
    video: int = 0


@dataclass
class VideoInput:
    """How the frames of a clip are sampled."""

    num_frames: int = fixed(1, "frames per clip in training", checkpoint=FINE_TUNING, least=1)
    sample_type: str = fixed("rand", "frames in training: rand (one a segment), middle, fpsX (X per second), or yours")
    num_frames_test: int = evaluation(4, "frames per clip in evaluation", least=1)
    sample_type_test: str = evaluation(
        "middle", "frames in evaluation; the same forms as sample_type, or shuffled: middle in another order"
    )


@dataclass
class CacheConfig:
    """The node's cache of data read from remote shards; all processes of the node share it."""

    folder: str = setting("", "folder on a local disk; empty: shard indices only, in TMPDIR")
    gb: float = setting(0.0, "maximum size of the cache in gigabytes")
    index_mb: int = setting(512, "maximum megabytes of shard indices cached without a folder; 0: none", least=0)
    clips: bool = setting(False, "cache whole clips, although a batch uses few of their frames")


@dataclass
class LoaderConfig:
    """Settings of the content of batches and of how they are loaded."""

    batch_size: PerMedia = fixed(lambda: PerMedia(128, 96), "pairs per optimiser step, over all ranks together")
    image_res: int = fixed(224, "height and width of a frame in pixels", least=1)
    video_input: VideoInput = setting(VideoInput)
    max_txt_l: PerMedia = fixed(lambda: PerMedia(32, 32), "maximum tokens of a caption")
    max_q_len: int = fixed(25, "maximum tokens of a question")
    max_a_len: PerMedia = fixed(lambda: PerMedia(6, 5), "maximum tokens of an answer")
    epoch_unit: str = fixed(
        "samples",
        "item of an epoch: samples (with one random caption), captions (each its own item) or questions",
        choices=("samples", "captions", "questions"),
        renamed_from="unit",
    )
    paragraph: bool = fixed(False, "join all captions of a sample into one text (DiDeMo, ActivityNet)")
    corpus_weights: dict[str, float] = fixed(
        dict, "name of a corpus: its traversals per epoch; default 1", replaced=True
    )
    extra_columns: list[str] = fixed(
        list, "columns of your own in the index that batches carry: docs/how-to/extra-column.md"
    )
    seed: int = fixed(42, "seed of the sample order, all random choices and the initial weights", least=0)
    stripes: int = fixed(
        64, "parts of an epoch that are read in parallel; a multiple of the ranks", least=1, renamed_from="lanes"
    )
    window_shards: int = fixed(4, "shards of a stripe whose samples are shuffled together", least=1)
    augment: bool = fixed(True, "random resized crop and flip; false: resize only")
    crop_area: float = fixed(0.5, "smallest area of a random crop, as a share of the frame", above=0, most=1)
    word_dropout: float = fixed(0.0, "share of a text's words that training leaves out", least=0, below=1)
    augmentations: list[str] = fixed(list, "augmentations of your own, after crop and flip, in order")
    flip: bool = fixed(True, "horizontal flips; set false where left and right carry meaning")
    antialias: bool = fixed(False, "antialiasing when resizing; the official transform has none")
    decode: str = free(
        "auto", "decoder; auto takes the faster one; pixels differ by some grey levels", choices=BACKENDS
    )
    deterministic: bool = free(False, "bit-identical results on the same machine and GPU; slower")
    threads: int = free(0, "decoding threads, with decode=cpu processes; 0: from the cores that this rank may use")
    prefetch: int = free(3, "batches prefetched before the step", least=1)
    max_bad_share: float = free(0.01, "the run fails if a larger share of the samples is bad")
    quarantine_file: str = free("", "file for skipped samples (JSON lines); {rank} is replaced by the rank")
    storage: dict[str, str] = free(dict, "fsspec options for the corpora; no credentials", replaced=True)
    remote: RemoteReads = free(RemoteReads)
    cache: CacheConfig = free(CacheConfig)
    stall_timeout: float = free(
        300.0, "seconds without a batch before the loader fails; 0: never", least=0, renamed_from="patience"
    )


def check_weights(config: LoaderConfig, names: Sequence[str]) -> None:
    """Raise ValueError for a weight that is not above 0, or of none of the corpora with these names."""
    for name, weight in config.corpus_weights.items():
        if name not in names:
            raise UserError(f"corpus_weights names {name!r}, the corpora are {', '.join(sorted(set(names)))}")
        if not 0 < weight < math.inf:
            raise UserError(f"corpus_weights.{name} is {weight}, must be above 0: traversals of the corpus per epoch")


def check_storage(config: LoaderConfig) -> None:
    """Raise UserError for settings of stores and the cache that have no meaning."""
    check_declared(config)
    cache = config.cache
    if bool(cache.folder) != (cache.gb > 0):
        raise UserError(f"cache.folder is {cache.folder!r} and cache.gb {cache.gb}: set both, or neither")
