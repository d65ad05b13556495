"""Fixtures of this folder, beside the launches of tests/train."""

import contextlib
import socket
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "train"))

from small_run import make_corpora


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """Folder with packed Shapes, vocab.txt and tiny.yaml."""
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def usual_port():
    """Occupies the port that launchers choose by default, as another job on this machine does."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # another job has it already
            listener.bind(("", 29500))
            listener.listen()
        yield
