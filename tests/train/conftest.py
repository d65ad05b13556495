"""Fixtures of this folder."""

import pytest
from small_run import free_port, make_corpora

from runtime.ranks import Ranks
from train.job.devices import device_for, start_processes


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """Folder with packed Shapes, vocab.txt and tiny.yaml."""
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def one_process():
    """A group of one process, as a plain `python` launch has it."""
    with pytest.MonkeyPatch.context() as patch:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for key, value in {**alone, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(key, value)
        start_processes(device_for(Ranks()), 0.0)
        yield
