"""docs/api.md, and what the packages say is public."""

import subprocess
import sys

import pytest
from places import ROOT

from launch.api_page import PACKAGES


def test_page_is_made_of_the_docstrings():
    words = [sys.executable, "-m", "launch.api_page"]  # DeepSpeed changes the signatures of this process' classes
    page = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/api.md").read_text() == page, "python -m launch.api_page > docs/api.md"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_public_names_exist_and_say_what_they_are(package):
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name).__doc__
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # noqa: B018


def test_packages_are_imported_without_torch():
    names = ", ".join(package.__name__ for package in PACKAGES)
    program = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
