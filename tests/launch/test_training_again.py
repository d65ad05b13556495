"""Training again in a process in which a training has failed, as in a notebook."""

import signal
import threading

import pytest

from launch import training
from runtime.errors import UserError
from runtime.ranks import Ranks
from train.config.settings import load_settings
from train.folder import RunFolder
from train.job.stopping import SIGNALS


def test_a_training_that_fails_gives_back_its_folder_and_the_signals(shapes, tmp_path, monkeypatch):
    def fails(*arguments):
        assert signal.getsignal(signal.SIGINT) not in earlier
        raise error

    monkeypatch.setattr(training, "start_processes", fails)
    small = ("vision_encoder.width=32", "vision_encoder.depth=1", "image_res=32", "batch_size={image: 8, video: 8}")
    where = (f"data_root={shapes.shards}", f"tokenizer={shapes.vocab}", f"output_dir={tmp_path}/run")
    settings = load_settings("configs/demo/pretrain.yaml", [*where, *small])
    earlier = [signal.getsignal(number) for number in SIGNALS]
    for error in (UserError("the network is down"), RuntimeError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            training.train(settings, Ranks(), evaluates=False)
        assert caught.value is error
        assert [signal.getsignal(number) for number in SIGNALS] == earlier
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(("watchdog", "launcher"))]
        again = RunFolder(tmp_path / "run")
        again.claim(settings.config)  # while the error, and so all that its traceback holds, is still there
        again.release()
