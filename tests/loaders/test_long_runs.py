"""Long runs: resuming in a large corpus, constant memory and files over epochs, SIGKILL and SIGINT."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch

from loaders.config import LoaderConfig, PerMedia, VideoInput
from loaders.decode.cpu import MemoryPool
from loaders.train import TrainLoader
from preprocessing.text import Tokenizer
from sharding.shards.schema import INDEX_SCHEMA, Corpus, ShardInfo

SHARDS, EACH = 100, 10_000


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of a million samples with real indices; all frames are the same few bytes of one tar."""
    folder = tmp_path_factory.mktemp("million")
    jpeg = simplejpeg.encode_jpeg(torch.full((32, 32, 3), 120, dtype=torch.uint8).numpy())
    (folder / "frames").write_bytes(b"\0" * 512 + jpeg + b"\0" * 1024)
    row = {"offsets": [512], "sizes": [len(jpeg)], "crc32s": [zlib.crc32(jpeg)], "captions": ["a large red star"]}
    row |= {"width": 32, "height": 32, "source": "photo.jpg", "frame_times": [], "questions": [], "choices": []}
    table = pa.Table.from_pylist([row] * EACH, schema=INDEX_SCHEMA)
    infos = []
    for shard in range(SHARDS):
        name, keys = f"large-{shard:06d}", pa.array([f"{shard:06d}{row:06d}" for row in range(EACH)])
        pq.write_table(table.set_column(0, INDEX_SCHEMA.field("key"), keys), folder / f"{name}.parquet")
        os.link(folder / "frames", folder / f"{name}.tar")
        size = (folder / "frames").stat().st_size
        infos.append(ShardInfo(f"{name}.tar", EACH, EACH, EACH, 0, 0, size, "0", 1, "0"))
    corpus = Corpus(str(folder), "large", "image", tuple(infos))
    (folder / "corpus.json").write_text(corpus.to_json())
    return str(folder)


@pytest.mark.slow
def test_resuming_is_equally_fast_anywhere_in_a_million_samples(million: str, tokenizer: Tokenizer) -> None:
    seconds = {}
    for share in (0.0, 0.01, 0.5, 0.99):
        config = LoaderConfig(batch_size=PerMedia(128), image_res=32, decode="cpu", threads=2)
        began = time.perf_counter(), time.process_time()
        loader = TrainLoader([million], tokenizer, config)
        loader.load_state_dict({"epoch": 3, "step": int(share * loader.steps_per_epoch)})
        batch = next(iter(loader))
        seconds[share] = (time.perf_counter() - began[0], time.process_time() - began[1])
        assert batch.step == int(share * loader.steps_per_epoch)
        assert len(set(batch.keys)) == 128
        loader.close()
    assert all(min(times) < 2 for times in seconds.values()), seconds  # of this process alone, were others busy


def test_a_killed_run_resumes_with_the_same_batches(shapes, tokenizer: Tokenizer) -> None:
    """The first half runs in a process that SIGKILL ends; all it leaves is the state it had printed."""
    corpora = [shapes.url("images_train"), shapes.url("clips_train")]
    settings = "batch_size=PerMedia(12, 6), image_res=32, decode='cpu', threads=1, stripes=8"
    settings += ", video_input=VideoInput(num_frames=2), corpus_weights={'clips_train': 1.5}"
    program = f"""
import os, signal
from loaders.config import LoaderConfig, PerMedia, VideoInput
from preprocessing.text import Tokenizer
from loaders.train import TrainLoader
loader = TrainLoader({corpora}, Tokenizer.load({str(shapes.vocab)!r}), LoaderConfig({settings}))
for number, batch in enumerate(loader):
    print(loader.state_dict(), flush=True)
    if number == 8:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = eval(killed.stdout.splitlines()[-1], {})
    config = eval(f"LoaderConfig({settings})")
    whole = list(TrainLoader(corpora, tokenizer, config))
    for world_size in (1, 2, 3):
        loaders = [TrainLoader(corpora, tokenizer, config, rank, world_size) for rank in range(world_size)]
        for rank, loader in enumerate(loaders):
            loader.load_state_dict(state)
            rest = list(loader)
            assert len(rest) == len(whole) - 9
            for mine, expected in zip(rest, whole[9:], strict=True):
                assert mine.keys == expected.keys[rank::world_size]
                for name in ("frames", "input_ids", "attention_mask", "idx"):
                    assert torch.equal(getattr(mine, name), getattr(expected, name)[rank::world_size]), name
            loader.close()


def open_files(process: int) -> list[str]:
    found = []
    for file in Path(f"/proc/{process}/fd").iterdir():
        with suppress(FileNotFoundError):  # that of this listing
            found.append(file.readlink().name)
    return found


@pytest.mark.slow
def test_memory_threads_and_files_do_not_grow_over_twenty_epochs(shapes, tokenizer: Tokenizer) -> None:
    config = LoaderConfig(
        batch_size=PerMedia(24, 8), image_res=96, decode="cpu", threads=2, video_input=VideoInput(num_frames=4)
    )
    loader = TrainLoader([shapes.url("images_train"), shapes.url("clips_train")], tokenizer, config)
    process = psutil.Process()
    after = []
    for _ in range(21):
        for batch in loader:
            assert batch.frames.numel()
        gc.collect()
        everyone = [process, *process.children()]
        assert len(everyone) == 3  # two that decode
        memory = sum(one.memory_info().rss for one in everyone) / 2**20
        files = [name for one in everyone for name in open_files(one.pid)]
        frames = sum(name.startswith("memfd:frames") for name in files)  # how many batches were on their way differs
        assert frames <= 2 * (MemoryPool.KEPT + 8)  # free and under way; Python's mmap keeps a descriptor of its own
        after.append((memory, threading.active_count(), len(files) - frames))
    memories, threads, others = zip(*after, strict=True)
    assert max(memories[1:]) - memories[0] < 50, memories
    assert max(threads[1:]) <= threads[0]
    assert max(others[1:]) <= others[0], others
    loader.close()


def test_control_c_ends_a_loop(shapes, tmp_path: Path) -> None:
    """Whatever the threads are at: reading, decoding, or waiting for a loop that is slow to take a batch."""
    shutil.copy(shapes.vocab, tmp_path / "vocab.txt")
    program = f"""
import time
from loaders.config import LoaderConfig, PerMedia
from preprocessing.text import Tokenizer
from loaders.train import TrainLoader
loader = TrainLoader([{shapes.url("images_train")!r}], Tokenizer.load({str(tmp_path)!r}),
                     LoaderConfig(batch_size=PerMedia(12), image_res=64, decode="cpu", threads=2))
while True:
    for batch in loader:
        print("batch", flush=True)
        time.sleep(0.01)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.readline() == "batch\n"
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    _, stderr = process.communicate(timeout=60)
    assert time.perf_counter() - began < 10  # the rest is the interpreter's own end, on a busy machine
    assert "KeyboardInterrupt" in stderr
    assert process.returncode in (1, 130, -signal.SIGINT)
