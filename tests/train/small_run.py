"""A tiny corpus, a tiny model, and real launches of them, for the tests of training."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import job_worker
import torch
from object_stores import free_port
from places import ROOT

from loaders.vocab import learn_vocabulary
from sharding.build import build_corpus
from sharding.shapes import write_shapes

SIZE = 32
# What this machine's processor computes in; not all have arithmetic for fp16, which is then refused.
PRECISIONS = ("fp32", "bf16", "fp16") if torch.ops.mkldnn._is_mkldnn_fp16_supported() else ("fp32", "bf16")
SEARCHED = list(sys.path)  # before any test adds to it
VARYING = ("samples_per_second", "data_wait", "memory_gb")

CONFIG = f"""
train_corpus: ["${{data_root}}/images_train", "${{data_root}}/clips_train"]
test_corpus: {{images: "${{data_root}}/images_test", motion: "${{data_root}}/clips_test_motion"}}
tokenizer: ${{data_root}}/vocab.txt
vision_encoder: {{type: vit, patch_size: 16, width: 32, depth: 2, heads: 2, drop_path: 0.1}}
text_encoder: {{width: 32, layers: 3, fusion_layer: 2, heads: 2, intermediate: 64, max_positions: 32, dropout: 0.1}}
image_res: {SIZE}
embed_dim: 16
max_txt_l: {{image: 12, video: 12}}
batch_size: {{image: 8, video: 4}}
batch_size_test: {{image: 8, video: 8}}
k_test: 4
optimizer: {{lr: 1.0e-3, max_grad_norm: 1.0}}
scheduler: {{epochs: 4, warmup_epochs: 1}}
precision: fp32
deepspeed: deepspeed_configs/cpu.json
log_every: 1
save_every: 5
"""


def make_corpora(folder: Path) -> Path:
    """Packed Shapes, a vocabulary and `tiny.yaml` in `folder`; 8 steps an epoch (5 of images, 3 of clips)."""
    shapes = write_shapes(folder / "shapes", images=40, clips=12, test_items=8, size=SIZE)
    for name in ("images_train", "images_test", "clips_train", "clips_test_motion"):
        kind = "image" if name.startswith("images") else "video"
        annotations = [str(shapes / f"{name}.json")]
        build_corpus(annotations, str(shapes / "media"), kind, str(folder / name), size=SIZE, fps=4, workers=1)
    learn_vocabulary([str(folder / "images_train"), str(folder / "clips_train")], 300, folder / "vocab.txt")
    (folder / "tiny.yaml").write_text(CONFIG.replace("${data_root}", str(folder)))
    return folder


def environment() -> dict[str, str]:
    """As a user's shell, with DeepSpeed on the CPU."""
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**outside, **quiet, "DS_ACCELERATOR": "cpu"}


def command(script: str, *arguments: object, processes: int = 2) -> list[str]:
    """The command line of `deepspeed launch/SCRIPT.py ARGUMENTS`, or of a plain python for one process."""
    words = [str(ROOT / "launch" / f"{script}.py"), *map(str, arguments)]
    if processes == 1:
        return [sys.executable, *words]
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_accelerators", str(processes), "--master_port", str(free_port()), *words]


def run(script: str, *arguments: object, processes: int = 2) -> subprocess.CompletedProcess:
    """Run to the end; returns exit code and output."""
    words = command(script, *arguments, processes=processes)
    if processes > 1:
        return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    with TemporaryDirectory() as folder:
        shown = Path(folder, "stdout"), Path(folder, "stderr")
        process = _start_warm(job_worker.script, environment(), *shown, *words[1:])
        process.join(300)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"{words} still runs after 300 s")
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in shown))


def _start_warm(run: Callable, variables: dict[str, str], *words: object) -> Process:
    """Start `job_worker.forked` in a fork of a process that has imported PyTorch and DeepSpeed already."""
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload(job_worker.PRELOADED)
    with mock.patch.dict(os.environ, environment()):
        forkserver.ensure_running()
    process = warm.Process(target=job_worker.forked, args=(run, Path.cwd(), variables, SEARCHED, *words))
    process.start()
    return process


def start(script: str, *arguments: object, log: Path, processes: int = 2) -> subprocess.Popen:
    """Start in a process group of its own, output into `log`."""
    with log.open("a") as output:
        return subprocess.Popen(
            command(script, *arguments, processes=processes),
            env=environment(), stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def job(entry: str, config: object, *settings: object) -> dict:
    """A launch for `run_jobs`."""
    return {"entry": entry, "config": str(config), "settings": list(map(str, settings))}


def _write_jobs(folder: Path, jobs: list[dict]) -> Path:
    """A file of its own in `folder` that describes the jobs."""
    path = folder / f"jobs_{len(list(folder.glob('jobs_*.json')))}.json"
    path.write_text(json.dumps(jobs))
    return path


def _start_ranks(path: Path, output: Path, processes: int) -> list[Process]:
    """Start a process for each rank."""
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    variables = {**environment(), **world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [_start_warm(job_worker.main, own, output, output, path) for own in ranks]


def run_jobs(folder: Path, jobs: list[dict], processes: int = 2, timeout: int = 600) -> str:
    """Run launches one after another in the same processes; fails with the first one's error. Returns the output."""
    path = _write_jobs(folder, jobs)
    output = path.with_suffix(".output")
    started = running = _start_ranks(path, output, processes)
    deadline = time.monotonic() + timeout
    try:
        while running and not any(process.exitcode for process in started):
            left = deadline - time.monotonic()
            if not connection.wait([process.sentinel for process in running], left):
                raise TimeoutError(f"{jobs} still run after {timeout} s: {output.read_text()}")
            running = [process for process in running if process.is_alive()]
    finally:
        for process in running:  # the others wait for a rank that failed
            process.kill()
            process.join()
    reported = [each.read_text() for each in sorted(folder.glob(f"{path.stem}.[0-9]*"))]
    failures = [failure for text in reported for failure in json.loads(text) if failure]
    assert not failures, "\n".join(failures)
    assert not any(process.exitcode for process in started), output.read_text()
    return output.read_text()


def start_jobs(
    folder: Path, jobs: list[dict], processes: int = 2, worker: str = "job_worker.py", **variables: str
) -> subprocess.Popen:
    """Start launches as `run_jobs` does, but by torchrun, in a process group of their own, by a script of this folder.

    variables: of the environment, besides.
    """
    path = _write_jobs(folder, jobs)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    words = [sys.executable, *launcher, str(Path(__file__).with_name(worker)), str(path)]
    with (folder / "shown.txt").open("a") as shown:
        return subprocess.Popen(
            words, env={**environment(), **variables}, stdout=shown, stderr=shown, start_new_session=True
        )


def learned(folder: Path) -> list[dict]:
    """What a run has logged about its steps, without what varies from run to run."""
    lines = [line for line in metrics(folder) if "loss" in line]
    return [
        {key: value for key, value in line.items() if key not in VARYING and not key.startswith("loader/")}
        for line in lines
    ]


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that are complete."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]
