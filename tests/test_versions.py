"""Versions: the tested ones lie within the bounds of setup.cfg; the metadata, the page and hosted CI name the same."""

import configparser
import re
import sys
from importlib.metadata import version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from places import ROOT

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
REQUIREMENTS = {found.name: found for found in map(Requirement, SETUP["options"]["install_requires"].split())}
PINNED = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PYTHONS = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])


@pytest.mark.parametrize("name", ["timm", "transformers", "deepspeed"])
def test_tested_versions_are_within_the_bounds(name):
    bounds = REQUIREMENTS[name].specifier
    assert any(bound.operator in ("<", "<=") for bound in bounds)
    assert bounds.contains(PINNED[name])
    installed = version(name)
    newest = Version(installed) > Version(PINNED[name])  # make test-newest
    assert newest or bounds.contains(installed)


def test_python_versions_are_the_same_everywhere():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == PYTHONS
    rows = re.findall(r"^\| Python (3\.\d+)", (ROOT / "docs/installing.md").read_text(), re.MULTILINE)
    assert rows == PYTHONS
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in PYTHONS


def test_hosted_ci_runs_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]["steps"]
    run = [step.get("run", "") for step in steps]
    called = {word for line in run for word in line.split()[1:] if "=" not in word}
    assert {"lint", "packages", "test"} <= called <= targets
