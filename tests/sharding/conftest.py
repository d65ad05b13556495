"""A packed corpus of clips that a test may change."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def clips(shapes, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes.url("clips_train"), tmp_path / "clips"))
