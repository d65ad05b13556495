"""`benchmarks/gpu.sh`: everything that is worth measuring on a GPU, in one command; here on a CPU, in small."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "decoding", "stream_dali", "stream_cpu", "pretrain", "overhead", "finetune", "model", "evaluation", "throughput"
)  # fmt: skip
PREPARED = ("shapes", "pack_images_train", "pack_clips_train", "vocab")


def gpu_script(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)


def test_without_a_gpu_it_says_what_can_be_had(tmp_path):
    result = gpu_script(tmp_path)
    assert result.returncode == 2
    assert "finds no GPU here. SMALL=1 tries the same parts on a CPU" in result.stderr


def test_a_part_that_fails_is_told_and_the_others_stand(tmp_path):
    (tmp_path / "steps").mkdir()
    for name in (*PREPARED, *PARTS):
        if name != "stream_cpu":
            (tmp_path / "steps" / name).touch()
            (tmp_path / f"{name}.txt").write_text(f"figures of {name}\n")
    result = gpu_script(tmp_path, SMALL="1")  # without the corpus that is marked as packed
    assert result.returncode == 1
    assert "corpus.json" in result.stdout
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.count("FAILED after") == 1
    assert "figures of evaluation" in summary


def test_without_its_corpus_it_ends(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps/shapes").touch()
    result = gpu_script(tmp_path, SMALL="1")
    assert result.returncode != 0
    assert "shapes/media does not exist" in result.stderr
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["shapes"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_and_the_summary_holds_them_all(tmp_path):
    result = gpu_script(tmp_path, SMALL="1")
    assert result.returncode == 0, result.stdout + result.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert "FAILED" not in summary
    for figure in (
        '"grey_levels"', '"damaged"', "decoding alone", "2 threads, dali", "2 threads, cpu", "waiting for data",
        "path against engine", "engine against plain", "speedup_forward_backward", '"faster"', '"clips_per_second"',
    ):  # fmt: skip
        assert figure in summary.replace(f"{os.cpu_count()} threads", "2 threads"), figure
    assert summary.count("samples/s (median") == 5
