"""`benchmarks/gpu.sh`: all measurements on a GPU in one command; here on a CPU with small sizes."""

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from places import ROOT

LOADS = {
    "a": [
        "versions", "losses", "pretrain", "pretrain_large", "straightforward", "profile", "finetune", "evaluation",
        "evaluation_large", "compile",
    ],
    "b": ["pictures", "run", "stream_dali", "pretrain_dali", "decoding", "stream_cpu", "damaged"],
}  # fmt: skip
BOTH = [*LOADS["a"][:-1], *LOADS["b"], "compile"]


def gpu_script(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    environment.pop("DS_ACCELERATOR", None)
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def lines(result: subprocess.CompletedProcess) -> dict[str, dict]:
    """The parts' results: the last lines of the output, and nothing else after the first of them."""
    output = result.stdout.splitlines()
    first = next(number for number, line in enumerate(output) if line.startswith('{"part"'))
    return {entry["part"]: entry for entry in map(json.loads, output[first:])}


@pytest.fixture
def corpora(tmp_path):
    """Corpora that pass the script's check for packed ones."""
    for name in ("photos/corpus.json", "clips/corpus.json", "vocab.txt"):
        (tmp_path / "corpora" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpora" / name).touch()
    return str(tmp_path / "corpora")


@pytest.fixture
def program(tmp_path):
    """Puts a shell program in place of one in PATH; gives the new PATH."""

    def replace(name: str, text: str) -> str:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return f"{path.parent}:{os.environ['PATH']}"

    return replace


@pytest.fixture
def quick(corpora, program):
    """Variables for a run where `python` prints a figure, fails or hangs at once."""
    path = program(
        "python",
        'case "$*" in\n'
        f'  *gpu_results.py*) exec {sys.executable} "$@" ;;\n'
        "  *losses*) echo not far enough >&2; exit 1 ;;\n"
        "  *loaders.bench*) sleep 1000 ;;\n"
        '  *) echo words; echo "{\\"figure\\": 1}" ;;\n'
        "esac",
    )
    return {"SMALL": "1", "CORPORA": corpora, "PATH": path}


@pytest.fixture
def on_gpu(tmp_path, corpora, program):
    """Variables for a run as on a GPU that only records its commands."""
    program("python", f'case "$*" in -c*) ;; *) exec {sys.executable} "$@" ;; esac')
    path = program("timeout", f"printf '%s\\n' \"$@\" '' >>{tmp_path}/commands")
    return {"CORPORA": corpora, "PATH": path, "LIMIT": "10000"}


def recorded_commands(folder: Path) -> list[tuple[int, str, list[str]]]:
    """Limit, module and arguments of each command that the script would have run."""
    found = []
    for command in (folder / "commands").read_text().removesuffix("\n\n").split("\n\n"):
        _, _, limit, _, script, *arguments = command.split("\n")  # timeout -k 5 LIMIT python SCRIPT
        module = arguments.pop(0) if script == "-m" else script.removesuffix(".py").replace("/", ".")
        found.append((int(limit), module, arguments))
    return found


def test_an_unusable_gpu_is_reported_with_the_reason(tmp_path, program):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    elsewhere = f"import pathlib, train.job.gpus; train.job.gpus.DEVICES = pathlib.Path('{tmp_path}/dev')"
    path = program("python", f'exec {sys.executable} -c "{elsewhere}\n$2"')
    result = gpu_script(tmp_path / "out", PATH=path, CUDA_VISIBLE_DEVICES="99")
    assert result.returncode == 2
    assert f"this host has an NVIDIA GPU ({tmp_path}/dev/nvidia0), but PyTorch" in result.stderr
    assert "SMALL=1 runs the same parts on a CPU" in result.stderr


def test_on_a_gpu_every_script_gets_valid_arguments_and_fits_into_its_limit(tmp_path, on_gpu):
    result = gpu_script(tmp_path / "out", **on_gpu)
    assert list(lines(result)) == BOTH, result.stderr
    commands = recorded_commands(tmp_path)
    options = [importlib.import_module(module).parser().parse_args(given) for _, module, given in commands]
    profile, compiled = (options[BOTH.index(name)] for name in ("profile", "compile"))
    assert (profile.steps, profile.blocks, profile.threads) == (10, 2, 0)
    assert compiled.compile
    limits = dict(zip(BOTH, (limit for limit, _, _ in commands), strict=True))
    documented = dict(re.findall(r"PARTS=([ab]) LIMIT=(\d+)", (ROOT / "benchmarks/gpu.sh").read_text()))
    assert limits["versions"] + limits["losses"] < int(documented["a"])
    assert limits["pictures"] + limits["run"] + limits["damaged"] <= int(documented["b"])
    start_and_transfers = 90 + 40
    assert int(documented["a"]) + int(documented["b"]) + start_and_transfers <= 15 * 60


def test_a_load_ends_with_a_line_of_json_per_part(tmp_path, quick):
    result = gpu_script(tmp_path / "out", PARTS="a", **quick)
    found = lines(result)
    assert list(found) == LOADS["a"]
    assert found["pretrain"] == {"part": "pretrain", "status": "ok", "seconds": 0, "figures": {"figure": 1}}
    with tarfile.open(tmp_path / "out/results.tgz") as archive:
        assert {"gpu/pretrain.txt", "gpu/losses.log", "gpu/summary.txt", "gpu/results.jsonl"} <= set(archive.getnames())


@pytest.mark.parametrize(
    ("parts", "limit", "statuses"),
    [
        ("versions losses compile", "", ["ok", "failed", "ok"]),
        ("pictures stream_dali decoding", "5", ["ok", "timeout", "skipped"]),
        ("stream_cpu damaged", "24", ["timeout", "ok"]),  # no measurement takes the time of the last check
    ],
)
def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path, quick, parts, limit, statuses):
    result = gpu_script(tmp_path / "out", PARTS=parts, **({"LIMIT": limit} if limit else {}), **quick)
    found = lines(result)
    assert result.returncode == 1
    assert [found[name]["status"] for name in parts.split()] == statuses
    if "losses" in found:
        assert found["losses"]["error"] == "not far enough"
        assert "failed, " in (tmp_path / "out/summary.txt").read_text()
    if "stream_dali" in found:
        assert found["stream_dali"]["seconds"] < 10


def test_a_second_run_continues_after_the_finished_parts(tmp_path, quick):
    gpu_script(tmp_path / "out", PARTS="versions losses", **quick)
    (tmp_path / "out/versions.txt").write_text('{"figure": "of the first time"}\n')
    again = lines(gpu_script(tmp_path / "out", PARTS="versions losses", **quick))
    assert again["versions"]["figures"] == {"figure": "of the first time"}
    assert again["losses"]["status"] == "failed"


def test_wrong_input_is_an_error(tmp_path, quick):
    for variables, message in (
        ({}, "finds no GPU here. SMALL=1 runs the same parts on a CPU"),
        ({**quick, "PARTS": "pretraining"}, "PARTS=pretraining names no part"),
        ({**quick, "CORPORA": str(tmp_path)}, f"{tmp_path}/vocab.txt: pack it"),
    ):
        result = gpu_script(tmp_path / "out", **variables)
        assert result.returncode == 2
        assert message in result.stderr


def test_without_its_generated_corpus_it_fails(tmp_path):
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
    assert list(found) == BOTH
    assert {entry["status"] for entry in found.values()} == {"ok"}
    figures = {name: entry["figures"] for name, entry in found.items()}
    assert figures["losses"]["cpu bf16"]["ok"]
    assert set(figures["pretrain"]["samples_per_second"]) == {"path", "engine", "plain"}
    assert "data_wait_percent" in figures["pretrain_dali"]
    assert "speedup_forward_backward" in figures["straightforward"][2]
    assert figures["evaluation"]["faster"] > 0
    assert figures["compile"]["compile"]
    assert [name for figure in figures["profile"] for name in figure] == ["step_ms", "waits", "trace", "cudnn"]
    assert figures["profile"][1]["waits"] == "not counted: no GPU"
    assert len(figures["decoding"]["images_per_second"]) == 7
    assert figures["stream_dali"]["backend"] == "dali"
    assert figures["stream_cpu"]["backend"] == "cpu"
    assert figures["run"]["every_step_once"]
    assert figures["run"]["difference"] == "0.0e+00"  # on a CPU
    assert figures["run"]["deterministic_equal"] is True
    assert set(figures["damaged"]["damaged"].values()) <= {"named", "shown"}
    assert len("".join(result.stdout.splitlines()[-len(found) :])) < 12_000
