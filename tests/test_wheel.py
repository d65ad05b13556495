"""What pip installs from this folder is whole: everything works from a wheel, in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from object_stores import free_port
from places import ROOT

pytestmark = pytest.mark.timeout(600)


PACKAGES = ("runtime", "storage", "sharding", "preprocessing", "loaders", "model", "train", "eval", "launch")
RECIPES = ("configs", "deepspeed_configs")
HOME = "singularity_at_scale"  # of recipes and pages in a wheel


def files_below(folder: Path) -> set[str]:
    """What a reader sees in a folder of the checkout, relative to the checkout's own."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in paths}


def build(kind: str, source: Path, target: Path) -> Path:
    """A wheel, an sdist or an editable wheel, by the backend that pip calls, without a word of warning.

    Without pip's isolation, which would need a network.
    """
    program = f"import setuptools.build_meta as backend; backend.build_{kind}({str(target)!r})"
    target.mkdir(exist_ok=True)
    result = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    (path,) = target.iterdir()
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the builds read, so that they leave nothing here."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, folder)
    for name in (*PACKAGES, *RECIPES, "docs", HOME):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def site(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages with the wheel in it."""
    wheel = build("wheel", sources, tmp_path_factory.mktemp("built") / "wheel")
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture
def environment(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a shell in an empty folder with the wheel installed, which comes before this checkout."""
    outside = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**outside, **quiet, "PYTHONPATH": str(site), "PATH": path}


def run(environment: dict[str, str], folder: Path, *words: object) -> str:
    """A command in `folder`; its output."""
    command = [sys.executable if word == "python" else str(word) for word in words]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
    return result.stdout


def test_a_wheel_holds_every_file_of_its_packages_and_every_recipe(site: Path) -> None:
    expected = set().union(*(files_below(ROOT / package) for package in PACKAGES))
    expected |= {f"{HOME}/{name}" for folder in RECIPES for name in files_below(ROOT / folder)}
    expected |= {f"{HOME}/{name}" for name in files_below(ROOT / "docs") if name.endswith(".md")}
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {name for name in found if ".dist-info/" not in name} == expected


def test_an_sdist_builds_the_same_wheel(site: Path, sources: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", sources, tmp_path / "sdist")) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("singularity_at_scale-*")
    wheel = zipfile.ZipFile(build("wheel", unpacked, tmp_path / "wheel"))
    for name in wheel.namelist():
        assert wheel.read(name) == (site / name).read_bytes() or ".dist-info/" in name, name
    assert {*wheel.namelist()} == {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}


def test_an_editable_installation_gives_this_folder(sources: Path, tmp_path: Path) -> None:
    wheel = zipfile.ZipFile(build("editable", sources, tmp_path / "wheel"))
    (name,) = [name for name in wheel.namelist() if name.endswith(".pth")]
    assert wheel.read(name).decode().strip() == str(sources)


def test_a_wheel_and_its_checkout_are_the_same_code_to_the_doctor(site: Path, environment: dict[str, str]) -> None:
    program = ("python", "-c", "from launch.doctor import probe; print(probe.__file__, probe.code_hash())")
    path, code = run(environment, site.parent, *program).split()
    assert Path(path).is_relative_to(site)
    assert run({**environment, "PYTHONPATH": str(ROOT)}, site.parent, *program).split()[1] == code


def test_jobs_of_slurm_start_from_any_folder(site: Path, environment: dict[str, str], tmp_path: Path) -> None:
    for name, text in {"srun": 'printf "%s\\n" "$@" > srun.txt', "scontrol": "echo node1"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"NODELIST": "node1", "ID": "1", "NUM_NODES": "1"}
    variables = {f"SLURM_JOB_{key}": value for key, value in job.items()} | {"SLURM_CPUS_ON_NODE": "2"}
    variables |= {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{tmp_path}:{environment['PATH']}"}
    for path in (site / "launch/slurm").glob("*.sbatch"):
        if path.stem != "build":
            shutil.copy(path, tmp_path / "slurm_script")  # as sbatch does
            run({**environment, **variables}, "/", "bash", tmp_path / "slurm_script", "configs/a.yaml")
            told = (tmp_path / "srun.txt").read_text().splitlines()
            assert told[-4:] == ["-u", "-m", f"launch.{path.stem}", "configs/a.yaml"]


# Modules that a folder of one's own may have: of our packages, of PyTorch, of Python itself.
STRANGERS = ("eval", "json", "launch", "loaders", "model", "random", "runtime", "sharding", "storage", "torch", "train")
PLUGIN = """
import os
from pathlib import Path

Path(f"plugin_{os.environ.get('RANK')}").touch()
"""


@pytest.fixture
def singularity(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console command, as pip writes it for the wheel."""
    (distribution,) = distributions(path=[str(site)])
    (found,) = distribution.entry_points
    script = tmp_path_factory.mktemp("bin") / "singularity"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom {found.module} import {found.attr}\n")
    with script.open("a") as file:
        file.write(f"if __name__ == '__main__':\n    sys.exit({found.attr}())\n")
    script.chmod(0o755)
    return script


def test_a_session_in_a_folder_with_modules_of_the_same_names(
    environment: dict[str, str], singularity: Path, tmp_path: Path
) -> None:
    for name in STRANGERS:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working folder is imported')\n")
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    two = ("--num_accelerators", 2, "--master_port", free_port())
    smaller = ("train_corpus=data/train", "batch_size.image=8", "max_steps=2", "log_every=1", "plugins=[my_plugin]")
    options = {"shapes": ("--images", 80, "--test-items", 8, "--size", 64, "--workers", 2), "pretrain": smaller}
    shown = {}
    for line in re.findall(r"^singularity .*", (ROOT / "docs/commands.md").read_text(), re.MULTILINE):
        _, name, *words = shlex.split(line, comments=True)
        before = two if name == "pretrain" else ()
        shown[name] = run(environment, tmp_path, singularity, name, *before, *words, *options.get(name, ()))
    assert "no faults" in shown["verify"]
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert "chance test" in shown["report"]
    assert "contact sheet: hits.jpg" in shown["search"]
    loaded = {path.name for path in tmp_path.glob("plugin_*")}
    assert loaded >= {"plugin_0", "plugin_1"}
    made = {"shapes", "data", "run", "report.html", "hits.jpg", "my_plugin.py"} | loaded
    assert {path.name for path in tmp_path.iterdir()} == made | {f"{name}.py" for name in STRANGERS}


@pytest.mark.slow
def test_a_session_in_an_empty_folder(site: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """The demo's script, as installed: draw, pack, train, evaluate, fine-tune and report; then search."""
    run(environment, tmp_path, "bash", site / "launch/demo.sh")
    assert "appearance" in (tmp_path / "demo/report.html").read_text()
    search = ("demo/finetune", "demo/shards/clips_test_appearance", "a red circle", "--output", "page.html")
    assert "demo/shards" in run(environment, tmp_path, "python", "-m", "eval.search", *search)
