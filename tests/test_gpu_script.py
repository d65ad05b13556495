"""`benchmarks/gpu.sh`: everything that is worth measuring on a GPU, in one command; here on a CPU, in small."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOADS = {
    "a": [
        "versions", "losses", "pretrain", "pretrain_large", "straightforward", "profile", "finetune", "evaluation",
        "evaluation_large", "host", "compile",
    ],
    "b": ["pictures", "decoding", "stream_dali", "stream_cpu", "pretrain_dali", "run", "damaged"],
}  # fmt: skip


def gpu_script(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def lines(result: subprocess.CompletedProcess) -> dict[str, dict]:
    """The parts' results: the last lines of the output, and nothing else after the first of them."""
    output = result.stdout.splitlines()
    first = next(number for number, line in enumerate(output) if line.startswith('{"part"'))
    return {entry["part"]: entry for entry in map(json.loads, output[first:])}


@pytest.fixture
def quick(tmp_path):
    """Variables for a run on corpora that are packed, where `python` prints a figure, fails or hangs at once."""
    for name in ("photos/corpus.json", "clips/corpus.json", "vocab.txt"):
        (tmp_path / "corpora" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpora" / name).touch()
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'  *gpu_results.py*) exec {sys.executable} "$@" ;;\n'
        "  *losses*) echo not far enough >&2; exit 1 ;;\n"
        "  *stream*|*loaders.bench*) sleep 1000 ;;\n"
        '  *) echo words; echo "{\\"figure\\": 1}" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    return {
        "SMALL": "1", "CORPORA": str(tmp_path / "corpora"), "PATH": f"{python.parent}:{os.environ['PATH']}"
    }  # fmt: skip


def test_without_a_gpu_it_says_what_can_be_had(tmp_path):
    result = gpu_script(tmp_path)
    assert result.returncode == 2
    assert "finds no GPU here. SMALL=1 tries the same parts on a CPU" in result.stderr


def test_a_load_has_its_parts_and_ends_with_a_line_of_json_for_each(tmp_path, quick):
    result = gpu_script(tmp_path / "out", PARTS="a", **quick)
    found = lines(result)
    assert list(found) == LOADS["a"]
    assert found["pretrain"] == {"part": "pretrain", "status": "ok", "seconds": 0, "figures": {"figure": 1}}
    with tarfile.open(tmp_path / "out/results.tgz") as archive:
        assert {"gpu/pretrain.txt", "gpu/losses.log", "gpu/summary.txt", "gpu/results.jsonl"} <= set(archive.getnames())


def test_a_part_that_fails_is_told_and_the_others_stand(tmp_path, quick):
    result = gpu_script(tmp_path / "out", PARTS="versions losses compile", **quick)
    assert result.returncode == 1
    assert {name: entry["status"] for name, entry in lines(result).items()} == {
        "versions": "ok", "losses": "failed", "compile": "ok",
    }  # fmt: skip
    assert lines(result)["losses"]["error"] == "not far enough"
    assert "failed, " in (tmp_path / "out/summary.txt").read_text()


def test_a_part_that_hangs_is_ended_and_what_no_longer_fits_is_skipped(tmp_path, quick):
    result = gpu_script(tmp_path / "out", PARTS="decoding stream_cpu damaged", LIMIT="5", **quick)
    assert result.returncode == 1
    assert {name: entry["status"] for name, entry in lines(result).items()} == {
        "decoding": "ok", "stream_cpu": "timeout", "damaged": "skipped",
    }  # fmt: skip
    assert lines(result)["stream_cpu"]["seconds"] < 10


def test_run_again_it_goes_on_after_what_is_done(tmp_path, quick):
    gpu_script(tmp_path / "out", PARTS="versions losses", **quick)
    (tmp_path / "out/versions.txt").write_text('{"figure": "of the first time"}\n')
    again = lines(gpu_script(tmp_path / "out", PARTS="versions losses", **quick))
    assert again["versions"]["figures"] == {"figure": "of the first time"}
    assert again["losses"]["status"] == "failed"


def test_parts_that_do_not_exist_are_an_error(tmp_path, quick):
    result = gpu_script(tmp_path / "out", PARTS="pretraining", **quick)
    assert result.returncode == 2
    assert "PARTS=pretraining names no part" in result.stderr


def test_corpora_that_are_not_complete_are_an_error(tmp_path, quick):
    (tmp_path / "corpora/clips/corpus.json").unlink()
    result = gpu_script(tmp_path / "out", **quick)
    assert result.returncode == 2
    assert f"lacks {tmp_path}/corpora/clips/corpus.json: pack it" in result.stderr


def test_without_its_drawn_corpus_it_ends(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps/shapes").touch()
    result = gpu_script(tmp_path, SMALL="1")
    assert result.returncode != 0
    assert "shapes/media does not exist" in result.stderr
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["shapes"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_part_runs_and_the_results_hold_them_all(tmp_path):
    result = gpu_script(tmp_path, SMALL="1", LIMIT="1100")
    assert result.returncode == 0, result.stdout + result.stderr
    found = lines(result)
    assert list(found) == [*LOADS["a"], *LOADS["b"]]
    assert {entry["status"] for entry in found.values()} == {"ok"}
    figures = {name: entry["figures"] for name, entry in found.items()}
    assert figures["losses"]["cpu bf16"]["ok"]
    assert set(figures["pretrain"]["samples_per_second"]) == {"path", "engine", "plain"}
    assert "data_wait_percent" in figures["pretrain_dali"]
    assert "speedup_forward_backward" in figures["straightforward"][2]
    assert figures["evaluation"]["faster"] > 0
    assert figures["compile"]["compile"]
    assert figures["host"][-1].startswith("all three: DeepSpeed's norm / ours")
    assert figures["profile"]["waits"] == "not counted: no GPU"
    assert len(figures["decoding"]["images_per_second"]) == 7
    assert figures["stream_dali"]["backend"] == "dali"
    assert figures["stream_cpu"]["backend"] == "cpu"
    assert figures["run"]["every_step_once"]
    assert figures["run"]["difference"] == "0.0e+00"  # on a CPU
    assert set(figures["damaged"]["damaged"].values()) <= {"named", "shown"}
    assert len("".join(result.stdout.splitlines()[-len(found) :])) < 12_000
