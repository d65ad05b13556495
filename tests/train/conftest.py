"""Fixtures of this folder."""

import pytest
from small_run import make_corpora


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """Folder with packed Shapes, vocab.txt and tiny.yaml."""
    return make_corpora(tmp_path_factory.mktemp("corpora"))
