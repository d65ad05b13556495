"""Fixtures of this folder: the tiny corpora and launches of tests/train."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "train"))

from small_run import make_corpora


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """Folder with packed Shapes, vocab.txt and tiny.yaml."""
    return make_corpora(tmp_path_factory.mktemp("corpora"))
