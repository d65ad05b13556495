"""Training again in a process in which a training has failed or was stopped, as in a notebook."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import environment, learned

WORKER = Path(__file__).with_name("again_worker.py")


@pytest.mark.timeout(300)
def test_a_training_that_fails_or_stops_gives_back_its_folder_the_signals_and_its_threads(corpora, tmp_path):
    """In one real process: each attempt needs the folder that the one before had locked."""
    run = tmp_path / "run"
    words = [sys.executable, str(WORKER), str(corpora / "tiny.yaml"), str(run)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    refused, missing, stopped, last = json.loads((tmp_path / "seen.json").read_text())
    assert refused["outcome"].startswith(f"UserError: DeepSpeed refuses {tmp_path}/refused.json: stage")
    assert missing["outcome"].startswith("MissingError")
    assert stopped["outcome"].startswith("TrainingInterrupted")
    assert last["outcome"] == "done"
    assert [each["given_back"] for each in (refused, missing, stopped)] == [True, True, False]  # it was about to exit
    assert not any(each["threads"] for each in (refused, missing, stopped, last))
    assert [line["step"] for line in learned(run)] == list(range(1, 33))
    assert (run / "finished.json").is_file()
