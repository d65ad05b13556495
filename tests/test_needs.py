"""Any test can be run alone with pytest: without root, a browser or a cluster; what needs them is left out by name."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from needs import leave_out
from places import ROOT

OPTIONAL = (
    "accelerate", "lightning", "playwright", "ray", "tensorboard", "wandb", "s3fs", "gcsfs", "trustme",
    "imageio_ffmpeg", "requests",
)  # fmt: skip
# A plugin of pytest that hides packages as if they had never been installed.
HIDE = f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""
AS_ANYBODY = ("unshare", "--user", "--map-user=1000")  # this user's files, and none of root's rights
# A test for each kind of need, and why it is left out.
NEEDY = {
    "tests/launch/test_slurm.py::test_a_mistake_ends_the_job_at_once": "not root, and Slurm's daemons need it",
    "tests/launch/test_two_hosts.py": "not root, and hosts of their own need network namespaces",
    "tests/sharding/test_stores_and_disks.py::test_a_read_only_disk_is_reported": "not root, and a file "
    "system of a test's own has to be mounted",
    "tests/test_object_stores.py": "s3fs not installed: `pip install s3fs`, or `make install`",
    "tests/storage/test_web.py": "trustme not installed: `pip install trustme`, or `make install`",
}


def test_optional_packages_are_imported_where_they_are_used() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top]
        assert not {name.split(".")[0] for name in names} & {*OPTIONAL}, path


def test_what_a_machine_lacks_leaves_out_the_tests_that_need_it(tmp_path: Path) -> None:
    permitted = subprocess.run([*AS_ANYBODY, "true"], capture_output=True).returncode == 0
    leave_out("" if permitted else "user namespaces are not permitted here")
    (tmp_path / "hide.py").write_text(HIDE)
    words = ["-p", "hide", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/temp", "-m", "not slow"]
    chosen = "test_optimizer or mistake_ends or two_hosts or read_only_disk or through_a_proxy or certificate"
    files = [*(name for name in NEEDY), "tests/train/test_optimizer.py"]
    result = subprocess.run(
        [*AS_ANYBODY, sys.executable, "-m", "pytest", *words, *files, "-k", chosen],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "TEST_SERVERS": str(tmp_path / "none")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    lines = result.stdout.splitlines()
    for test, reason in NEEDY.items():
        (place,) = [number for number, line in enumerate(lines) if f"left out: {reason} " in line]
        assert lines[place + 1].startswith(test)
    assert " passed" in lines[-1]


def test_the_tests_ask_for_nothing_of_the_system() -> None:
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV")
    environment = {key: value for key, value in os.environ.items() if key not in outer}
    words = ["make", "-n", "test", f"VENV={sys.prefix}"]
    plan = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "pytest" in plan.stdout
    assert not {"apt-get", "sudo"} & set(plan.stdout.split())
