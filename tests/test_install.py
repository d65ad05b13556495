"""`make install DALI=cuda12` and `make install DALI=cuda13` each install torch and DALI for one CUDA major version."""

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
from places import ROOT

# What pip would take on a Linux machine with a GPU. Not for the Python that runs the tests: an index beside PyPI may
# have a build of torch for the CPU for that one.
PYTHON = "3.12" if sys.version_info < (3, 12) else "3.11"
PLATFORMS = [f"manylinux{name}_x86_64" for name in (*(f"_2_{minor}" for minor in range(28, 4, -1)), "2014", "1")]
UNREACHABLE = ("connection", "temporary failure", "timed out", "proxy", "no matching distribution found for torch")


def make(*words):
    """What the Makefile would do, whatever a `make test` around this has been given."""
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "DALI", "EXTRAS", "VENV")
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    return subprocess.run(["make", "-n", *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def requirements(variant, venv):
    """Packages that the Makefile's calls of pip name, extras included; the common packages; the constraints."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = make("install", f"DALI={variant}", f"VENV={venv}").stdout.splitlines()
    named, constraints = [], set()
    for line in (line for line in lines if "-m pip" in line and "--constraint" in line):
        words = shlex.split(line.partition(" install ")[2])
        constraints |= {path for option, path in pairwise(words) if option == "--constraint"}
        named += [word for word in words if word[0] not in "-." and word not in constraints]
        if f".[{variant}," in line:
            named += parser["options.extras_require"][variant].split()
    return named, parser["options"]["install_requires"].split(), sorted(constraints)


def resolve(tmp_path, wanted, constraints, *options):
    """{name: metadata} of what pip would install; skips where no package index is there."""
    report = tmp_path / "report.json"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", *options]
    words += ["--only-binary=:all:", "--python-version", PYTHON, *(f"--platform={name}" for name in PLATFORMS)]
    words += ["--target", str(tmp_path / "target"), "--report", str(report), *wanted]
    words += [word for path in constraints for word in ("--constraint", path)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if result.returncode and any(sign in result.stderr.lower() for sign in UNREACHABLE):
        pytest.skip("no package index with CUDA builds of torch can be reached")
    assert result.returncode == 0, result.stderr
    found = [each["metadata"] for each in json.loads(report.read_text())["install"]]
    return {each["name"].lower(): each for each in found}


def cuda_of_torch(metadata):
    """The CUDA major version that a wheel of torch asks for."""
    asked = "\n".join(metadata["requires_dist"])
    found = set(re.findall(r"-cu(\d\d)\b", asked)) | set(re.findall(r"^cuda-toolkit\S*==(\d+)", asked, re.MULTILINE))
    (major,) = found
    return major


@pytest.mark.parametrize("variant", ["cuda12", "cuda13"])
def test_torch_and_dali_are_for_the_same_cuda(variant, tmp_path):
    named, _, constraints = requirements(variant, tmp_path / "venv")
    wanted = [each for each in named if each.startswith(("torch", "nvidia-dali"))]
    found = resolve(tmp_path, wanted, constraints, "--no-deps")
    (dali,) = [name for name in found if name.startswith("nvidia-dali-cuda")]
    major = variant.removeprefix("cuda")
    assert dali == f"nvidia-dali-cuda{major}0"
    assert cuda_of_torch(found["torch"]) == major
    asked = {re.sub(r"[ ()]", "", each) for each in found["torchvision"]["requires_dist"]}
    assert f"torch=={found['torch']['version']}" in asked


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["cuda12", "cuda13"])
def test_all_packages_of_a_variant_go_together(variant, tmp_path):
    named, common, constraints = requirements(variant, tmp_path / "venv")
    wanted = [each for each in [*named, *common] if not each.startswith("deepspeed")]  # PyPI has its source only
    found = resolve(tmp_path, wanted, constraints)
    assert {name[-4:] for name in found if re.search(r"-cu\d\d$", name)} == {f"cu{variant.removeprefix('cuda')}"}


@pytest.mark.parametrize("variant", ["cuda12", "cuda13"])
def test_the_page_installs_with_pip_what_make_installs(variant, tmp_path):
    page = (ROOT / "docs/installing.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("pip install") and f"[{variant}]" in line]
    words = shlex.split(line.partition("#")[0])
    assert words[-1] == f".[{variant}]"
    named = [words[place + 1] for place, word in enumerate(words) if word == "--constraint"]
    assert sorted(named) == requirements(variant, tmp_path / "venv")[2]


def test_an_environment_keeps_its_variant(tmp_path):
    (tmp_path / ".ready").write_text("cuda12\n")
    other = make("install", "DALI=cuda13", f"VENV={tmp_path}")
    assert other.returncode == 2
    assert "holds the builds for cuda12: `make clean` first, or install beside it, VENV=.venv-cuda13" in other.stderr
    for words in (("install",), ("install", "DALI=cuda12"), ("clean", "DALI=cuda13")):
        assert make(*words, f"VENV={tmp_path}").returncode == 0
    os.utime(tmp_path / ".ready", (0, 0))  # setup.cfg has changed since
    assert "constraints-cuda12.txt" in make("install", f"VENV={tmp_path}").stdout
    assert "DALI=cuda11 does not exist: take cuda12 (driver 525" in make("install", "DALI=cuda11").stderr
